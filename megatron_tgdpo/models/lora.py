"""LoRA adapters beside megatron-core's parallel linears, exactly those of ``peft``: an A and a B for each linear of
the Hugging Face model, also where megatron-core fuses several into one.

A linear may carry several adapters, by name, of which one is on, or none. So one set of weights is several models: the
policy with its adapter, the reference without one, the guide with its own.

Legend: S_local tokens on this rank (under sequence parallelism of column-parallel linears, else S = all of the rank's),
n Hugging Face linears in a fused one (3 in QKV, 2 in gate and up, else 1), r rank, tp tensor ranks.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, cast

import torch
import torch.nn.functional as F
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
    reduce_from_tensor_model_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
)
from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint
from torch import Tensor
from transformers import PretrainedConfig

from megatron_tgdpo.checkpoints.adapter_directory import Lora
from megatron_tgdpo.models.families.family import Kind
from megatron_tgdpo.models.hf_weights.adapter_layout import FusedLinear, adapted_parts, fused_linears
from megatron_tgdpo.models.hf_weights.mapping import Heads, qkv_runs

_FOLDER = "adapters."


class LoraAdapter(torch.nn.Module):
    """The adapter of one parallel linear on one tensor rank.

    Parameters, of the linear's dtype and device:
        a: [n, r, inputs]; a row-parallel linear's inputs are split over tensor ranks, others' are whole.
        b: [outputs / tp, r], rows as in the linear's weight; of gate and up [2, outputs / 2 / tp, r]; of a row-parallel
            linear [outputs, r], whole.

    A linear of the n without an adapter has an A and a B of zeros, which stay so: each one's gradient is a product with
    the other.

    Collectives: of [S, n r] activations over tensor ranks, one each in forward and backward.
    """

    # Of which expert it is.
    expert: int | None = None

    def __init__(self, linear: Any, fused: FusedLinear, lora: Lora, heads: Heads, pg: ProcessGroupCollection) -> None:
        super().__init__()
        self.fused, self.lora, self.tp_group = fused, lora, pg.tp
        self.sequence_parallel: bool = linear.config.sequence_parallel
        weight, count = linear.weight, len(fused.parts)
        rows, inputs = weight.shape
        like = {"dtype": linear.config.params_dtype, "device": weight.device}
        self.a = torch.nn.Parameter(torch.zeros(count, lora.rank, inputs, **like))
        shape = (2, rows // 2) if fused.kind in ("glu", "fused_glu") else (rows,)
        self.b = torch.nn.Parameter(torch.zeros(*shape, lora.rank, **like))
        # To which of the parts each row of b belongs: [rows, n].
        owner = torch.tensor(_owners(fused.kind, rows, heads, pg.tp.rank()))
        self.mask: Tensor
        self.register_buffer("mask", F.one_hot(owner, count).to(**like), persistent=False)
        replicated, split, axis = (self.b, self.a, 2) if fused.row_parallel else (self.a, self.b, self.b.dim() - 2)
        set_tensor_model_parallel_attributes(split, True, axis, 1)
        # Its gradient is of this rank's tokens: megatron-core sums it over the tensor ranks.
        replicated.sequence_parallel = self.sequence_parallel  # type: ignore[attr-defined]
        self._split = {"a": 2} if fused.row_parallel else {"b": axis}

    def forward(self, x: Tensor) -> Tensor:
        """[S_local, 1, inputs] -> [S_local, 1, outputs of this rank], to be added to the linear's output."""
        hidden = F.linear(x, self.a.flatten(0, 1))
        group = self.tp_group
        if self.fused.row_parallel:
            over_ranks = (
                reduce_scatter_to_sequence_parallel_region
                if self.sequence_parallel
                else reduce_from_tensor_model_parallel_region
            )
            hidden = over_ranks(hidden, group=group)
        elif self.sequence_parallel:
            hidden = gather_from_sequence_parallel_region(hidden, group=group)
        else:
            hidden = copy_to_tensor_model_parallel_region(hidden, group=group)
        b = self.b.flatten(0, -2)
        # Block by block, so that one product serves all parts: [rows, n r].
        blocks = (self.mask[:, :, None] * b[:, None, :]).flatten(1)
        return F.linear(hidden, blocks) * self.lora.scale

    def sharded_state_dict(self, layers: int, pg: ProcessGroupCollection) -> dict[str, Any]:
        """megatron-core's sharded tensors of ``a`` and ``b``, whose keys depend on no layout and not on the name."""
        result: dict[str, Any] = make_sharded_tensors_for_checkpoint(
            {"a": self.a, "b": self.b},
            self.fused.prefix,
            self._split,
            [(0, layer, layers) for layer in self.fused.index],
            tp_group=pg.tp,
            dp_cp_group=pg.dp_cp,
        )
        return result


class ExpertAdapter(torch.nn.Module):
    """The adapter of one expert's linear on one of the ranks that share the expert.

    Parameters, of the linear's dtype and device:
        a: [r, inputs]; of the linear whose inputs are split over the ranks that share the expert, that part of them.
        b: [2, outputs / 2, r] of gate and up, or this rank's part of either; [outputs, r], whole.

    These ranks have the same tokens, and the token dispatcher sums what they make, and what they make backward. So
    nothing is exchanged but the gradient of the one that each has whole, of which each makes a part.

    Collectives: in backward one of ``a`` or ``b`` over the ranks that share the expert, where there are several.
    """

    def __init__(self, weight: Tensor, dtype: torch.dtype, fused: FusedLinear, lora: Lora, expert: int, pg: Any):
        super().__init__()
        self.fused, self.lora, self.expert, self.group = fused, lora, expert, pg.expt_tp
        rows, inputs = weight.shape
        shape = (rows,) if fused.row_parallel else (2, rows // 2)
        self.a = torch.nn.Parameter(torch.zeros(lora.rank, inputs, dtype=dtype, device=weight.device))
        self.b = torch.nn.Parameter(torch.zeros(*shape, lora.rank, dtype=dtype, device=weight.device))
        self._split = {"a": 1} if fused.row_parallel else {"b": 1}
        for name, parameter in self.named_parameters():
            # For the gradient norm: all count, of one that each rank has whole the first rank's.
            set_tensor_model_parallel_attributes(parameter, True, self._split.get(name, -1), 1)
            parameter.shared = name not in self._split and pg.expt_tp.rank() > 0  # type: ignore[attr-defined]
            # As the expert's own: see ``experts.py: prepare_experts``.
            parameter.allreduce = weight.allreduce  # type: ignore[attr-defined]

    def forward(self, x: Tensor) -> Tensor:
        """[T, inputs] -> [T, outputs of this rank] of this expert's T tokens, to be added to the linear's output."""
        a, b = (
            parameter if name in self._split else copy_to_tensor_model_parallel_region(parameter, group=self.group)
            for name, parameter in (("a", self.a), ("b", self.b))
        )
        return F.linear(F.linear(x, a), b.flatten(0, -2)) * self.lora.scale

    def sharded_state_dict(self, layers: int, pg: ProcessGroupCollection) -> dict[str, Any]:
        """As :meth:`LoraAdapter.sharded_state_dict`; of each layer all experts are stacked."""
        index = self.fused.index
        result: dict[str, Any] = make_sharded_tensors_for_checkpoint(
            {"a": self.a, "b": self.b},
            self.fused.prefix,
            self._split,
            [*((0, layer, layers) for layer in index), (len(index), self.expert, self.fused.experts)],
            tp_group=pg.expt_tp,
            dp_cp_group=pg.expt_dp,
        )
        return result


def _owners(kind: Kind, rows: int, heads: Heads, rank: int) -> list[int]:
    """For each row of a parallel linear on a tensor rank, which of its parts it belongs to."""
    if kind == "glu":
        return [0] * (rows // 2) + [1] * (rows // 2)
    if kind == "qkv":
        return [part for part, a, b in qkv_runs(rank * rows, (rank + 1) * rows, heads) for _ in range(a, b)]
    return [0] * rows


def is_of_adapter(name: str) -> bool:
    """Whether a parameter's name is that of an adapter's."""
    return f".{_FOLDER}" in f".{name}"


def without_adapters(state: Mapping[str, Any]) -> dict[str, Any]:
    """A state dict's entries, or parameters by name, that are not of adapters."""
    return {name: entry for name, entry in state.items() if not is_of_adapter(name)}


class _RoomForAdapters(torch.nn.Module):
    """What a linear with room for adapters has, before the linear among the bases of a class."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.adapters = torch.nn.ModuleDict()
        self.active: str | None = None

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple[Any, ...] = (), metadata: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        """Without adapters: see :func:`adapter_state`."""
        return without_adapters(super().sharded_state_dict(prefix, sharded_offsets, metadata))  # type: ignore[misc]


def with_adapters(linear: type[torch.nn.Module]) -> type[torch.nn.Module]:
    """The parallel linear, of either layer spec, with room for adapters.

    Transformer Engine's, with the norm before it inside, hands out what the norm made: an adapter takes that.
    """

    class AdaptedLinear(_RoomForAdapters, linear):  # type: ignore[valid-type, misc]
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            if hasattr(self, "layer_norm_weight"):
                self.return_layernorm_output = True

        def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
            output, bias = super().forward(x, *args, **kwargs)
            if isinstance(output, tuple):
                output, x = output
            if self.active is not None and self.active in self.adapters:
                output = output + self.adapters[self.active](x)
            return output, bias

    return AdaptedLinear


def with_expert_adapters(grouped: type[torch.nn.Module]) -> type[torch.nn.Module]:
    """Transformer Engine's linear of all of a rank's experts, with room for adapters."""

    class AdaptedGroupedLinear(_RoomForAdapters, grouped):  # type: ignore[valid-type, misc]
        def forward(self, x: Tensor, m_splits: list[int]) -> tuple[Tensor, Tensor | None]:
            output, bias = super().forward(x, m_splits)
            if self.active is not None and self.active in self.adapters:
                each = cast(torch.nn.ModuleList, self.adapters[self.active])
                parts = zip(each, x.split(m_splits), strict=True)
                output = output + torch.cat([adapter(part) for adapter, part in parts])
            return output, bias

    return AdaptedGroupedLinear


def add_adapter(model: GPTModel, name: str, lora: Lora, hf_config: PretrainedConfig) -> None:
    """Gives this rank's slice of a model an adapter that changes nothing yet, off.

    Args:
        model: A LanguageModel built with ``adapters``.
        name: Of the adapter.
        lora: What it is.
        hf_config: That the model was built from.
    """
    heads, pg = Heads.of(hf_config), model.pg_collection
    for layer in model.decoder.layers:
        for fused in fused_linears(hf_config, int(layer.layer_number) - 1):
            if not any(adapted_parts(fused, lora)):
                continue
            if not fused.experts:
                linear = layer.get_submodule(fused.name)
                linear.adapters[name] = LoraAdapter(linear, fused, lora, heads, pg)
                continue
            experts, linear_name = layer.mlp.experts, fused.name.rpartition(".")[2]
            each = getattr(experts, "local_experts", None)  # None: Transformer Engine's, all in one
            linears = [getattr(one, linear_name) for one in (each or [experts])]
            weights = [weight for linear in linears for weight in _weights(linear)]
            first = pg.ep.rank() * len(weights)
            made = [
                ExpertAdapter(weight, model.config.params_dtype, fused, lora, first + number, pg)
                for number, weight in enumerate(weights)
            ]
            for linear, adapter in zip(linears, [torch.nn.ModuleList(made)] if each is None else made, strict=True):
                linear.adapters[name] = adapter


def _weights(linear: Any) -> list[Tensor]:
    """Of an expert's linear, or of one of several experts."""
    return [weight for key, weight in linear.named_parameters(recurse=False) if key.startswith("weight")]


def _linears(model: GPTModel) -> Iterator[tuple[int, Any]]:
    """The layers' parallel linears, which have room for adapters, with their 0-based layers."""
    for layer in model.decoder.layers:
        for module in layer.modules():
            if isinstance(getattr(module, "adapters", None), torch.nn.ModuleDict):
                yield int(layer.layer_number) - 1, module


def adapters_of(model: GPTModel, name: str) -> Iterator[tuple[int, LoraAdapter | ExpertAdapter]]:
    """The adapters of one name with their 0-based layers, the same ones in the same order always."""
    for layer, linear in _linears(model):
        if name in linear.adapters:
            found = linear.adapters[name]
            for adapter in found if isinstance(found, torch.nn.ModuleList) else [found]:
                yield layer, cast(LoraAdapter | ExpertAdapter, adapter)


@contextmanager
def adapter_on(model: GPTModel, name: str | None) -> Iterator[None]:
    """The model with the adapter of this name on and no other; afterwards as before."""
    _, first = next(_linears(model))
    before = first.active
    set_active(model, name)
    try:
        yield
    finally:
        set_active(model, before)


def set_active(model: GPTModel, name: str | None) -> None:
    """Turns an adapter on and the others off; None turns all off."""
    for _, linear in _linears(model):
        linear.active = name


def adapter_state(model: GPTModel, name: str) -> dict[str, Any]:
    """megatron-core's sharded state dict of one adapter of this rank's slice."""
    return {
        f"{layer}.{adapter.expert}.{key}": entry
        for layer, adapter in adapters_of(model, name)
        for key, entry in adapter.sharded_state_dict(model.config.num_layers, model.pg_collection).items()
    }


@torch.no_grad()
def load_adapter_state(model: GPTModel, name: str, state: Mapping[str, Tensor]) -> None:
    """Sets an adapter from what was loaded for :func:`adapter_state`."""
    for layer, adapter in adapters_of(model, name):
        prefix = f"{layer}.{adapter.expert}.{adapter.fused.prefix}"
        adapter.a.copy_(state[f"{prefix}a"])
        adapter.b.copy_(state[f"{prefix}b"])


def freeze_all_but(model: GPTModel, name: str) -> None:
    """Has one adapter train and nothing else."""
    model.requires_grad_(False)
    for _, adapter in adapters_of(model, name):
        adapter.requires_grad_(True)
