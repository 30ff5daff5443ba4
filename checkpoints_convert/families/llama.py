"""Llama: grouped-query attention, gated SiLU MLP, RMSNorm, rotary positions (default or llama3), no biases."""

from typing import Any

import torch.nn.functional as F
from transformers import PretrainedConfig

from checkpoints_convert.families.family import Family, Weight
from megatron_tgdpo.errors import UserError
from megatron_tgdpo.rotary import head_dim

_REQUIRED = {"hidden_act": "silu", "attention_bias": False, "mlp_bias": False, "attention_dropout": 0.0}


def _check(hf_config: PretrainedConfig) -> None:
    for key, wanted in _REQUIRED.items():
        value = getattr(hf_config, key, wanted)
        if value != wanted:
            raise UserError(f"config.json: {key} is {value!r}, only {wanted!r} is supported for Llama")


def _config_kwargs(hf_config: PretrainedConfig) -> dict[str, Any]:
    return {
        "num_layers": hf_config.num_hidden_layers,
        "hidden_size": hf_config.hidden_size,
        "ffn_hidden_size": hf_config.intermediate_size,
        "num_attention_heads": hf_config.num_attention_heads,
        "num_query_groups": hf_config.num_key_value_heads,
        "kv_channels": head_dim(hf_config),
        "layernorm_epsilon": hf_config.rms_norm_eps,
        "normalization": "RMSNorm",
        "gated_linear_unit": True,
        "activation_func": F.silu,
        "add_bias_linear": False,
    }


_LAYER = "model.layers.{layer}."
_ATTENTION = _LAYER + "self_attn."
_MLP = _LAYER + "mlp."

FAMILY = Family(
    architecture="LlamaForCausalLM",
    check=_check,
    config_kwargs=_config_kwargs,
    weights={
        "embedding.word_embeddings.weight": Weight("vocab", (("model.embed_tokens.weight", ("vocab", "hidden")),)),
        "output_layer.weight": Weight("vocab", (("lm_head.weight", ("vocab", "hidden")),)),
        "decoder.final_layernorm.weight": Weight("copy", (("model.norm.weight", ("hidden",)),)),
        "input_layernorm.weight": Weight("copy", ((_LAYER + "input_layernorm.weight", ("hidden",)),)),
        "self_attention.linear_qkv.weight": Weight(
            "qkv",
            (
                (_ATTENTION + "q_proj.weight", ("query", "hidden")),
                (_ATTENTION + "k_proj.weight", ("kv", "hidden")),
                (_ATTENTION + "v_proj.weight", ("kv", "hidden")),
            ),
        ),
        "self_attention.linear_proj.weight": Weight("row", ((_ATTENTION + "o_proj.weight", ("hidden", "query")),)),
        "pre_mlp_layernorm.weight": Weight("copy", ((_LAYER + "post_attention_layernorm.weight", ("hidden",)),)),
        "mlp.linear_fc1.weight": Weight(
            "glu", ((_MLP + "gate_proj.weight", ("mlp", "hidden")), (_MLP + "up_proj.weight", ("mlp", "hidden")))
        ),
        "mlp.linear_fc2.weight": Weight("row", ((_MLP + "down_proj.weight", ("hidden", "mlp")),)),
    },
    # Written by transformers before 4.31; the frequencies follow from the config.
    ignored=(".self_attn.rotary_emb.inv_freq",),
)
