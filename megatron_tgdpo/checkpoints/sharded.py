"""Saves and loads megatron-core's sharded state dicts as checkpoint directories (see ``checkpoints/directory.py``).

Global tensor names do not depend on the layout, so any layout can load what any other saved.
"""

import pickle
from collections.abc import Container, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist
from megatron.core.dist_checkpointing.core import CheckpointingException
from megatron.core.dist_checkpointing.dict_utils import extract_matching_values, merge, nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, apply_factory_merges, is_main_replica
from megatron.core.dist_checkpointing.state_dict_utils import load_preprocess, save_preprocess
from megatron.core.dist_checkpointing.utils import extract_sharded_base, force_all_tensors_to_non_fp8
from megatron.core.dist_checkpointing.validation import determine_global_metadata, validate_sharding_integrity
from torch.distributed.checkpoint.api import CheckpointException

from megatron_tgdpo.checkpoints.dcp_io import serialise_common, write_common
from megatron_tgdpo.checkpoints.directory import check_files, write_description
from megatron_tgdpo.checkpoints.strategies import SafeLoadCommon, SafeLoadSharded, write_sharded
from megatron_tgdpo.distributed.ranks import raise_on_all_ranks
from megatron_tgdpo.errors import AgreedError, AgreedStorageError, StorageError, UserError
from megatron_tgdpo.storage.atomic_directory import AtomicDirectory, load_error, one_line

_LOADING_ERRORS = (
    pickle.UnpicklingError, OSError, MemoryError, EOFError, LookupError, AttributeError, TypeError, ValueError,
    RuntimeError,
)  # fmt: skip


def save(path: Path, sharded_state_dict: dict[str, Any], hf_dir: Path, metadata: Mapping[str, Any]) -> None:
    """Saves a checkpoint: afterwards ``path`` is complete on every rank's view, or an error is raised on every rank.

    Collective over the default group; ``path`` must be on storage that all ranks share.

    Args:
        path: The checkpoint's directory; it must not exist, or be empty. It is written under a temporary name first.
        sharded_state_dict: megatron-core's: ShardedTensors, ShardedObjects and factories, and plain values (numbers,
            strings, containers, tensors), which are taken from rank 0. Consumed: do not use it afterwards.
        hf_dir: An HF directory or another Megatron checkpoint, whose config, tokenizer and templates are copied.
        metadata: Goes into ``tgdpo.json``. By convention ``dtype`` (``bf16``, ``fp16`` or ``fp32``), ``step`` (None if
            not from training; set if missing) and ``parameters`` (count); anything that JSON holds may be added.

    Raises:
        UserError: On every rank, if any rank failed: ``path`` is not empty, the disk is full, or anything else.
            Nothing is left behind.
    """
    write(path, stage(sharded_state_dict), hf_dir, metadata)


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
        sharded_state_dict: See :func:`save`; consumed.
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
        raise UserError(f"a plain value of the checkpoint cannot be saved: {one_line(error)}") from error


def write(
    path: Path,
    staged: StagedState,
    hf_dir: Path,
    metadata: Mapping[str, Any],
    group: dist.ProcessGroup | None = None,
) -> None:
    """Writes a staged state, as :func:`save` says; may run in a thread of its own.

    Collective over ``group``, which in another thread must be a group (of all ranks) that nothing else uses meanwhile.
    """
    with AtomicDirectory(path, group) as directory:
        directory.reserve(staged.size)
        directory.run_on_rank0(lambda: write_common(staged.common, directory.temporary))
        digests = directory.collect(
            directory.run_on_all_ranks(lambda: write_sharded(staged.sharded, directory.temporary, group))
        )
        directory.run_on_rank0(lambda: write_description(directory.temporary, hf_dir, metadata, digests))
        directory.publish()


def load(path: Path, sharded_state_dict: dict[str, Any]) -> dict[str, Any]:
    """Loads what ``sharded_state_dict`` asks for, from a checkpoint saved at any layout; the rest is not read.

    Collective over the default group. No file is unpickled freely (see ``checkpoints/dcp_io.py``).

    Returns:
        The plain state dict, with the checkpoint's plain values added. ShardedTensors are filled in place as well.

    Raises:
        UserError: The checkpoint is incomplete or corrupt, or lacks a tensor or has it in another shape.
        StorageError: It cannot be read.
    """
    common, sharded = raise_on_all_ranks(lambda: _open(path, is_first=dist.get_rank() == 0))
    try:
        return _load(sharded_state_dict, path, common, sharded)
    except CheckpointException as error:
        # DCP has brought what any rank met to all of them.
        found = load_error(path, error)
        kind = AgreedStorageError if isinstance(found, StorageError) else AgreedError
        raise kind(str(found)) from error
    except CheckpointingException as error:
        raise UserError(f"{path}: cannot load: {one_line(error)}") from error


def _load(
    sharded_state_dict: dict[str, Any], path: Path, common: SafeLoadCommon, sharded: SafeLoadSharded
) -> dict[str, Any]:
    """What ``megatron.core.dist_checkpointing.load`` does once it has read the small files.

    It reads them on every rank for itself, and where one rank cannot, the others wait for it in the collectives below.
    """
    force_all_tensors_to_non_fp8(sharded_state_dict)
    state = common.load_common(path)
    wanted, not_stored, factories = load_preprocess(sharded_state_dict)
    merge(state, not_stored)
    wanted, _ = extract_sharded_base(wanted)
    _, global_metadata = determine_global_metadata(wanted)
    validate_sharding_integrity(global_metadata)
    merge(state, sharded.load(wanted, path))
    return apply_factory_merges(state, factories)


def _open(path: Path, *, is_first: bool) -> tuple[SafeLoadCommon, SafeLoadSharded]:
    if is_first:
        check_files(path)
    try:
        return SafeLoadCommon(path), SafeLoadSharded(path)
    except _LOADING_ERRORS as error:
        raise load_error(path, error) from error


def _total_bytes(sharded: Any) -> int:
    """Bytes of tensor data that all ranks write."""
    items = [item for item in nested_values(sharded) if isinstance(item, ShardedTensor) and item.data is not None]
    local = sum(item.data.numel() * item.data.element_size() for item in items)
    sizes: list[int] = [0] * dist.get_world_size()
    dist.all_gather_object(sizes, local)
    return sum(sizes)
