"""TGDPO and DPO training on Megatron-Core; start with ``python -m megatron_tgdpo.train``."""
