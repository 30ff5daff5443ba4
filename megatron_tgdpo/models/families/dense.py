"""What dense decoders have in common: the names and settings that most families share."""

from typing import Any

import torch.nn.functional as F
from transformers import PretrainedConfig

from megatron_tgdpo.errors import UserError
from megatron_tgdpo.models.families.family import Weight
from megatron_tgdpo.models.rotary import head_dim

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


def config_kwargs(hf_config: PretrainedConfig) -> dict[str, Any]:
    """Sizes, RMSNorm and a SiLU-gated MLP without biases."""
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
