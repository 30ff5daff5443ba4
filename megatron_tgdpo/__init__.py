"""TGDPO and DPO training on Megatron-Core; start with ``python -m megatron_tgdpo.train``."""

__version__ = "0.2.0"
