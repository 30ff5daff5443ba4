"""Qwen2 and Qwen2.5: biases on query, key and value, which no config key mentions; windows on the upper layers."""

from typing import Any

from transformers import PretrainedConfig

from megatron_tgdpo.models.families import dense
from megatron_tgdpo.models.families.family import Family


def _config_kwargs(hf_config: PretrainedConfig) -> dict[str, Any]:
    return {**dense.config_kwargs(hf_config), **dense.window_kwargs(hf_config), "add_qkv_bias": True}


FAMILY = Family(
    architecture="Qwen2ForCausalLM",
    config_keys=dense.CONFIG_KEYS | dense.WINDOW_KEYS,
    config_kwargs=_config_kwargs,
    weights={
        **dense.WEIGHTS,
        "self_attention.linear_qkv.bias": dense.QKV_BIAS,
    },
)
