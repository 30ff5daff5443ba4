"""The Transformer Engine layer spec: norm and linear fused, FP8 where the config says so.

Source: ``megatron/core/extensions/transformer_engine.py`` and ``transformer_engine_spec_provider.py`` of megatron-core
0.16.1, Transformer Engine 2.9 to 2.11. Pure functions of their arguments; only :func:`load_parts` needs Transformer
Engine.
"""

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.mlp import MLPSubmodules
from megatron.core.transformer.moe.experts import TEGroupedMLP
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from torch import Tensor

from megatron_tgdpo.errors import UserError
from megatron_tgdpo.mcore_compat import submodules_of
from megatron_tgdpo.models.attention.latent import ReplicatedLinear
from megatron_tgdpo.models.attention.self_attention import FamilySelfAttention, is_wanted
from megatron_tgdpo.models.config import LanguageModelConfig
from megatron_tgdpo.models.layer_spec import each_layer, latent_parts, layer_skeleton, wrapped_row_linear
from megatron_tgdpo.models.lora import with_adapters, with_expert_adapters


@dataclass(frozen=True)
class TransformerEngineParts:
    """megatron-core's wrappers of Transformer Engine's modules.

    Attributes:
        norm: ``TENorm``.
        column_linear: ``TELayerNormColumnParallelLinear``, which holds the norm before it as ``layer_norm_weight``.
        row_linear: ``TERowParallelLinear``.
        plain_column_linear: ``TEColumnParallelLinear``, for layers without a norm before attention and MLP, for shared
            experts, and for latent attention.
        column_grouped: ``TEColumnParallelGroupedLinear``: those of this rank's experts, as one product of groups.
        row_grouped: ``TERowParallelGroupedLinear``.
    """

    norm: Any
    column_linear: type[torch.nn.Module]
    row_linear: type[torch.nn.Module]
    plain_column_linear: type[torch.nn.Module]
    column_grouped: type[torch.nn.Module]
    row_grouped: type[torch.nn.Module]


def load_parts() -> TransformerEngineParts:
    """The real classes.

    Raises:
        UserError: Transformer Engine cannot be imported (megatron-core would put mocks in its place).
    """
    from megatron.core.extensions import transformer_engine as wrappers

    if not wrappers.HAVE_TE:
        raise UserError("model.layer_spec=transformer_engine: Transformer Engine cannot be imported here")
    return TransformerEngineParts(
        norm=wrappers.TENorm,
        column_linear=wrappers.TELayerNormColumnParallelLinear,
        row_linear=wrappers.TERowParallelLinear,
        plain_column_linear=wrappers.TEColumnParallelLinear,
        column_grouped=wrappers.TEColumnParallelGroupedLinear,
        row_grouped=wrappers.TERowParallelGroupedLinear,
    )


def te_block_spec(
    config: LanguageModelConfig,
    layers: Sequence[int],
    core_attention: type | ModuleSpec,
    parts: TransformerEngineParts,
) -> TransformerBlockSubmodules:
    """The layers and the final norm of one chunk of this pipeline stage.

    Every family is covered by the fields of the config: biases (``add_qkv_bias``), norms of query and key heads
    (``qk_layernorm``), norms before or after attention and MLP (``pre_norms``, ``post_norms``), zero-centred scales,
    experts, latent attention (``latent``), windows and caps (the core attention's business), rotary tables and wider
    norms (``attention/self_attention.py``).

    Args:
        config: The model's configuration.
        layers: Which ones, counted from 0 through the model.
        core_attention: Class or spec of the core attention.
        parts: From :func:`load_parts`, or look-alikes.
    """
    specs = each_layer(config, layers, lambda experts: _te_layer(config, core_attention, parts, experts=experts))
    return TransformerBlockSubmodules(layer_specs=specs, layer_norm=parts.norm)


def _te_layer(
    config: LanguageModelConfig, core_attention: type | ModuleSpec, parts: TransformerEngineParts, *, experts: bool
) -> ModuleSpec:
    # The local spec's skeleton: the layer, its attention, its MLP and residual additions are megatron-core's in both.
    layer = layer_skeleton(config, experts=experts)
    layers = layer.submodules
    attention, mlp = layers.self_attention.submodules, submodules_of(layers.mlp)
    # Parameters carry the names of checkpoints already.
    layers.sharded_state_dict_keys_map = {}
    layers.input_layernorm = layers.pre_mlp_layernorm = IdentityOp
    if is_wanted(config):
        layers.self_attention.module = FamilySelfAttention
    column, row = parts.column_linear if config.pre_norms else parts.plain_column_linear, parts.row_linear
    column_grouped, row_grouped = map(without_extra_states, (parts.column_grouped, parts.row_grouped))
    if config.fused_layer_wgrad:
        column, row = with_fused_wgrad(column), with_fused_wgrad(row)
        column_grouped, row_grouped = with_fused_wgrad(column_grouped), with_fused_wgrad(row_grouped)
    if config.adapters:
        column, row = with_adapters(column), with_adapters(row)
        column_grouped, row_grouped = with_expert_adapters(column_grouped), with_expert_adapters(row_grouped)
    row = wrapped_row_linear(config, row, parts.norm)
    if config.latent is None:
        attention.linear_qkv, attention.linear_proj = column, row
    else:
        # Two linears read the norm's output.
        layers.input_layernorm = parts.norm
        plain: type[torch.nn.Module] = parts.plain_column_linear
        replicated: type[torch.nn.Module] = ReplicatedLinear
        if config.fused_layer_wgrad:
            plain = with_fused_wgrad(plain)
        if config.adapters:
            plain, replicated = with_adapters(plain), with_adapters(replicated)
        attention = latent_parts(layer, column=plain, row=row, norm=parts.norm)
        attention.replicated_linear = replicated
    if not experts:
        mlp.linear_fc1, mlp.linear_fc2 = column, row
    else:
        # The router reads the norm's output as well as the experts.
        layers.pre_mlp_layernorm = parts.norm
        grouped = MLPSubmodules(linear_fc1=column_grouped, linear_fc2=row_grouped)
        mlp.experts = ModuleSpec(module=TEGroupedMLP, submodules=grouped)
        shared = submodules_of(mlp.shared_experts)
        plain = parts.plain_column_linear
        shared.linear_fc1 = with_fused_wgrad(plain) if config.fused_layer_wgrad else plain
        shared.linear_fc2 = row
    attention.core_attention = core_attention
    if config.qk_layernorm:
        attention.q_layernorm = attention.k_layernorm = parts.norm
    return layer


def without_extra_states(grouped: type[torch.nn.Module]) -> type[torch.nn.Module]:
    """The linear of several experts with an empty extra state for each, as nothing of these is saved.

    megatron-core 0.16.1 takes Transformer Engine's for a pickled one, which since 2.20 is empty where scales have no
    history. It asks for it whenever it describes the model, as for the optimizer.
    """

    class GroupedLinear(grouped):  # type: ignore[valid-type, misc]
        def _split_extra_state(self, state: Tensor) -> list[Tensor]:
            return [state.new_empty(0)] * self.num_gemms

    return GroupedLinear


def with_fused_wgrad(linear: type[torch.nn.Module]) -> type[torch.nn.Module]:
    """The linear with weight gradients added to ``main_grad`` by the product that computes them.

    It reads ``gradient_accumulation_fusion`` of its config, which only the linears of the layers may see set.
    """

    class FusedWgradLinear(linear):  # type: ignore[valid-type, misc]
        def __init__(self, *args: Any, config: LanguageModelConfig, **kwargs: Any) -> None:
            own = copy.copy(config)
            own.gradient_accumulation_fusion = True
            super().__init__(*args, config=own, **kwargs)

    return FusedWgradLinear
