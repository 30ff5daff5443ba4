"""Saves and loads megatron-core's sharded state dicts as checkpoint directories (see ``checkpoint_directory.py``).

Global tensor names do not depend on the layout, so any layout can load what any other saved.
"""

import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.core import CheckpointingException
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, is_main_replica
from megatron.core.dist_checkpointing.state_dict_utils import save_preprocess
from torch.distributed.checkpoint.api import CheckpointException

from megatron_tgdpo.checkpoint_directory import read_metadata, write_description
from megatron_tgdpo.checkpoint_storage import write_common
from megatron_tgdpo.checkpoint_strategies import SafeLoadCommon, SafeLoadSharded, write_sharded
from megatron_tgdpo.errors import UserError
from megatron_tgdpo.whole_directory import WholeDirectory, one_line


def save(path: Path, sharded_state_dict: dict[str, Any], hf_dir: Path, metadata: Mapping[str, Any]) -> None:
    """Saves a checkpoint: afterwards ``path`` is complete on every rank's view, or an error is raised on every rank.

    Collective over the default group; ``path`` must be on storage that all ranks share.

    Args:
        path: The checkpoint's directory; it must not exist, or be empty. ``path`` + ``.tmp`` is written first.
        sharded_state_dict: megatron-core's: ShardedTensors, ShardedObjects and factories, and plain values (numbers,
            strings, containers, tensors), which are taken from rank 0. Consumed: do not use it afterwards.
        hf_dir: An HF directory or another Megatron checkpoint, whose config, tokenizer and templates are copied.
        metadata: Goes into ``tgdpo.json``. By convention ``dtype`` (``bf16``, ``fp16`` or ``fp32``), ``step`` (None if
            not from training; set if missing) and ``parameters`` (count); anything that JSON holds may be added.

    Raises:
        UserError: On every rank, if any rank failed: ``path`` is not empty, the disk is full, or anything else.
            Nothing is left behind.
    """
    with WholeDirectory(path) as directory:
        sharded, common = directory.on_all_ranks(lambda: save_preprocess(sharded_state_dict))
        directory.reserve(_total_bytes(sharded))
        directory.on_first_rank(lambda: write_common(common, directory.aside))
        directory.on_all_ranks(lambda: write_sharded(sharded, directory.aside))
        directory.on_first_rank(lambda: write_description(directory.aside, hf_dir, metadata))
        directory.publish()


def load(path: Path, sharded_state_dict: dict[str, Any]) -> dict[str, Any]:
    """Loads what ``sharded_state_dict`` asks for, from a checkpoint saved at any layout; the rest is not read.

    Collective over the default group. No file is unpickled freely (see ``checkpoint_storage.py``).

    Returns:
        The plain state dict, with the checkpoint's plain values added. ShardedTensors are filled in place as well.

    Raises:
        UserError: The checkpoint is incomplete or corrupt, or lacks a tensor or has it in another shape.
    """
    read_metadata(path)
    try:
        return dist_checkpointing.load(
            sharded_state_dict, str(path), sharded_strategy=SafeLoadSharded(), common_strategy=SafeLoadCommon()
        )
    except (
        CheckpointingException,
        CheckpointException,
        pickle.UnpicklingError,
        OSError,
        EOFError,
        KeyError,
        ValueError,
        RuntimeError,
    ) as error:
        raise UserError(f"{path}: cannot load: {one_line(error)}") from error


def _total_bytes(sharded: Any) -> int:
    """Bytes of tensor data over all ranks."""
    local = sum(
        item.data.numel() * item.data.element_size()
        for item in nested_values(sharded)
        if isinstance(item, ShardedTensor) and item.data is not None and is_main_replica(item.replica_id)
    )
    sizes: list[int] = [0] * dist.get_world_size()
    dist.all_gather_object(sizes, local)
    return sum(sizes)
