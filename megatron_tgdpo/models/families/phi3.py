"""Phi-3, Phi-3.5 and Phi-4: query, key and value in one tensor, gate and up in one; LongRoPE up to its short end."""

from typing import Any

from transformers import PretrainedConfig

from megatron_tgdpo.models.families import dense
from megatron_tgdpo.models.families.dense import ATTENTION
from megatron_tgdpo.models.families.family import Family, Weight


def _config_kwargs(hf_config: PretrainedConfig) -> dict[str, Any]:
    return {**dense.config_kwargs(hf_config, partial_rotary=True), **dense.window_kwargs(hf_config)}


FAMILY = Family(
    architecture="Phi3ForCausalLM",
    config_keys=dense.CONFIG_KEYS | dense.WINDOW_KEYS | {"original_max_position_embeddings"},
    config_kwargs=_config_kwargs,
    weights={
        **dense.WEIGHTS,
        "self_attention.linear_qkv.weight": Weight("fused_qkv", ((ATTENTION + "qkv_proj.weight", ("qkv", "hidden")),)),
        "mlp.linear_fc1.weight": dense.FUSED_GATE_UP,
    },
)
