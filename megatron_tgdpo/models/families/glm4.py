"""GLM-4: norms before and after attention and MLP, neighbours rotated together in half of each head, fused gate and up.

Two architectures: ``Glm4ForCausalLM`` of 2025 (GLM-4-9B-0414), and ``GlmForCausalLM`` (glm-4-9b-hf), which has no norms
after attention and MLP.
"""

from dataclasses import replace
from typing import Any

from transformers import PretrainedConfig

from megatron_tgdpo.models.families import dense
from megatron_tgdpo.models.families.family import Family


def _glm(hf_config: PretrainedConfig) -> dict[str, Any]:
    return {
        **dense.config_kwargs(hf_config, partial_rotary=True),
        "rotary_interleaved": True,
        "add_qkv_bias": bool(hf_config.attention_bias),
    }


def _glm4(hf_config: PretrainedConfig) -> dict[str, Any]:
    return {**_glm(hf_config), "post_norms": True}


_GLM_WEIGHTS = {
    **dense.WEIGHTS,
    "self_attention.linear_qkv.bias": replace(dense.QKV_BIAS, only_if="attention_bias"),
    "mlp.linear_fc1.weight": dense.FUSED_GATE_UP,
}

GLM = Family(
    architecture="GlmForCausalLM",
    config_keys=dense.CONFIG_KEYS | {"attention_bias"},
    config_kwargs=_glm,
    weights=_GLM_WEIGHTS,
)
GLM4 = Family(
    architecture="Glm4ForCausalLM",
    config_keys=dense.CONFIG_KEYS | {"attention_bias"},
    config_kwargs=_glm4,
    weights={
        **_GLM_WEIGHTS,
        "self_attention.linear_proj.post_layernorm.weight": dense.layer_norm("post_self_attn_layernorm"),
        "mlp.linear_fc2.post_layernorm.weight": dense.layer_norm("post_mlp_layernorm"),
    },
)
