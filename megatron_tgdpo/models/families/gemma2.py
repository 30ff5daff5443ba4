"""Gemma-2: norms before and after attention and MLP, softcaps, windows on every other layer, scaled embeddings.

And VaultGemma, the same without the norms after attention and MLP.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from transformers import PretrainedConfig

from megatron_tgdpo.models.families import dense
from megatron_tgdpo.models.families.family import Family


def gelu_tanh(gate: torch.Tensor) -> torch.Tensor:
    return F.gelu(gate, approximate="tanh")


def _config_kwargs(hf_config: PretrainedConfig) -> dict[str, Any]:
    return {
        **dense.config_kwargs(hf_config),
        **dense.window_kwargs(hf_config),
        "activation_func": gelu_tanh,
        "layernorm_zero_centered_gamma": True,
        "post_norms": True,
        "softmax_scale": hf_config.query_pre_attn_scalar**-0.5,
        "attn_logit_softcapping": hf_config.attn_logit_softcapping,
        "final_logit_softcapping": hf_config.final_logit_softcapping,
        "embedding_scale": math.sqrt(hf_config.hidden_size),
    }


def _vaultgemma(hf_config: PretrainedConfig) -> dict[str, Any]:
    return {**_config_kwargs(hf_config), "post_norms": False}


_KEYS = (
    dense.CONFIG_KEYS
    | dense.WINDOW_KEYS
    | {"query_pre_attn_scalar", "attn_logit_softcapping", "final_logit_softcapping"}
)

FAMILY = Family(
    architecture="Gemma2ForCausalLM",
    config_keys=_KEYS,
    config_kwargs=_config_kwargs,
    weights={
        **dense.WEIGHTS,
        # HF's post_attention_layernorm stands before the MLP in Llama, after attention here.
        "self_attention.linear_proj.post_layernorm.weight": dense.layer_norm("post_attention_layernorm"),
        "pre_mlp_layernorm.weight": dense.layer_norm("pre_feedforward_layernorm"),
        "mlp.linear_fc2.post_layernorm.weight": dense.layer_norm("post_feedforward_layernorm"),
    },
)
VAULTGEMMA = Family(
    architecture="VaultGemmaForCausalLM",
    config_keys=_KEYS,
    config_kwargs=_vaultgemma,
    weights={**dense.WEIGHTS, "pre_mlp_layernorm.weight": dense.layer_norm("pre_feedforward_layernorm")},
)
