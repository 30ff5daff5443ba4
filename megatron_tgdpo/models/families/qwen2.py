"""Qwen2 and Qwen2.5: biases on query, key and value, which no config key mentions; windows on the upper layers."""

from typing import Any

from transformers import PretrainedConfig

from megatron_tgdpo.models.families import dense
from megatron_tgdpo.models.families.dense import ATTENTION
from megatron_tgdpo.models.families.family import Family, Weight


def _config_kwargs(hf_config: PretrainedConfig) -> dict[str, Any]:
    return {**dense.config_kwargs(hf_config), **dense.window_kwargs(hf_config), "add_qkv_bias": True}


BIASES = {
    "self_attention.linear_qkv.bias": Weight(
        "qkv",
        (
            (ATTENTION + "q_proj.bias", ("query",)),
            (ATTENTION + "k_proj.bias", ("kv",)),
            (ATTENTION + "v_proj.bias", ("kv",)),
        ),
    ),
}

FAMILY = Family(
    architecture="Qwen2ForCausalLM",
    config_keys=dense.CONFIG_KEYS | dense.WINDOW_KEYS,
    config_kwargs=_config_kwargs,
    weights={**dense.WEIGHTS, **BIASES},
)
