"""What Transformer Engine holds in FP8, in and out: weights, ``_extra_state``, and the history behind the scales.

Checkpoints hold no FP8 and depend on no layer spec:

- Weights are stored as bf16 and, for the optimizer, fp32.
- megatron-core's local linears save an empty object as ``_extra_state``; Transformer Engine's modules save one each,
  FP8 history pickled into a tensor, and unpickle what they load. Here they neither write that nor get it: a checkpoint
  holds the local spec's empty objects whatever the spec.
- With delayed scaling every FP8 linear keeps the largest values (amax) of the last products' operands and the scales
  that follow from them. Transformer Engine reduces them over all ranks of a stage, so they belong to a layer and depend
  on no layout. They are training state, saved as tensors: with scales of 1 instead, a run that continues rounds
  otherwise than the one that went on.

Nothing else imports ``megatron.core.fp8_utils``. Source: TransformerEngine 2.9 to 2.11 ``pytorch/module/base.py``,
``pytorch/quantization.py`` and ``tensor/quantized_tensor.py``, megatron-core 0.16.1 ``optimizer/distrib_optimizer.py``.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing.mapping import ShardedObject, ShardedTensor
from megatron.core.dist_checkpointing.utils import force_all_tensors_to_non_fp8
from megatron.core.fp8_utils import (
    dequantize_fp8_tensor,
    get_fp8_recipe,
    is_float8tensor,
    post_all_gather_processing,
)
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.module import MegatronModule
from torch import Tensor

from megatron_tgdpo.models.lora import without_adapters

# Weights are E4M3 in every format that Transformer Engine offers.
_LARGEST_E4M3 = 448.0
_EXTRA_STATE = "_extra_state"
_LINEARS = ("linear_qkv.", "linear_proj.", "linear_fc1.", "linear_fc2.")
# As training state, it is no tensor of the model.
_PREFIX = "optimizer.fp8."
_DIRECTIONS = {"forward": "scaling_fwd", "backward": "scaling_bwd"}


def is_fp8(tensor: Tensor) -> bool:
    """Whether a tensor holds FP8, without storage of its own."""
    return bool(is_float8tensor(tensor))


def without_fp8(tensor: Tensor) -> Tensor:
    """The tensor itself, or bf16 values of an FP8 one."""
    plain: Tensor = dequantize_fp8_tensor(tensor) if is_fp8(tensor) else tensor
    return plain


def finish_gather(parameters: Sequence[Tensor]) -> None:
    """Brings up to date what follows from the bytes of FP8 parameters, gathered over data ranks: transposed copies."""
    if parameters:
        post_all_gather_processing(parameters)


@torch.no_grad()
def write_parameter(parameter: torch.nn.Parameter, value: Tensor) -> None:
    """Sets a parameter, in FP8 or not, to ``value`` (any dtype and device, same shape).

    A trainable FP8 parameter carries the value it was made from, in high precision on the CPU, until the optimizer has
    taken its fp32 copy from it; that one is set too, so that training starts from the checkpoint's digits and not from
    FP8's.
    """
    _scale_for(parameter, value)
    parameter.copy_(value.to(parameter.dtype))
    high_precision = getattr(parameter, "get_high_precision_init_val", None)
    kept = high_precision() if high_precision is not None else None
    if kept is not None:
        kept.copy_(value)


def forget_high_precision(parameters: Iterable[torch.nn.Parameter]) -> None:
    """Has FP8 parameters that no optimizer takes a copy of forget the value in high precision that they carry."""
    for parameter in parameters:
        forget = getattr(parameter, "clear_high_precision_init_val", None)
        if forget is not None and not parameter.requires_grad:
            forget()


def _scale_for(parameter: Any, value: Tensor) -> None:
    """Gives a parameter of delayed scaling the scale that its value asks for.

    It was made from memory that nobody initialised, whose largest value would else set the scale for as long as the
    history of amax goes back.
    """
    quantizer = getattr(parameter, "_quantizer", None)
    if quantizer is None or type(quantizer).__name__ != "Float8Quantizer":
        return
    quantizer.amax.zero_()
    amax = value.abs().max().float()
    if amax > 0:
        quantizer.scale.fill_(_LARGEST_E4M3 / amax)


def dequantised(sharded_state_dict: dict[str, Any]) -> dict[str, Any]:
    """The sharded state dict with FP8 tensors turned into bf16, in place: checkpoints and exports hold no FP8."""
    force_all_tensors_to_non_fp8(sharded_state_dict)
    return sharded_state_dict


def plain_part(parameter: Tensor, start: int, end: int) -> Tensor:
    """Elements [start, end) of a parameter, (end - start,), without FP8.

    A view of the parameter, but of an FP8 tensor bf16 in host memory.
    """
    part = without_fp8(parameter).detach().flatten()[start:end]
    return part.to("cpu", copy=True) if is_fp8(parameter) else part


def without_content(sharded_state_dict: dict[str, Any]) -> dict[str, Any]:
    """The same entries with the extra states that the local spec has, all of them empty."""
    kept = {}
    for name, entry in sharded_state_dict.items():
        if ".experts." in name and _EXTRA_STATE in name:
            # There would be thousands, and Transformer Engine numbers them.
            continue
        if name.endswith(_EXTRA_STATE):
            if not name.removesuffix(_EXTRA_STATE).endswith(_LINEARS):
                continue
            assert isinstance(entry, ShardedObject)
            entry.data = None
        kept[name] = entry
    return kept


def load_without(module: torch.nn.Module, state_dict: Mapping[str, Any]) -> None:
    """Sets every parameter but those of adapters from the state dict, whose extra states are ignored.

    Raises:
        RuntimeError: An entry is missing or unexpected.
    """
    weights = {name: value for name, value in state_dict.items() if not name.endswith(_EXTRA_STATE)}
    parameters = without_adapters(dict(module.named_parameters()))
    if weights.keys() != parameters.keys():
        missing, unexpected = sorted(parameters.keys() - weights.keys()), sorted(weights.keys() - parameters.keys())
        raise RuntimeError(f"state dict: missing {missing}, unexpected {unexpected}")
    for name, parameter in parameters.items():
        write_parameter(parameter, weights[name])


def history_shards(
    chunk: MegatronModule, model_state: Mapping[str, Any], pg: ProcessGroupCollection
) -> dict[str, dict[str, ShardedTensor]]:
    """The histories and scales of a chunk's layers, for saving and loading; empty for other recipes.

    Collective over the ranks of a stage.

    Args:
        chunk: One of the policy's on this stage.
        model_state: megatron-core's sharded state dict of it.
        pg: Process groups.

    Returns:
        By linear and tensor: copies of [history, operands] amax and [operands] scales, float32.
    """
    found = {name: {key: t.clone() for key, t in _tensors(module).items()} for name, module in _linears(chunk)}
    # What was met since Transformer Engine last reduced it: by an evaluation, or the cast of the updated weights.
    pending = [t[0] for tensors in found.values() for key, t in tensors.items() if key.endswith("amax")]
    if pending:
        largest = torch.cat(pending)
        for group in (pg.tp, pg.dp_cp):
            dist.all_reduce(largest, op=dist.ReduceOp.MAX, group=group)
        for row, value in zip(pending, largest.split([len(row) for row in pending]), strict=True):
            row.copy_(value)
    return {
        name: {key: _shard(model_state[f"{name}._extra_state"], key, tensor) for key, tensor in tensors.items()}
        for name, tensors in found.items()
    }


def _shard(extra_state: ShardedObject, name: str, tensor: Tensor) -> ShardedTensor:
    """The layer's part of a tensor over all layers, where megatron-core has the layer's extra state."""
    key = f"{_PREFIX}{extra_state.key.removesuffix('._extra_state')}.{name}"
    (layer,), (layers,) = extra_state.global_offset, extra_state.global_shape
    return ShardedTensor.from_rank_offsets(
        key, tensor, (0, layer, layers), replica_id=extra_state.replica_id, prepend_axis_num=1
    )


@torch.no_grad()
def restore_history(
    chunk: MegatronModule, saved: Mapping[str, Mapping[str, Tensor]], weights: Mapping[str, Tensor]
) -> None:
    """Takes what was loaded for :func:`history_shards`, after the weights.

    Args:
        chunk: The same.
        saved: Loaded tensors in the place of the sharded ones.
        weights: The checkpoint's, by name: FP8 weights are cast again, by the scale that they had.
    """
    for name, module in _linears(chunk):
        _set(module, saved[name])
        if is_fp8(module.weight):
            module.weight.copy_(weights[f"{name}.weight"].to(module.weight.dtype))
            # The cast has left its amax.
            _set(module, saved[name])


def _set(module: Any, saved: Mapping[str, Tensor]) -> None:
    for key, tensor in _tensors(module).items():
        tensor.copy_(saved[key])


def _linears(chunk: MegatronModule) -> Iterator[tuple[str, Any]]:
    """The linears that scale by a history, by name."""
    if not chunk.config.fp8 or chunk.config.fp8_recipe != "delayed":
        return
    for name, module in chunk.named_modules():
        if hasattr(module, "fp8_meta"):
            if not module.fp8_meta_tensors_initialized:
                # As at the first forward, which then leaves them as they are.
                module.fp8_meta["num_gemms"] = 1
                module.init_fp8_meta_tensors(get_fp8_recipe(chunk.config))
            yield name, module


def _tensors(module: Any) -> dict[str, Tensor]:
    """Of a linear, live: amax [history, operands] and scale [operands], of both directions."""
    states = {direction: module.fp8_meta[key] for direction, key in _DIRECTIONS.items()}
    return {
        f"{direction}.{name}": tensor
        for direction, state in states.items()
        for name, tensor in (("amax", state.amax_history), ("scale", state.scale))
    }
