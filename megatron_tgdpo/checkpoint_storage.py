"""Reads the metadata of ``torch_dist`` files without trusting pickles, and writes the files in this process.

The files are those of ``megatron.core.dist_checkpointing``; two things differ from its default strategies:

- Writing happens in this process. megatron-core forks writers and starts a manager process, which needs psutil and a
  ``__main__`` guard; its asynchronous strategy writes the same files and can take this one's place on GPUs.
- Reading never unpickles freely. megatron-core 0.16 reads ``.metadata`` with ``pickle.load`` and sharded objects with
  ``torch.load(weights_only=False)``, either of which runs code that a prepared file holds. Here the metadata goes
  through an unpickler that knows only the classes of the format, and everything else through ``weights_only=True``.

Nothing here imports megatron-core; its own load and save are joined to this in ``checkpoint_strategies.py``.
"""

import io
import os
import pickle
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future

from megatron_tgdpo.checkpoint_directory import COMMON_FILE, TENSORS_FILE

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


class SafeReader(dcp.FileSystemReader):
    """DCP's reader with restricted, cached metadata; tensors are read by it with ``weights_only=True`` already."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self._metadata: Metadata | None = None

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        del args, kwargs
        if self._metadata is None:
            file = Path(self.path) / TENSORS_FILE
            with file.open("rb") as stream:
                self._metadata = _MetadataUnpickler(stream).load()
            if getattr(self._metadata, "storage_meta", None) is None:
                self._metadata.storage_meta = StorageMeta()
            for info in self._metadata.storage_data.values():
                if os.path.basename(info.relative_path) != info.relative_path:
                    raise pickle.UnpicklingError(f"{info.relative_path} leads out of the checkpoint")
        return self._metadata


def serialise_common(common: dict[str, Any]) -> bytes:
    """Plain values as the content of ``common.pt``, checked to be readable with ``weights_only=True``."""
    buffer = io.BytesIO()
    torch.save(common, buffer)
    buffer.seek(0)
    torch.load(buffer, weights_only=True)
    return buffer.getvalue()


def write_common(common: bytes, directory: Path) -> None:
    """Writes ``common.pt``."""
    (directory / COMMON_FILE).write_bytes(common)


class Writer(dcp.FileSystemWriter):
    """DCP's writer of one synced file a rank, which reports a full disk as the system does."""

    def __init__(self, directory: Path) -> None:
        super().__init__(directory, single_file_per_rank=True, sync_files=True, thread_count=1)

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        with system_errors():
            return super().write_data(plan, planner)


@contextmanager
def system_errors() -> Iterator[None]:
    """Brings up the system's error from beneath torch's, which reports a full disk as a failed assertion."""
    try:
        yield
    except Exception as error:
        cause: BaseException | None = error
        while cause is not None and not isinstance(cause, OSError):
            cause = cause.__cause__ or cause.__context__
        if cause is None:
            raise
        raise cause from None
