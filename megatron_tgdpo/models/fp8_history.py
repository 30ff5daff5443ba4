"""The history that delayed scaling takes its scales from, as a part of training checkpoints.

Every FP8 linear keeps the largest values (amax) of the last products' operands and the scales that follow from them.
Transformer Engine reduces them over all ranks of a stage, so they belong to a layer and depend on no layout. They are
part of the training state: with scales of 1 instead, a run that continues rounds otherwise than the one that went on.

Source: TransformerEngine 2.9 to 2.11 ``pytorch/module/base.py`` and ``pytorch/quantization.py``.
"""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing.mapping import ShardedObject, ShardedTensor
from megatron.core.fp8_utils import get_fp8_recipe, is_float8tensor
from megatron.core.process_groups_config import ProcessGroupCollection
from torch import Tensor

from megatron_tgdpo.models.language_model import LanguageModel

# As training state, it is no tensor of the model.
_PREFIX = "optimizer.fp8."
_DIRECTIONS = {"forward": "scaling_fwd", "backward": "scaling_bwd"}


def history_shards(
    chunk: LanguageModel, model_state: Mapping[str, Any], pg: ProcessGroupCollection
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
    chunk: LanguageModel, saved: Mapping[str, Mapping[str, Tensor]], weights: Mapping[str, Tensor]
) -> None:
    """Takes what was loaded for :func:`history_shards`, after the weights.

    Args:
        chunk: The same.
        saved: Loaded tensors in the place of the sharded ones.
        weights: The checkpoint's, by name: FP8 weights are cast again, by the scale that they had.
    """
    for name, module in _linears(chunk):
        _set(module, saved[name])
        if is_float8tensor(module.weight):
            module.weight.copy_(weights[f"{name}.weight"].to(module.weight.dtype))
            # The cast has left its amax.
            _set(module, saved[name])


def _set(module: Any, saved: Mapping[str, Tensor]) -> None:
    for key, tensor in _tensors(module).items():
        tensor.copy_(saved[key])


def _linears(chunk: LanguageModel) -> Iterator[tuple[str, Any]]:
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
