"""TGDPO and DPO training on Megatron-Core; start with ``tgdpo train``."""
