"""Saves megatron-core's sharded state dicts as checkpoint directories: staged, written beside, committed.

A checkpoint is written under a temporary name and renamed when it is whole (``storage/atomic_directory.py``).
"""

import pickle
from collections.abc import Container, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from megatron.core.dist_checkpointing.dict_utils import extract_matching_values, nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, is_main_replica
from megatron.core.dist_checkpointing.state_dict_utils import save_preprocess
from megatron.core.dist_checkpointing.strategies.torch import (
    MCoreSavePlanner,
    _replace_state_dict_keys_with_sharded_keys,
    mcore_to_pyt_state_dict,
)

from megatron_tgdpo.checkpoints.dcp_io import Writer, serialise_common, write_common
from megatron_tgdpo.checkpoints.listing import write_description
from megatron_tgdpo.distributed.ranks import raise_on_all_ranks
from megatron_tgdpo.errors import UserError
from megatron_tgdpo.storage.atomic_directory import AtomicDirectory, describe
from megatron_tgdpo.storage.files import FileDigest


@dataclass(frozen=True)
class StagedState:
    """What is to be written, apart from what training will change.

    Attributes:
        sharded: The sharded tensors and objects that this rank writes, in host memory.
        common: The content of ``common.pt``.
        size: Bytes of tensor data over all ranks.
    """

    sharded: Any
    common: bytes
    size: int


def stage(sharded_state_dict: dict[str, Any], live: Container[int] = ()) -> StagedState:
    """Prepares a state for :func:`write`. Collective over the default group.

    Args:
        sharded_state_dict: megatron-core's: ShardedTensors, ShardedObjects and factories, and plain values (numbers,
            strings, containers, tensors), which are taken from rank 0. Consumed: do not use it afterwards.
        live: Addresses of the storages that will be written to before the state is: what lies in them is copied to
            host memory, if this rank is to write it.

    Raises:
        UserError: On every rank: a plain value is not one that could be read back.
    """
    sharded, common = save_preprocess(sharded_state_dict)
    # Only what this rank writes: of several ranks that have a tensor one does.
    sharded, _ = extract_matching_values(sharded, lambda item: is_main_replica(item.replica_id))
    for item in nested_values(sharded):
        if isinstance(item, ShardedTensor) and item.data is not None:
            is_live = item.data.untyped_storage().data_ptr() in live
            # Nor is an accelerator's memory held until the state is written.
            item.data = item.data.detach().to("cpu", copy=is_live)
    is_first = dist.get_rank() == 0
    return StagedState(
        sharded, raise_on_all_ranks(lambda: _serialised(common) if is_first else b""), _total_bytes(sharded)
    )


def _serialised(common: dict[str, Any]) -> bytes:
    try:
        return serialise_common(common)
    except (pickle.PickleError, TypeError, AttributeError, RuntimeError) as error:
        raise UserError(f"a plain value of the checkpoint cannot be saved: {describe(error)}") from error


def _write_sharded(sharded: Any, directory: Path, group: dist.ProcessGroup | None = None) -> dict[str, FileDigest]:
    """Writes sharded tensors and objects, one file a rank, synced to disk; collective over ``group`` (of all ranks).

    Returns:
        Size and sha256 of this rank's files, by name.

    Raises:
        CheckpointException: On every rank, if any rank failed; its ``failures`` has (exception, traceback) by rank.
    """
    flat, _, _ = _replace_state_dict_keys_with_sharded_keys(sharded, keep_only_main_replica=True)
    writer = Writer(directory)
    dcp.save(
        mcore_to_pyt_state_dict(flat),
        storage_writer=writer,
        planner=MCoreSavePlanner(dedup_replicated_tensors=False, flatten_state_dict=False),
        process_group=group,
    )
    return writer.digests


def write(
    path: Path,
    staged: StagedState,
    hf_dir: Path,
    metadata: Mapping[str, Any],
    group: dist.ProcessGroup | None = None,
) -> None:
    """Writes a staged state: afterwards ``path`` is complete on every rank's view, or an error is raised on every rank.

    May run in a thread of its own. Collective over ``group``, which then must be one (of all ranks) that nothing else
    uses meanwhile.

    Args:
        path: The checkpoint's directory, on storage that all ranks share; it must not exist, or be empty. It is written
            under a temporary name first.
        staged: From :func:`stage`.
        hf_dir: An HF directory or another Megatron checkpoint, whose config, tokenizer and templates are copied.
        metadata: Goes into ``tgdpo.json``. By convention ``dtype`` (``bf16``, ``fp16`` or ``fp32``), ``step`` (None if
            not from training; set if missing) and ``parameters`` (count); anything that JSON holds may be added.
        group: See above; None for the default group.

    Raises:
        UserError: On every rank, if any rank failed: ``path`` is not empty, the disk is full, or anything else.
            Nothing is left behind.
    """
    with AtomicDirectory(path, group) as directory:
        directory.reserve(staged.size)
        directory.run_on_rank0(lambda: write_common(staged.common, directory.temporary))
        digests = directory.collect(
            directory.run_on_all_ranks(lambda: _write_sharded(staged.sharded, directory.temporary, group))
        )
        directory.run_on_rank0(lambda: write_description(directory.temporary, hf_dir, metadata, digests))
        directory.commit()


def _total_bytes(sharded: Any) -> int:
    """Bytes of tensor data that all ranks write."""
    items = [item for item in nested_values(sharded) if isinstance(item, ShardedTensor) and item.data is not None]
    local = sum(item.data.numel() * item.data.element_size() for item in items)
    sizes: list[int] = [0] * dist.get_world_size()
    dist.all_gather_object(sizes, local)
    return sum(sizes)
