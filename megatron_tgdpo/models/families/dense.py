"""What dense decoders have in common: the names and settings that most families share."""

from typing import Any

import torch.nn.functional as F
from transformers import PretrainedConfig

from megatron_tgdpo.errors import UserError
from megatron_tgdpo.models.families.family import Weight
from megatron_tgdpo.models.rotary import head_dim, rope_layer_types, rope_settings, rotated_part

LAYER = "model.layers.{layer}."
ATTENTION = LAYER + "self_attn."
MLP = LAYER + "mlp."

# Grouped-query attention and gated MLP without biases, two norms a layer, a final norm.
WEIGHTS = {
    "embedding.word_embeddings.weight": Weight("vocab", (("model.embed_tokens.weight", ("vocab", "hidden")),)),
    "input_layernorm.weight": Weight("copy", ((LAYER + "input_layernorm.weight", ("hidden",)),)),
    "self_attention.linear_qkv.weight": Weight(
        "qkv",
        (
            (ATTENTION + "q_proj.weight", ("query", "hidden")),
            (ATTENTION + "k_proj.weight", ("kv", "hidden")),
            (ATTENTION + "v_proj.weight", ("kv", "hidden")),
        ),
    ),
    "self_attention.linear_proj.weight": Weight("row", ((ATTENTION + "o_proj.weight", ("hidden", "query")),)),
    "pre_mlp_layernorm.weight": Weight("copy", ((LAYER + "post_attention_layernorm.weight", ("hidden",)),)),
    "mlp.linear_fc1.weight": Weight(
        "glu", ((MLP + "gate_proj.weight", ("mlp", "hidden")), (MLP + "up_proj.weight", ("mlp", "hidden")))
    ),
    "mlp.linear_fc2.weight": Weight("row", ((MLP + "down_proj.weight", ("hidden", "mlp")),)),
    "decoder.final_layernorm.weight": Weight("copy", (("model.norm.weight", ("hidden",)),)),
    "output_layer.weight": Weight("vocab", (("lm_head.weight", ("vocab", "hidden")),)),
}

CONFIG_KEYS = frozenset(
    {
        "vocab_size",
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "num_key_value_heads",
        "head_dim",
        "max_position_embeddings",
        "rms_norm_eps",
        "tie_word_embeddings",
        # models/rotary.py: transformers 5 has the first, 4.57 the others
        "rope_parameters",
        "rope_theta",
        "rope_scaling",
        "partial_rotary_factor",
    }
)

WINDOW_KEYS = frozenset({"sliding_window", "use_sliding_window", "max_window_layers", "layer_types"})


# Weights and biases that several families have beside or instead of some of those.
QKV_BIAS = Weight(
    "qkv",
    (
        (ATTENTION + "q_proj.bias", ("query",)),
        (ATTENTION + "k_proj.bias", ("kv",)),
        (ATTENTION + "v_proj.bias", ("kv",)),
    ),
)
HEAD_NORMS = {
    "self_attention.q_layernorm.weight": Weight("copy", ((ATTENTION + "q_norm.weight", ("head",)),)),
    "self_attention.k_layernorm.weight": Weight("copy", ((ATTENTION + "k_norm.weight", ("head",)),)),
}
FUSED_GATE_UP = Weight("fused_glu", ((MLP + "gate_up_proj.weight", ("gate_up", "hidden")),))


def need_rotary_by_layer(hf_config: PretrainedConfig) -> None:
    """For families whose layer types have rotary settings of their own.

    Raises:
        UserError: transformers 4 writes them as keys of several names, which are not read.
    """
    if rope_layer_types(hf_config) is None:
        raise UserError("config.json: rotary settings by layer type need transformers >= 5: install it")


def layer_norm(name: str) -> Weight:
    """A norm of a layer, by its HF name."""
    return Weight("copy", ((f"{LAYER}{name}.weight", ("hidden",)),))


def config_kwargs(hf_config: PretrainedConfig, *, partial_rotary: bool = False) -> dict[str, Any]:
    """Sizes, RMSNorm and a SiLU-gated MLP without biases.

    Args:
        hf_config: The HF config.
        partial_rotary: Whether the family rotates only a part of each head where its config says so.

    Raises:
        UserError: The config says so, and the family does not.
    """
    partial = rotated_part(hf_config, rope_settings(hf_config)[2])
    if partial != 1 and not partial_rotary:
        raise UserError(f"config.json: partial_rotary_factor {partial} is not supported, only 1")
    return {
        "num_layers": hf_config.num_hidden_layers,
        "hidden_size": hf_config.hidden_size,
        # Some configs of models with experts in every layer have none.
        "ffn_hidden_size": getattr(hf_config, "intermediate_size", None),
        "num_attention_heads": hf_config.num_attention_heads,
        "num_query_groups": hf_config.num_key_value_heads,
        "kv_channels": head_dim(hf_config),
        "layernorm_epsilon": hf_config.rms_norm_eps,
        "normalization": "RMSNorm",
        "gated_linear_unit": True,
        "activation_func": F.silu,
        "add_bias_linear": False,
    }


def window_kwargs(hf_config: PretrainedConfig) -> dict[str, Any]:
    """Sliding windows: for the layers that ``layer_types`` says, or for all where the config has no such list.

    HF's window W lets a token see itself and W - 1 before it, which megatron-core writes (W - 1, 0).

    Raises:
        UserError: A layer type other than ``full_attention`` and ``sliding_attention``, or not one for each layer.
    """
    window, layers = getattr(hf_config, "sliding_window", None), hf_config.num_hidden_layers
    types = getattr(hf_config, "layer_types", None) or ["sliding_attention" if window else "full_attention"] * layers
    unknown = set(types) - {"full_attention", "sliding_attention"}
    if unknown or len(types) != layers:
        raise UserError(
            f"config.json: layer_types has {len(types)} entries of {sorted(set(types))} for {layers} layers, "
            "supported are full_attention and sliding_attention"
        )
    if "sliding_attention" not in types:
        return {}
    if not window or window < 1:
        raise UserError(f"config.json: layer_types has sliding_attention, but sliding_window is {window}")
    return {
        "window_size": (window - 1, 0),
        "window_attn_skip_freq": [int(kind == "sliding_attention") for kind in types],
    }
