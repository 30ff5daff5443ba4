"""Seed-OSS: the dense decoder with biases on query, key and value; its dropout is off, as in every model here."""

from dataclasses import replace
from typing import Any

from transformers import PretrainedConfig

from megatron_tgdpo.models.families import dense
from megatron_tgdpo.models.families.family import Family


def _config_kwargs(hf_config: PretrainedConfig) -> dict[str, Any]:
    return {**dense.config_kwargs(hf_config), "add_qkv_bias": bool(hf_config.attention_bias)}


FAMILY = Family(
    architecture="SeedOssForCausalLM",
    config_keys=dense.CONFIG_KEYS | {"attention_bias", "attention_dropout", "residual_dropout"},
    config_kwargs=_config_kwargs,
    weights={
        **dense.WEIGHTS,
        "self_attention.linear_qkv.bias": replace(dense.QKV_BIAS, only_if="attention_bias"),
    },
)
