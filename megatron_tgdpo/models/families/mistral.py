"""Mistral: the dense decoder, with one sliding window for all layers (v0.1), for some (Ministral) or for none (v0.3).

Ministral-3 scales queries by their position, from the original context on: sequences are exact up to that
(``models/rotary.py: longest_exact``).
"""

from typing import Any

from transformers import PretrainedConfig

from megatron_tgdpo.models.families import dense
from megatron_tgdpo.models.families.family import Family


def windowed(hf_config: PretrainedConfig) -> dict[str, Any]:
    """The dense decoder with windows."""
    return {**dense.config_kwargs(hf_config), **dense.window_kwargs(hf_config)}


def _family(architecture: str) -> Family:
    return Family(architecture, dense.CONFIG_KEYS | dense.WINDOW_KEYS, windowed, dense.WEIGHTS)


FAMILY = _family("MistralForCausalLM")
MINISTRAL = _family("MinistralForCausalLM")
MINISTRAL3 = _family("Ministral3ForCausalLM")
