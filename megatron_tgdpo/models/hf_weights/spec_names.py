"""What the two layer specs call a layer's norms, and what checkpoints call them.

The local spec has the norms before attention and MLP as modules of their own; Transformer Engine fuses each into the
linear that follows it. Families, and loading from HF, speak of the local names; checkpoints of both specs hold the
fused names, which megatron-core's local spec maps to by itself (``sharded_state_dict_keys_map``).
"""

# Prefixes, relative to a layer: local spec -> fused layers and checkpoints.
FUSED_NORMS = {
    "input_layernorm.": "self_attention.linear_qkv.layer_norm_",
    "pre_mlp_layernorm.": "mlp.linear_fc1.layer_norm_",
}


def local_name(name: str) -> str:
    """The local spec's name of a layer's parameter, given either spec's; relative to the layer."""
    for local, fused in FUSED_NORMS.items():
        if name.startswith(fused):
            return local + name.removeprefix(fused)
    return name
