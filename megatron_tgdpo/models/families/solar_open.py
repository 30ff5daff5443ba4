"""Solar Open: Llama's attention, and in every layer DeepSeek-V3's experts, of which one is for all tokens."""

from dataclasses import replace
from typing import Any

from transformers import PretrainedConfig

from megatron_tgdpo.models.families import dense, experts
from megatron_tgdpo.models.families.dense import MLP
from megatron_tgdpo.models.families.family import Family


def _config_kwargs(hf_config: PretrainedConfig) -> dict[str, Any]:
    experts.check_others_keys(hf_config, first_k_dense_replace=0, use_qk_norm=False)
    return {
        **experts.deepseek_config_kwargs(
            hf_config,
            sigmoid=True,
            normalised=bool(hf_config.norm_topk_prob),
            layers=[True] * hf_config.num_hidden_layers,
        ),
        "add_qkv_bias": bool(hf_config.attention_bias),
    }


FAMILY = Family(
    architecture="SolarOpenForCausalLM",
    config_keys=experts.CONFIG_KEYS | experts.DEEPSEEK_KEYS | {"attention_bias"},
    config_kwargs=_config_kwargs,
    weights={
        **experts.QWEN_WEIGHTS,
        **experts.SCORE_BIAS,
        **experts.shared_weights(MLP + "shared_experts."),
        "self_attention.linear_qkv.bias": replace(dense.QKV_BIAS, only_if="attention_bias"),
    },
)
