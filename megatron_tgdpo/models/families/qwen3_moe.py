"""Qwen3-MoE: Qwen3's attention, and experts in every layer, or in those that the config says."""

from typing import Any

from transformers import PretrainedConfig

from megatron_tgdpo.models.families import dense, experts
from megatron_tgdpo.models.families.family import Family


def _config_kwargs(hf_config: PretrainedConfig) -> dict[str, Any]:
    return {
        **experts.config_kwargs(
            hf_config,
            experts=hf_config.num_experts,
            size=hf_config.moe_intermediate_size,
            top_k=hf_config.num_experts_per_tok,
            normalised=hf_config.norm_topk_prob,
            layers=experts.qwen_layers(hf_config),
        ),
        **dense.window_kwargs(hf_config),
        "qk_layernorm": True,
    }


FAMILY = Family(
    architecture="Qwen3MoeForCausalLM",
    config_keys=experts.CONFIG_KEYS
    | experts.QWEN_KEYS
    | experts.QWEN_LAYER_KEYS
    | dense.WINDOW_KEYS
    | {"norm_topk_prob"},
    config_kwargs=_config_kwargs,
    weights={**experts.QWEN_WEIGHTS, **dense.HEAD_NORMS},
)
