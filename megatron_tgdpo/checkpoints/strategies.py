"""megatron-core's sharded state dicts, loaded and saved through ``checkpoints/dcp_io.py``."""

import io
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from megatron.core.dist_checkpointing.mapping import ShardedTensor
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
from torch.distributed.checkpoint.planner import LoadPlan, ReadItem

from megatron_tgdpo.checkpoints.dcp_io import SafeReader, Writer
from megatron_tgdpo.checkpoints.directory import COMMON_FILE
from megatron_tgdpo.errors import UserError
from megatron_tgdpo.storage.files import FileDigest


class _SafeLoadPlanner(MCoreLoadPlanner):
    def create_local_plan(self) -> LoadPlan:
        # Raised in here, DCP brings it to all ranks.
        missing = sorted(set(self.state_dict) - set(self.metadata.state_dict_metadata))
        if missing:
            raise UserError(f"it lacks {len(missing)} of the tensors asked for, first {missing[0]}")
        return super().create_local_plan()

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        # The parent unpickles freely; what weights_only accepts runs no code there either.
        torch.load(value, weights_only=True)
        value.seek(0)
        super().load_bytes(read_item, value)


class SafeLoadSharded(LoadShardedStrategy):
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


class SafeLoadCommon(TorchCommonLoadStrategy):
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


def write_sharded(sharded: Any, directory: Path, group: dist.ProcessGroup | None = None) -> dict[str, FileDigest]:
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
