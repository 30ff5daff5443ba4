"""Saves and loads megatron-core's sharded state dicts as checkpoint directories (see ``checkpoints/directory.py``).

Global tensor names do not depend on the layout, so any layout can load what any other saved.
"""

import io
import pickle
import warnings
from collections.abc import Container, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from megatron.core.dist_checkpointing.core import CheckpointingException
from megatron.core.dist_checkpointing.dict_utils import extract_matching_values, merge, nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, apply_factory_merges, is_main_replica
from megatron.core.dist_checkpointing.state_dict_utils import load_preprocess, save_preprocess
from megatron.core.dist_checkpointing.strategies.base import LoadShardedStrategy
from megatron.core.dist_checkpointing.strategies.common import TorchCommonLoadStrategy
from megatron.core.dist_checkpointing.strategies.torch import (
    MCoreLoadPlanner,
    MCoreSavePlanner,
    _replace_sharded_keys_with_state_dict_keys,
    _replace_state_dict_keys_with_sharded_keys,
    _restore_dict_types,
    _unwrap_pyt_sharded_tensor,
    mcore_to_pyt_state_dict,
)
from megatron.core.dist_checkpointing.utils import extract_sharded_base, force_all_tensors_to_non_fp8
from megatron.core.dist_checkpointing.validation import determine_global_metadata, validate_sharding_integrity
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.planner import LoadPlan, ReadItem

from megatron_tgdpo.checkpoints.dcp_io import SafeReader, Writer, serialise_common, write_common
from megatron_tgdpo.checkpoints.directory import write_description
from megatron_tgdpo.checkpoints.manifest import COMMON_FILE, check_files
from megatron_tgdpo.distributed.ranks import raise_on_all_ranks
from megatron_tgdpo.errors import AgreedError, AgreedStorageError, StorageError, UserError
from megatron_tgdpo.storage.atomic_directory import AtomicDirectory, describe, load_error
from megatron_tgdpo.storage.files import FileDigest

_LOADING_ERRORS = (
    pickle.UnpicklingError, OSError, MemoryError, EOFError, LookupError, AttributeError, TypeError, ValueError,
    RuntimeError,
)  # fmt: skip


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


class _SafeLoadPlanner(MCoreLoadPlanner):
    def create_local_plan(self) -> LoadPlan:
        # Raised in here, DCP brings it to all ranks.
        missing = sorted(set(self.state_dict) - set(self.metadata.state_dict_metadata))
        if missing:
            raise UserError(f"it lacks {len(missing)} of the tensors asked for, first {missing[0]}")
        result: LoadPlan = super().create_local_plan()
        return result

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        # The parent unpickles freely; what weights_only accepts runs no code there either.
        torch.load(value, weights_only=True)
        value.seek(0)
        super().load_bytes(read_item, value)


class _LoadSharded(LoadShardedStrategy):
    """Loads sharded tensors and objects like TorchDistLoadShardedStrategy, but trusts no pickle.

    Args:
        checkpoint: Where they are; its metadata is read at once.
    """

    can_handle_sharded_objects = True  # type: ignore[assignment]

    def __init__(self, checkpoint: Path) -> None:
        super().__init__()
        self._reader = SafeReader(checkpoint)
        self._reader.read_metadata()

    def load(self, sharded_state_dict: Any, checkpoint_dir: str | Path) -> Any:
        """Loads in place and returns the plain state dict; collective over the default group."""
        del checkpoint_dir
        flat, flat_mapping, rename_mapping = _replace_state_dict_keys_with_sharded_keys(sharded_state_dict)
        tensors = [item for items in flat.values() for item in items if isinstance(item, ShardedTensor)]
        planner = _SafeLoadPlanner(
            shapes_validation_sharded_tensors=[item for item in tensors if not item.allow_shape_mismatch],
            allow_shape_mismatch_sharded_tensors={item.key: item for item in tensors if item.allow_shape_mismatch},
        )
        state_dict = mcore_to_pyt_state_dict(flat, is_loading=True)
        with warnings.catch_warnings():
            # The newer dcp.load wants the same keys on every rank, which pipeline stages do not have.
            warnings.simplefilter("ignore", FutureWarning)
            dcp.load_state_dict(state_dict, self._reader, planner=planner)
        plain = {key: _unwrap_pyt_sharded_tensor(value) for key, value in state_dict.items()}
        restored = _replace_sharded_keys_with_state_dict_keys(plain, flat_mapping, rename_mapping)
        _restore_dict_types(restored, sharded_state_dict)
        return restored

    def load_tensors_metadata(self, checkpoint_dir: Path) -> Any:
        """Not offered: loading with an explicit mismatch check is not used."""
        raise NotImplementedError

    def load_sharded_metadata(self, checkpoint_dir: Path) -> Any:
        """Not offered, see above."""
        raise NotImplementedError

    def remove_sharded_tensors(self, checkpoint_dir: str, key_prefix: str) -> None:
        """Not offered: checkpoints are never edited."""
        raise NotImplementedError

    def check_backend_compatibility(self, loaded_backend: str) -> None:
        """Only torch_dist."""
        if loaded_backend != "torch_dist":
            raise UserError(f"checkpoint backend {loaded_backend!r} is not supported, only torch_dist")

    def check_version_compatibility(self, loaded_version: int) -> None:
        """Only version 1."""
        if loaded_version != 1:
            raise UserError(f"torch_dist version {loaded_version} is not supported, only 1")


class _LoadCommon(TorchCommonLoadStrategy):
    """Gives ``common.pt`` (plain values of the state dict), read before, with ``weights_only=True`` said.

    Args:
        checkpoint: Where it is.
    """

    def __init__(self, checkpoint: Path) -> None:
        super().__init__()
        # torch's reader makes errors of its own of those of the system.
        content = (checkpoint / COMMON_FILE).read_bytes()
        self._common = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)

    def load_common(self, checkpoint_dir: str | Path) -> Any:
        """Returns the plain values."""
        del checkpoint_dir
        return self._common


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
        raise UserError(f"{path}: cannot load: {describe(error)}") from error


def _load(sharded_state_dict: dict[str, Any], path: Path, common: _LoadCommon, sharded: _LoadSharded) -> dict[str, Any]:
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
    result: dict[str, Any] = apply_factory_merges(state, factories)
    return result


def _open(path: Path, *, is_first: bool) -> tuple[_LoadCommon, _LoadSharded]:
    if is_first:
        check_files(path)
    try:
        return _LoadCommon(path), _LoadSharded(path)
    except _LOADING_ERRORS as error:
        raise load_error(path, error) from error


def _total_bytes(sharded: Any) -> int:
    """Bytes of tensor data that all ranks write."""
    items = [item for item in nested_values(sharded) if isinstance(item, ShardedTensor) and item.data is not None]
    local = sum(item.data.numel() * item.data.element_size() for item in items)
    sizes: list[int] = [0] * dist.get_world_size()
    dist.all_gather_object(sizes, local)
    return sum(sizes)
