"""The local layer spec: megatron-core's own parallel linears with this project's attention and norms."""

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.tensor_parallel.layers import ColumnParallelLinear
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from torch import Tensor

from megatron_tgdpo.mcore_compat import submodules_of
from megatron_tgdpo.models.attention.latent import (
    LATENT_LINEARS,
    LatentAttentionSubmodules,
    LatentSelfAttention,
    ReplicatedLinear,
)
from megatron_tgdpo.models.attention.sdpa import PackedCausalAttention
from megatron_tgdpo.models.attention.self_attention import FamilySelfAttention, is_wanted
from megatron_tgdpo.models.config import LanguageModelConfig
from megatron_tgdpo.models.experts import Router
from megatron_tgdpo.models.lora import with_adapters
from megatron_tgdpo.models.norm import RMSNorm
from megatron_tgdpo.models.swiglu import SwiGLU


def with_post_norm(linear: type[torch.nn.Module], norm: Any) -> type[torch.nn.Module]:
    """A row-parallel linear whose summed output is normalised, for families with norms after attention and MLP.

    The norm is the linear's own, named ``post_layernorm``: megatron-core's layer has no place for it. Its input is
    whole on every tensor rank, or under sequence parallelism that rank's part of the sequence.

    Args:
        linear: Of either layer spec.
        norm: Made as ``norm(config, size, epsilon)``.
    """

    class RowLinearPostNorm(linear):  # type: ignore[valid-type, misc]
        def __init__(self, input_size: int, output_size: int, *, config: LanguageModelConfig, **kwargs: Any) -> None:
            super().__init__(input_size, output_size, config=config, **kwargs)
            self.post_layernorm = norm(config, output_size, config.layernorm_epsilon)

        def forward(self, x: Tensor) -> tuple[Tensor, None]:
            """[S, 1, local input] -> ([S_local, 1, output], no bias)."""
            output, bias = super().forward(x)
            assert bias is None, "a bias would have to be added before the norm"
            return self.post_layernorm(output), None

    return RowLinearPostNorm


def with_multiplier(linear: type[torch.nn.Module], factor: float) -> type[torch.nn.Module]:
    """A row-parallel linear whose output is multiplied before it is added to the residual stream."""

    class RowLinearMultiplied(linear):  # type: ignore[valid-type, misc]
        def forward(self, x: Tensor) -> tuple[Tensor, None]:
            """[S, 1, local input] -> ([S_local, 1, output], no bias)."""
            output, bias = super().forward(x)
            assert bias is None, "a bias would have to be multiplied too"
            return output * factor, None

    return RowLinearMultiplied


def with_own_output(linear: type[torch.nn.Module]) -> type[torch.nn.Module]:
    """A row-parallel linear whose output is a tensor of its own, not an autograd function's input handed on: to the
    output of an expert on one rank megatron-core adds the bias in place, which autograd then forbids."""

    class RowLinearOwnOutput(linear):  # type: ignore[valid-type, misc]
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            """[tokens, local input] -> ([tokens, output], bias [output])."""
            output, bias = super().forward(x)
            return output.clone(), bias

    return RowLinearOwnOutput


def wrapped_row_linear(config: LanguageModelConfig, linear: type[torch.nn.Module], norm: Any) -> type[torch.nn.Module]:
    """A row-parallel linear of either layer spec, with what the family does to its output."""
    if config.post_norms:
        linear = with_post_norm(linear, norm)
    return linear if config.residual_multiplier == 1.0 else with_multiplier(linear, config.residual_multiplier)


def layer_skeleton(config: LanguageModelConfig, *, experts: bool) -> ModuleSpec:
    """megatron-core's layer of the local spec, a copy to be changed; with experts one after another, and our router."""
    layer: ModuleSpec = copy.deepcopy(
        get_gpt_layer_local_spec(
            num_experts=config.num_moe_experts if experts else None,
            normalization="RMSNorm",
            qk_layernorm=config.qk_layernorm,
        )
    )
    if experts:
        submodules_of(layer.submodules.mlp).router = Router
    return layer


def latent_parts(layer: ModuleSpec, *, column: Any, row: Any, norm: Any) -> LatentAttentionSubmodules:
    """Gives a layer, of either spec, latent attention of these linears and norms; returns its parts.

    Args:
        layer: Changed.
        column: Column-parallel linear.
        row: Row-parallel linear.
        norm: Norm of the small vectors.
    """
    parts = LatentAttentionSubmodules(column, ReplicatedLinear, row, core_attention=None, norm=norm)
    attention = layer.submodules.self_attention
    attention.module, attention.submodules = LatentSelfAttention, parts
    return parts


def each_layer(
    config: LanguageModelConfig, layers: Sequence[int], make: Callable[[bool], ModuleSpec]
) -> list[ModuleSpec]:
    """The specs of a chunk's layers, made with experts or without, one for all that are alike."""
    made = {experts: make(experts) for experts in {config.has_experts(layer) for layer in layers}}
    return [made[config.has_experts(layer)] for layer in layers]


def local_block_spec(
    config: LanguageModelConfig,
    layers: Sequence[int],
    core_attention: type | ModuleSpec = PackedCausalAttention,
) -> TransformerBlockSubmodules:
    """The layers, counted from 0 through the model, and the final norm of one chunk of this pipeline stage."""
    specs = each_layer(config, layers, lambda experts: _local_layer(config, core_attention, experts=experts))
    return TransformerBlockSubmodules(layer_specs=specs, layer_norm=RMSNorm)


def _local_layer(config: LanguageModelConfig, core_attention: type | ModuleSpec, *, experts: bool) -> ModuleSpec:
    layer = layer_skeleton(config, experts=experts)
    members = layer.submodules
    members.input_layernorm = members.pre_mlp_layernorm = RMSNorm if config.pre_norms else IdentityOp
    if is_wanted(config):
        members.self_attention.module = FamilySelfAttention
    attention = members.self_attention.submodules
    if config.latent is not None:
        attention = latent_parts(layer, column=ColumnParallelLinear, row=attention.linear_proj, norm=RMSNorm)
        # A checkpoint has the norm by its own name, see hf_weights/mapping.py: FUSED_NORMS.
        del members.sharded_state_dict_keys_map["input_layernorm."]
    attention.core_attention = core_attention
    if config.qk_layernorm:
        attention.q_layernorm = attention.k_layernorm = RMSNorm
    mlp = submodules_of(members.mlp)
    if experts:
        # A checkpoint has the norm before a router by its own name, see hf_weights/mapping.py: FUSED_NORMS.
        del members.sharded_state_dict_keys_map["pre_mlp_layernorm."]
        if config.add_bias_linear:
            expert = submodules_of(mlp.experts)
            expert.linear_fc2 = with_own_output(expert.linear_fc2)
    # Asked for where config.use_te_activation_func is set.
    for part in [mlp.experts, mlp.shared_experts] if experts else [members.mlp]:
        submodules_of(part).activation_func = SwiGLU
    if config.adapters:
        for name in ("linear_qkv", "linear_proj") if config.latent is None else LATENT_LINEARS:
            setattr(attention, name, with_adapters(getattr(attention, name)))
        gated = submodules_of(mlp.experts) if experts else mlp
        gated.linear_fc1, gated.linear_fc2 = map(with_adapters, (gated.linear_fc1, gated.linear_fc2))
    attention.linear_proj = wrapped_row_linear(config, attention.linear_proj, RMSNorm)
    if not experts:
        mlp.linear_fc2 = wrapped_row_linear(config, mlp.linear_fc2, RMSNorm)
    return layer
