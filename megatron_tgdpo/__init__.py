"""TGDPO and DPO training on Megatron-Core; start with ``tgdpo train``."""

__version__ = "0.2.0"
