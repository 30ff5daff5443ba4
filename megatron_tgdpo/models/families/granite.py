"""Granite 3, dense: multipliers of embeddings, of what layers add to the residual stream, of scores and of logits.

And HyperCLOVA X, with the same, and where its config says so norms after attention and MLP.
"""

from dataclasses import replace
from typing import Any

from transformers import PretrainedConfig

from megatron_tgdpo.models.families import dense
from megatron_tgdpo.models.families.family import Family


def _config_kwargs(hf_config: PretrainedConfig) -> dict[str, Any]:
    return {
        **dense.config_kwargs(hf_config),
        "embedding_scale": hf_config.embedding_multiplier,
        "embedding_scale_rounded": False,
        "residual_multiplier": hf_config.residual_multiplier,
        "softmax_scale": hf_config.attention_multiplier,
        "logit_scale": 1.0 / hf_config.logits_scaling,
    }


def _hyperclovax(hf_config: PretrainedConfig) -> dict[str, Any]:
    return {
        **_config_kwargs(hf_config),
        "post_norms": bool(hf_config.use_post_norm),
        # A factor, not a divisor.
        "logit_scale": hf_config.logits_scaling,
    }


_KEYS = dense.CONFIG_KEYS | {"embedding_multiplier", "residual_multiplier", "attention_multiplier", "logits_scaling"}

FAMILY = Family(
    architecture="GraniteForCausalLM",
    config_keys=_KEYS,
    config_kwargs=_config_kwargs,
    weights=dense.WEIGHTS,
)
HYPERCLOVAX = Family(
    architecture="HyperCLOVAXForCausalLM",
    config_keys=_KEYS | {"use_post_norm"},
    config_kwargs=_hyperclovax,
    weights={
        **dense.WEIGHTS,
        "self_attention.linear_proj.post_layernorm.weight": replace(
            dense.layer_norm("post_norm1"), only_if="use_post_norm"
        ),
        "mlp.linear_fc2.post_layernorm.weight": replace(dense.layer_norm("post_norm2"), only_if="use_post_norm"),
    },
)
