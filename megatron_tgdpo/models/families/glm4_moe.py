"""GLM-4-MoE: GLM-4.5 to GLM-4.7. Dense layers, then DeepSeek-V3's experts; halves of heads rotate.

Beside the experts a token chooses there is one for all, without a gate. Of the layers for the prediction of several
tokens, which the published files have at their end, nothing is read. GLM-4.7-Flash has DeepSeek-V3's latent attention.
"""

from dataclasses import replace
from typing import Any

from transformers import PretrainedConfig

from megatron_tgdpo.models.families import dense, experts, latent
from megatron_tgdpo.models.families.dense import MLP
from megatron_tgdpo.models.families.family import Family


def _config_kwargs(hf_config: PretrainedConfig) -> dict[str, Any]:
    return {
        **experts.deepseek_config_kwargs(
            hf_config, sigmoid=True, normalised=bool(hf_config.norm_topk_prob), partial_rotary=True
        ),
        "add_qkv_bias": bool(hf_config.attention_bias),
        "qk_layernorm": bool(hf_config.use_qk_norm),
    }


def _lite(hf_config: PretrainedConfig) -> dict[str, Any]:
    return {
        **experts.deepseek_config_kwargs(
            hf_config,
            sigmoid=True,
            normalised=bool(hf_config.norm_topk_prob),
            layers=experts.typed_layers(hf_config),
        ),
        **latent.attention_kwargs(hf_config, interleaved=bool(hf_config.rope_interleave)),
    }


FAMILY = Family(
    architecture="Glm4MoeForCausalLM",
    config_keys=experts.CONFIG_KEYS
    | experts.DEEPSEEK_KEYS
    | {"attention_bias", "use_qk_norm", "num_nextn_predict_layers", "num_mtp_layers"},
    config_kwargs=_config_kwargs,
    weights={
        **experts.QWEN_WEIGHTS,
        **experts.SCORE_BIAS,
        **experts.shared_weights(MLP + "shared_experts."),
        "self_attention.linear_qkv.bias": replace(dense.QKV_BIAS, only_if="attention_bias"),
        **{name: replace(norm, only_if="use_qk_norm") for name, norm in dense.HEAD_NORMS.items()},
    },
    later_layers="num_nextn_predict_layers",
)
LITE = Family(
    architecture="Glm4MoeLiteForCausalLM",
    config_keys=experts.CONFIG_KEYS
    | experts.DEEPSEEK_KEYS
    | latent.CONFIG_KEYS
    | {"rope_interleave", "mlp_layer_types", "num_nextn_predict_layers"},
    config_kwargs=_lite,
    weights={
        **latent.with_latent_attention(experts.QWEN_WEIGHTS),
        **experts.shared_weights(MLP + "shared_experts."),
        **experts.SCORE_BIAS,
    },
    later_layers="num_nextn_predict_layers",
)
