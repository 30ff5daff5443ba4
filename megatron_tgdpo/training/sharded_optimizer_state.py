"""The part of policy and optimizer that a data rank owns, as megatron-core's sharded tensors.

The distributed optimizer divides each gradient bucket among data and context ranks, so a rank owns a run of elements of
every parameter that its part of a bucket touches. It writes and reads just those: of the fp32 main copy, of Adam's
moments, and, saving, of the weights. A run of a matrix's elements is at most three rectangles, which
``torch.distributed.checkpoint`` stores as parts of the whole tensor; so any layout can read what any other wrote.

megatron-core 0.16.1's own ``fully_reshardable`` state has the same tensors by the same names, but gathers all of them
on every data rank (``distrib_optimizer.py: get_parameter_state_dp_zero``), and where a gradient buffer has several
buckets takes them from the wrong place: the gathered buffer has no padding between buckets, the offsets count it.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from megatron.core.optimizer import ChainedOptimizer
from megatron.core.optimizer.cpu_offloading import HybridDeviceOptimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from torch import Tensor

from megatron_tgdpo.models.fp8_tensors import plain_part

# A rectangle: where it begins in its tensor, and its size.
Box = tuple[tuple[int, ...], tuple[int, ...]]
# megatron-core's names of what the optimizer keeps of a parameter.
_STATES = ("param", "exp_avg", "exp_avg_sq")
# Parts of the state that are no plain values; the second has the tensors of the experts' own optimizer.
_EXPERTS = "expert_param_state"
_SHARDED = ("param_state", _EXPERTS, "param_state_sharding_type")


def boxes(shape: Sequence[int], start: int, end: int) -> Iterator[Box]:
    """Elements [start, end) of a tensor, counted row by row, as rectangles in that order; at most 2 n - 1 of n axes."""
    if start == end:
        return
    if len(shape) == 1:
        yield (start,), (end - start,)
        return
    inner = math.prod(shape[1:])
    first, last = -(-start // inner), end // inner
    if first > last:
        yield from _in_row(shape, last, start, end)
        return
    if start < first * inner:
        yield from _in_row(shape, first - 1, start, first * inner)
    if first < last:
        yield (first, *(0 for _ in shape[1:])), (last - first, *shape[1:])
    if last * inner < end:
        yield from _in_row(shape, last, last * inner, end)


def _in_row(shape: Sequence[int], row: int, start: int, end: int) -> Iterator[Box]:
    before = row * math.prod(shape[1:])
    for offset, size in boxes(shape[1:], start - before, end - before):
        yield (row, *offset), (1, *size)


def optimizer_shards(chain: ChainedOptimizer, model_state: dict[str, Any]) -> dict[str, Any]:
    """megatron-core's sharded state dict of the optimizer, for saving and loading.

    Its tensors are views of the optimizer's own, if those are fp32, so loading needs no memory for them. Its plain
    values are those of the first optimizer of the chain: the step, which all have in common, and settings.

    Args:
        chain: With the moments there.
        model_state: megatron-core's sharded state dict of what it trains, with the parameters themselves as data.
    """
    entries = _entries(model_state)
    state = chain.chained_optimizers[0].state_dict()
    state["param_state"], *others = (
        {
            number: _of_parameter(entries, parameter, _states(each, parameter), start, end)
            for number, (parameter, start, end) in enumerate(_owned(each))
        }
        for each in chain.chained_optimizers
    )
    if others:
        (state[_EXPERTS],) = others
    # For megatron-core's own loader: what the tensors are to it.
    state["param_state_sharding_type"] = "fully_reshardable"
    result: dict[str, Any] = state
    return result


def _of_parameter(
    entries: dict[int, Any], parameter: Tensor, states: dict[str, Tensor], start: int, end: int
) -> dict[str, list[ShardedTensor]]:
    entry = entries[id(parameter)]
    return {
        name: _shards(entry, f"optimizer.state.{name}.{entry.key}", states[name].detach().float().flatten(), start, end)
        for name in _STATES
    }


def load_optimizer_shards(chain: ChainedOptimizer, state: dict[str, Any]) -> None:
    """Takes what was loaded for :func:`optimizer_shards`.

    Args:
        chain: The same, with nothing changed since.
        state: What came in place of the sharded tensors, and the checkpoint's plain values.
    """
    plain = {name: value for name, value in state.items() if name not in _SHARDED}
    first, *others = chain.chained_optimizers
    _load(first, plain, state["param_state"])
    for experts in filter(has_parameters, others):
        # The checkpoint may be of a layout where they had no optimizer of their own.
        own = experts.state_dict()
        steps = [{"step": group["step"]} for group in plain["optimizer"]["param_groups"] if "step" in group]
        for group in own["optimizer"]["param_groups"]:
            group.update(*steps[:1])
        _load(experts, own, state[_EXPERTS])


def has_parameters(optimizer: DistributedOptimizer) -> bool:
    """Whether it trains anything here.

    megatron-core makes an optimizer for experts on every stage if any stage has some, and asserts, where it is asked
    for its state, that there is a step in it (0.16.1 ``distrib_optimizer.py: state_dict``).
    """
    return any(group["params"] for group in optimizer.optimizer.param_groups)


def _load(optimizer: DistributedOptimizer, plain: dict[str, Any], loaded: dict[int, Any]) -> None:
    optimizer.load_state_dict(plain)
    with torch.no_grad():
        for number, (parameter, _, _) in enumerate(_owned(optimizer)):
            tensors = {name: torch.cat([part.flatten() for part in parts]) for name, parts in loaded[number].items()}
            _set_states(optimizer, parameter, tensors)
    if isinstance(optimizer.optimizer, HybridDeviceOptimizer):
        optimizer.optimizer._sync_hdo_state_to_sub_optimizers()


def _states(optimizer: DistributedOptimizer, parameter: Tensor) -> dict[str, Tensor]:
    """Main weight and moments of the part of a parameter that this rank owns; a remainder becomes the whole weight."""
    states: dict[str, Tensor] = optimizer._get_main_param_and_optimizer_states(parameter)
    if states["param"].dtype == torch.int16:
        states["param"] = whole_weight(_owned_weight(optimizer, parameter), states["param"])
    return states


def _set_states(optimizer: DistributedOptimizer, parameter: Tensor, states: dict[str, Tensor]) -> None:
    if getattr(optimizer.optimizer, "store_param_remainders", False) and parameter.dtype == torch.bfloat16:
        states = {**states, "param": remainder(_owned_weight(optimizer, parameter), states["param"])}
    optimizer._set_main_param_and_optimizer_states(parameter, states)


def _owned_weight(optimizer: DistributedOptimizer, parameter: Tensor) -> Tensor:
    """The part of a bf16 parameter that this rank owns, where Transformer Engine's Adam keeps what else there is."""
    group, place = optimizer.model_param_group_index_map[parameter]
    weight: Tensor = optimizer.optimizer.param_groups[group]["params"][place].detach()
    return weight


def whole_weight(weight: Tensor, rest: Tensor) -> Tensor:
    """fp32 weights of bf16 ones, rounded to nearest, and their remainders in int16, as bits.

    Source: ``AdamFunctorMasterParamRemainder`` of Transformer Engine's ``multi_tensor/adam.cu``.
    """
    bits = (weight.view(torch.int16).to(torch.int32) << 16) + rest.to(torch.int32)
    return bits.view(torch.float32)


def remainder(weight: Tensor, whole: Tensor) -> Tensor:
    """int16: what :func:`whole_weight` adds to bf16 weights to have the fp32 ones again.

    Half way between two bf16 weights the other rounding may have been taken, by one who had the whole: then the last
    bit of the fp32 weight is lost.
    """
    difference = whole.contiguous().view(torch.int32) - (weight.view(torch.int16).to(torch.int32) << 16)
    return difference.clamp(-(2**15), 2**15 - 1).to(torch.int16)


def weight_shards(chain: ChainedOptimizer, model_state: dict[str, Any]) -> dict[str, Any]:
    """For saving: the weights that this rank owns, and what else is in the model's state.

    FP8 weights are turned into bf16 on the way, one after another, and only what this rank owns is kept of them.
    """
    entries = _entries(model_state)
    trained = {
        id(parameter) for each in chain.chained_optimizers for buffer in each.buffers for parameter in buffer.params
    }
    parts = (part for each in chain.chained_optimizers for part in _owned(each))
    owned = {
        number: _shards(entry := entries[id(parameter)], entry.key, plain_part(parameter, start, end), start, end)
        for number, (parameter, start, end) in enumerate(parts)
    }
    others = [item for item in nested_values(model_state) if id(getattr(item, "data", None)) not in trained]
    return {"weights": owned, "others": others}


def _owned(optimizer: DistributedOptimizer) -> Iterator[tuple[torch.nn.Parameter, int, int]]:
    """Parameters and the run of their elements [start, end) that this rank owns, in an order that does not change."""
    for by_dtype in optimizer.gbuf_ranges:
        for buckets in by_dtype.values():
            for bucket in buckets:
                for parameter, ranges in bucket["param_map"].items():
                    yield parameter, ranges["param"].start, ranges["param"].end


def _entries(model_state: dict[str, Any]) -> dict[int, ShardedTensor | ShardedTensorFactory]:
    found = (item for item in nested_values(model_state) if isinstance(item, (ShardedTensor, ShardedTensorFactory)))
    return {id(item.data): item for item in found}


def _shards(
    entry: ShardedTensor | ShardedTensorFactory, key: str, values: Tensor, start: int, end: int
) -> list[ShardedTensor]:
    """Elements [start, end) of a parameter on this model-parallel rank as parts of the whole tensor, in order.

    Args:
        entry: The parameter in the model's sharded state dict.
        key: The whole tensor's name.
        values: Those elements, (end - start,).
        start: First.
        end: Last + 1.
    """
    shards = []
    for piece, begin in _pieces(entry):
        first, last = max(start, begin), min(end, begin + math.prod(piece.local_shape))
        for offset, size in boxes(piece.local_shape, first - begin, max(first, last) - begin):
            count = math.prod(size)
            leading = piece.prepend_axis_num
            shape = (*(1 for _ in range(leading)), *size)
            corner = (*(0 for _ in range(leading)), *offset)
            shards.append(
                replace(
                    piece,
                    key=key,
                    data=values[first - start : first - start + count].view(shape),
                    dtype=values.dtype,
                    local_shape=shape,
                    global_offset=tuple(a + b for a, b in zip(piece.global_offset, corner, strict=True)),
                    axis_fragmentations=None,
                    prepend_axis_num=0,
                    # No other data rank has them; ranks of other kinds may.
                    replica_id=(*entry.replica_id[:2], 0),
                )
            )
            first += count
    return shards


def _pieces(entry: ShardedTensor | ShardedTensorFactory) -> list[tuple[ShardedTensor, int]]:
    """The parts of the whole tensor that a parameter is made of, one after another, and where in it each begins.

    A gated MLP's first layer, for one, holds this rank's rows of the gate and then those of the up projection.
    """
    if isinstance(entry, ShardedTensor):
        return [(entry.without_data(), 0)]
    # On the meta device, views tell where they are.
    built = replace(entry, data=torch.empty(entry.data.shape, device="meta")).build()
    pieces = list(nested_values(built))
    assert all(piece.data.is_contiguous() for piece in pieces), entry.key
    return [(piece.without_data(), int(piece.data.storage_offset())) for piece in pieces]
