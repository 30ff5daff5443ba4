"""Gemma-3, text: Gemma-2's norms, norms of query and key heads, one rotary base for windowed layers, one for others."""

import math
from typing import Any

from transformers import PretrainedConfig

from megatron_tgdpo.models.families import dense
from megatron_tgdpo.models.families.family import Family
from megatron_tgdpo.models.families.gemma2 import FAMILY as GEMMA2
from megatron_tgdpo.models.families.gemma2 import gelu_tanh


def _config_kwargs(hf_config: PretrainedConfig) -> dict[str, Any]:
    dense.need_rotary_by_layer(hf_config)
    return {
        **dense.config_kwargs(hf_config),
        **dense.window_kwargs(hf_config),
        "activation_func": gelu_tanh,
        "layernorm_zero_centered_gamma": True,
        "qk_layernorm": True,
        "post_norms": True,
        "softmax_scale": hf_config.query_pre_attn_scalar**-0.5,
        "final_logit_softcapping": hf_config.final_logit_softcapping,
        "embedding_scale": math.sqrt(hf_config.hidden_size),
    }


FAMILY = Family(
    architecture="Gemma3ForCausalLM",
    # transformers' model takes no notice of attn_logit_softcapping: only None is allowed.
    config_keys=dense.CONFIG_KEYS
    | dense.WINDOW_KEYS
    | {"query_pre_attn_scalar", "final_logit_softcapping", "_sliding_window_pattern"},
    config_kwargs=_config_kwargs,
    weights={**GEMMA2.weights, **dense.HEAD_NORMS},
)
