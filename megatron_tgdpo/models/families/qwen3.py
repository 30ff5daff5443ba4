"""Qwen3, dense: a norm over each query and key head before rotary positions; windows on the upper layers."""

from typing import Any

from transformers import PretrainedConfig

from megatron_tgdpo.models.families import dense
from megatron_tgdpo.models.families.family import Family


def _config_kwargs(hf_config: PretrainedConfig) -> dict[str, Any]:
    return {**dense.config_kwargs(hf_config), **dense.window_kwargs(hf_config), "qk_layernorm": True}


FAMILY = Family(
    architecture="Qwen3ForCausalLM",
    config_keys=dense.CONFIG_KEYS | dense.WINDOW_KEYS,
    config_kwargs=_config_kwargs,
    weights={**dense.WEIGHTS, **dense.HEAD_NORMS},
)
