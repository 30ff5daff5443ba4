"""Loads megatron-core's sharded state dicts from checkpoint directories that ``checkpoints/save.py`` made.

Global tensor names do not depend on the layout, so any layout can load what any other saved.
"""

import io
import pickle
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from megatron.core.dist_checkpointing.core import CheckpointingException
from megatron.core.dist_checkpointing.dict_utils import merge
from megatron.core.dist_checkpointing.mapping import ShardedTensor, apply_factory_merges
from megatron.core.dist_checkpointing.state_dict_utils import load_preprocess
from megatron.core.dist_checkpointing.strategies.torch import (
    MCoreLoadPlanner,
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

from megatron_tgdpo.checkpoints.dcp_io import SafeReader
from megatron_tgdpo.checkpoints.manifest import COMMON_FILE, check_files
from megatron_tgdpo.distributed.ranks import raise_on_all_ranks
from megatron_tgdpo.errors import AgreedError, AgreedStorageError, StorageError, UserError
from megatron_tgdpo.storage.atomic_directory import describe, load_error

_LOADING_ERRORS = (
    pickle.UnpicklingError, OSError, MemoryError, EOFError, LookupError, AttributeError, TypeError, ValueError,
    ArithmeticError, RuntimeError,
)  # fmt: skip


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


class _Opened:
    """A checkpoint whose small files have been read, trusting no pickle.

    Args:
        path: Where it is.

    Attributes:
        common: The plain values of the state dict.
    """

    def __init__(self, path: Path) -> None:
        # torch's reader makes errors of its own of those of the system.
        content = (path / COMMON_FILE).read_bytes()
        self.common: dict[str, Any] = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
        self._reader = SafeReader(path)
        self._reader.read_metadata()

    def fill(self, sharded_state_dict: dict[str, Any]) -> dict[str, Any]:
        """Loads sharded tensors and objects in place and returns the plain state dict; collective over all ranks."""
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
        restored: dict[str, Any] = _replace_sharded_keys_with_state_dict_keys(plain, flat_mapping, rename_mapping)
        _restore_dict_types(restored, sharded_state_dict)
        return restored


def load_sharded(path: Path, sharded_state_dict: dict[str, Any]) -> dict[str, Any]:
    """Loads what ``sharded_state_dict`` asks for, from a checkpoint saved at any layout; the rest is not read.

    Collective over the default group. No file is unpickled freely (see ``checkpoints/dcp_io.py``).

    Returns:
        The plain state dict, with the checkpoint's plain values added. ShardedTensors are filled in place as well.

    Raises:
        UserError: The checkpoint is incomplete or corrupt, or lacks a tensor or has it in another shape.
        StorageError: It cannot be read.
    """
    opened = raise_on_all_ranks(lambda: _open(path, is_first=dist.get_rank() == 0))
    try:
        return _load(sharded_state_dict, opened)
    except CheckpointException as error:
        # DCP has brought what any rank met to all of them.
        found = load_error(path, error)
        kind = AgreedStorageError if isinstance(found, StorageError) else AgreedError
        raise kind(str(found)) from error
    except CheckpointingException as error:
        raise UserError(f"{path}: cannot load: {describe(error)}") from error


def _load(sharded_state_dict: dict[str, Any], opened: _Opened) -> dict[str, Any]:
    """What ``megatron.core.dist_checkpointing.load`` does once it has read the small files.

    It reads them on every rank for itself, and where one rank cannot, the others wait for it in the collectives below.
    """
    force_all_tensors_to_non_fp8(sharded_state_dict)
    state = opened.common
    wanted, not_stored, factories = load_preprocess(sharded_state_dict)
    merge(state, not_stored)
    wanted, _ = extract_sharded_base(wanted)
    _, global_metadata = determine_global_metadata(wanted)
    validate_sharding_integrity(global_metadata)
    merge(state, opened.fill(wanted))
    result: dict[str, Any] = apply_factory_merges(state, factories)
    return result


def _open(path: Path, *, is_first: bool) -> _Opened:
    if is_first:
        check_files(path)
    try:
        return _Opened(path)
    except _LOADING_ERRORS as error:
        raise load_error(path, error) from error
