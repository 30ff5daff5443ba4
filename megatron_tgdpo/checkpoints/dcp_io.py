"""Reads the metadata of ``torch_dist`` files without trusting pickles, and writes the files in this process.

The files are those of ``megatron.core.dist_checkpointing``; two things differ from its default strategies:

- Writing happens in this process. megatron-core forks writers and starts a manager process, which needs psutil and a
  ``__main__`` guard; its asynchronous strategy writes the same files and can take this one's place on GPUs.
- Reading never unpickles freely. megatron-core 0.16 reads ``.metadata`` with ``pickle.load`` and sharded objects with
  ``torch.load(weights_only=False)``, either of which runs code that a prepared file holds. Here the metadata goes
  through an unpickler that knows only the classes of the format, and everything else through ``weights_only=True``.

Nothing here imports megatron-core; its own load and save are joined to this in ``checkpoints/load.py``.
"""

import hashlib
import io
import os
import pickle
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.filesystem import FileSystem
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta, TensorProperties, TensorStorageMetadata
from torch.distributed.checkpoint.planner import LoadPlan, LoadPlanner, SavePlan, SavePlanner
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future

from megatron_tgdpo.checkpoints.manifest import COMMON_FILE, TENSORS_FILE, TENSORS_SUFFIX
from megatron_tgdpo.storage.files import FileDigest

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
}
_DCP_MODULES = ("torch.distributed.checkpoint.metadata", "torch.distributed.checkpoint.filesystem")
_OTHER_NAMES = {"pathlib._local": "pathlib"}  # Python 3.13's, which no other version has
# The first of what describes a tensor; torch 2.15 adds strides, which an older one cannot read and nothing here needs.
_PROPERTIES = 5


class _TensorProperties(TensorProperties):
    """torch's own, read as any version of torch wrote them, and written as any version reads them."""

    def __setstate__(self, state: Any) -> None:
        super().__setstate__(state[:_PROPERTIES])
        self.__class__ = TensorProperties  # type: ignore[assignment]

    def __reduce__(self) -> tuple[Any, ...]:
        return TensorProperties, (), self.__getstate__()[:_PROPERTIES]  # type: ignore[attr-defined]


class _MetadataUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        module = _OTHER_NAMES.get(module, module)
        if module == "pathlib" and name in _METADATA_CLASSES[module]:
            # Not the class, which a prepared file could change for this whole process.
            return lambda *parts: "/".join(parts)
        if name in _METADATA_CLASSES.get(module, ()):
            found = super().find_class(module, name)
            if not isinstance(found, type):
                return lambda *values: found(*values)
            return _TensorProperties if found is TensorProperties else found
        if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            return getattr(torch, name)
        raise pickle.UnpicklingError(f"{module}.{name} does not belong into checkpoint metadata")


@contextmanager
def _unchanged_classes() -> Iterator[None]:
    """Puts back, and refuses, what a prepared file sets on the classes of the format instead of on objects of theirs.

    Raises:
        UnpicklingError: It did.
    """
    names = ((module, name) for module in _DCP_MODULES for name in _METADATA_CLASSES[module])
    classes = [_TensorProperties, *(getattr(sys.modules[module], name) for module, name in names)]
    before = [dict(vars(one)) for one in classes]
    changed = []
    try:
        yield
    finally:
        for one, attributes in zip(classes, before, strict=True):
            for name in [name for name, value in vars(one).items() if attributes.get(name) is not value]:
                changed.append(f"{one.__name__}.{name}")
                if name in attributes:
                    setattr(one, name, attributes[name])
                else:
                    delattr(one, name)
    if changed:
        raise pickle.UnpicklingError(f"it sets {changed[0]}, which is no metadata")


class SafeReader(dcp.FileSystemReader):
    """DCP's reader with restricted, cached metadata; tensors are read by it with ``weights_only=True`` already."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self._metadata: Metadata | None = None
        self._noting = self.fs = _NotingFileSystem()

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        del args, kwargs
        if self._metadata is None:
            file = Path(self.path) / TENSORS_FILE
            with file.open("rb") as stream, _unchanged_classes():
                self._metadata = _MetadataUnpickler(stream).load()
            if getattr(self._metadata, "storage_meta", None) is None:
                self._metadata.storage_meta = StorageMeta()
            for info in self._metadata.storage_data.values():
                if os.path.basename(info.relative_path) != info.relative_path or info.relative_path in ("", ".", ".."):
                    raise pickle.UnpicklingError(f"{info.relative_path} leads out of the checkpoint")
        return self._metadata

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        try:
            return super().read_data(plan, planner)
        except Exception:
            if self._noting.failure is not None:
                raise self._noting.failure from None
            raise


class _NotingFileSystem(FileSystem):
    """Keeps the error of a read that failed: torch's reader makes one of its own of it, of whatever type."""

    failure: OSError | None = None

    @contextmanager
    def create_stream(self, path: str | os.PathLike[str], mode: str) -> Iterator[Any]:
        if mode != "rb":
            raise ValueError(mode)
        raw = _NotingFile(path)
        try:
            with io.BufferedReader(raw) as stream:
                yield stream
        finally:
            self.failure = self.failure or raw.failure


class _NotingFile(io.FileIO):
    failure: OSError | None = None

    def readinto(self, buffer: Any, /) -> int | None:
        try:
            return super().readinto(buffer)
        except OSError as error:
            self.failure = error
            raise

    def readall(self) -> bytes:
        try:
            return super().readall()
        except OSError as error:
            self.failure = error
            raise


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
    """DCP's writer of one synced file a rank, which reports a full disk as the system does.

    Attributes:
        digests: Size and sha256 of this rank's files, taken from what was handed to the system, by name.
    """

    def __init__(self, directory: Path) -> None:
        super().__init__(directory, single_file_per_rank=True, sync_files=True, thread_count=1)
        self.digests: dict[str, FileDigest] = {}
        self.fs = _HashingFileSystem(self.digests)

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        with system_errors():
            return super().write_data(plan, planner)

    def storage_meta(self) -> StorageMeta:
        # Without the path, which is a temporary one, and of a class that differs between versions of Python.
        return StorageMeta(save_id=self.save_id)

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        for entry in metadata.state_dict_metadata.values():
            if isinstance(entry, TensorStorageMetadata):
                entry.properties.__class__ = _TensorProperties
        with system_errors():
            super().finish(metadata, results)


class _HashingFileSystem(FileSystem):
    def __init__(self, digests: dict[str, FileDigest]) -> None:
        self._digests = digests

    @contextmanager
    def create_stream(self, path: str | os.PathLike[str], mode: str) -> Iterator[Any]:
        with super().create_stream(path, mode) as stream:
            if mode != "wb" or not str(path).endswith(TENSORS_SUFFIX):
                yield stream
                return
            hashing = HashingStream(stream)
            yield hashing
            self._digests[Path(path).name] = hashing.digest


class HashingStream(io.RawIOBase):
    """Passes on what is written, first byte to last, and hashes it.

    Args:
        stream: Where it goes; not closed by this one.
    """

    def __init__(self, stream: Any) -> None:
        super().__init__()
        self._stream, self._sha256, self._size = stream, hashlib.sha256(), 0

    @property
    def digest(self) -> FileDigest:
        """Of what was written so far."""
        return FileDigest(self._size, self._sha256.hexdigest())

    def writable(self) -> bool:
        return True

    def write(self, data: Any, /) -> int:
        view = memoryview(data).cast("B")
        self._stream.write(view)
        self._sha256.update(view)
        self._size += len(view)
        return len(view)

    def tell(self) -> int:
        return self._size

    def flush(self) -> None:
        if not self._stream.closed:
            self._stream.flush()

    def fileno(self) -> int:
        self._stream.flush()
        result: int = self._stream.fileno()
        return result


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
