"""Mistral: the dense decoder, with one sliding window for all layers (v0.1) or none (v0.3)."""

from typing import Any

from transformers import PretrainedConfig

from megatron_tgdpo.models.families import dense
from megatron_tgdpo.models.families.family import Family


def _config_kwargs(hf_config: PretrainedConfig) -> dict[str, Any]:
    return {**dense.config_kwargs(hf_config), **dense.window_kwargs(hf_config)}


FAMILY = Family(
    architecture="MistralForCausalLM",
    config_keys=dense.CONFIG_KEYS | dense.WINDOW_KEYS,
    config_kwargs=_config_kwargs,
    weights=dense.WEIGHTS,
)
