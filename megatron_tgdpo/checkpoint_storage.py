"""Reads and writes megatron-core's ``torch_dist`` files, in this process and without trusting pickles.

The files are those of ``megatron.core.dist_checkpointing``; two things differ from its default strategies:

- Writing happens in this process. megatron-core forks writers and starts a manager process, which needs psutil and a
  ``__main__`` guard; its asynchronous strategy writes the same files and can take this one's place on GPUs.
- Reading never unpickles freely. megatron-core 0.16 reads ``.metadata`` with ``pickle.load`` and sharded objects with
  ``torch.load(weights_only=False)``, either of which runs code that a prepared file holds. Here the metadata goes
  through an unpickler that knows only the classes of the format, and everything else through ``weights_only=True``.
"""

import io
import os
import pickle
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from megatron.core.dist_checkpointing.strategies.base import LoadShardedStrategy
from megatron.core.dist_checkpointing.strategies.common import COMMON_STATE_FNAME, TorchCommonLoadStrategy
from megatron.core.dist_checkpointing.strategies.torch import (
    MCoreLoadPlanner,
    MCoreSavePlanner,
    _replace_sharded_keys_with_state_dict_keys,
    _replace_state_dict_keys_with_sharded_keys,
    _restore_dict_types,
    _unwrap_pyt_sharded_tensor,
    mcore_to_pyt_state_dict,
)
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta
from torch.distributed.checkpoint.planner import LoadPlan, ReadItem, SavePlan, SavePlanner
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future

from megatron_tgdpo.errors import UserError

# What DCP's ``.metadata`` is made of. Of torch only named classes and dtypes; no function but the layout getter.
_METADATA_CLASSES = {
    "torch.distributed.checkpoint.metadata": (
        "Metadata",
        "TensorStorageMetadata",
        "BytesStorageMetadata",
        "ChunkStorageMetadata",
        "MetadataIndex",
        "StorageMeta",
        "TensorProperties",
        "_MEM_FORMAT_ENCODING",
    ),
    "torch.distributed.checkpoint.filesystem": ("_StorageInfo",),
    "torch": ("Size", "device"),
    "torch.serialization": ("_get_layout",),
    "collections": ("OrderedDict",),
    "pathlib": ("PosixPath", "PurePosixPath"),
    "pathlib._local": ("PosixPath", "PurePosixPath"),  # Python 3.13
}


class _MetadataUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if name in _METADATA_CLASSES.get(module, ()):
            return super().find_class(module, name)
        if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            return getattr(torch, name)
        raise pickle.UnpicklingError(f"{module}.{name} does not belong into checkpoint metadata")


class _SafeReader(dcp.FileSystemReader):
    """DCP's reader with restricted, cached metadata; tensors are read by it with ``weights_only=True`` already."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self._metadata: Metadata | None = None

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        del args, kwargs
        if self._metadata is None:
            file = Path(self.path) / ".metadata"
            with file.open("rb") as stream:
                self._metadata = _MetadataUnpickler(stream).load()
            if getattr(self._metadata, "storage_meta", None) is None:
                self._metadata.storage_meta = StorageMeta()
            for info in self._metadata.storage_data.values():
                if os.path.basename(info.relative_path) != info.relative_path:
                    raise pickle.UnpicklingError(f"{info.relative_path} leads out of the checkpoint")
        return self._metadata


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
    """Loads sharded tensors and objects as megatron-core's TorchDistLoadShardedStrategy does, see the module."""

    can_handle_sharded_objects = True  # type: ignore[assignment]

    def load(self, sharded_state_dict: Any, checkpoint_dir: str | Path) -> Any:
        """Loads in place and returns the plain state dict; collective over the default group."""
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
            dcp.load_state_dict(state_dict, _SafeReader(Path(checkpoint_dir)), planner=planner)
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
    """Loads ``common.pt`` (plain values of the state dict) with ``weights_only=True`` said, not defaulted."""

    def load_common(self, checkpoint_dir: str | Path) -> Any:
        """Returns the plain values."""
        return torch.load(Path(checkpoint_dir) / COMMON_STATE_FNAME, map_location="cpu", weights_only=True)


def write_common(common: dict[str, Any], directory: Path) -> None:
    """Writes plain values to ``common.pt`` and checks that they can be read back with ``weights_only=True``."""
    buffer = io.BytesIO()
    torch.save(common, buffer)
    buffer.seek(0)
    torch.load(buffer, weights_only=True)
    (directory / COMMON_STATE_FNAME).write_bytes(buffer.getbuffer())


class _Writer(dcp.FileSystemWriter):
    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        try:
            return super().write_data(plan, planner)
        except Exception as error:
            # torch reports a full disk as a failed assertion of its zip writer; the system's error lies beneath.
            cause: BaseException | None = error
            while cause is not None and not isinstance(cause, OSError):
                cause = cause.__cause__ or cause.__context__
            if cause is None:
                raise
            raise cause from None


def write_sharded(sharded: Any, directory: Path) -> None:
    """Writes sharded tensors and objects, one file a rank, synced to disk; collective over the default group.

    Raises:
        CheckpointException: On every rank, if any rank failed; its ``failures`` has (exception, traceback) by rank.
    """
    flat, _, _ = _replace_state_dict_keys_with_sharded_keys(sharded, keep_only_main_replica=True)
    dcp.save(
        mcore_to_pyt_state_dict(flat),
        storage_writer=_Writer(directory, single_file_per_rank=True, sync_files=True, thread_count=1),
        planner=MCoreSavePlanner(dedup_replicated_tensors=False, flatten_state_dict=False),
    )
