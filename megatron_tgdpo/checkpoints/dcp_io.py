"""Reads the metadata of ``torch_dist`` files without trusting pickles, and writes the files in this process.

The files are those of ``megatron.core.dist_checkpointing``; two things differ from its default strategies:

- Writing happens in this process. megatron-core forks writers and starts a manager process, which needs psutil and a
  ``__main__`` guard; its asynchronous strategy writes the same files and can take this one's place on GPUs.
- Reading never unpickles freely. megatron-core 0.16 reads ``.metadata`` with ``pickle.load`` and sharded objects with
  ``torch.load(weights_only=False)``, either of which runs code that a prepared file holds. Here the metadata goes
  through an unpickler that knows only the classes of the format, and is checked before it is used; everything else goes
  through ``weights_only=True``.

Nothing here imports megatron-core; its own load and save are joined to this in ``checkpoints/load.py``.
"""

import hashlib
import io
import math
import os
import pickle
import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.filesystem import FileSystem, _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadPlan, LoadPlanner, SavePlan, SavePlanner
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future

from megatron_tgdpo.checkpoints.manifest import COMMON_FILE, TENSORS_FILE, TENSORS_SUFFIX
from megatron_tgdpo.errors import one_line
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
_MOST_FIELDS = 64
_LONGEST_PATH = 4096
# Of pickle, what no version of torch writes into metadata; some of it takes memory that the file's size does not bound.
_OPCODES_LEFT_OUT = (
    "BYTEARRAY8", "NEXT_BUFFER", "READONLY_BUFFER", "EMPTY_SET", "ADDITEMS", "FROZENSET", "DICT", "LIST", "OBJ", "INST",
    "NEWOBJ_EX", "EXT1", "EXT2", "EXT4", "DUP", "LONG", "LONG4", "PERSID", "BINPERSID",
)  # fmt: skip
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


# Typeshed knows nothing of what it has beside the one in C.
_PythonUnpickler: Any = pickle._Unpickler


class _MetadataUnpickler(_PythonUnpickler):  # type: ignore[misc]
    """Makes nothing but the classes of the format, in memory of the file's order of size and in time linear in it.

    The one in Python, as C's allocates what an index of its memo asks for. Left out is also what has no place here and
    could take for ever: keys that hash as slowly, or as much alike, as their author likes (tuples that hold one another
    twice, multiples of 2^61 - 1), and copies of one large object into thousands of others.
    """

    dispatch: dict[int, Any] = {**_PythonUnpickler.dispatch}  # noqa: RUF012 (as the parent has it)
    for _name in _OPCODES_LEFT_OUT:
        del dispatch[getattr(pickle, _name)[0]]

    def find_class(self, module: str, name: str) -> Any:
        module = _OTHER_NAMES.get(module, module)
        if module == "pathlib" and name in _METADATA_CLASSES[module]:
            # Not the class, which a prepared file could change for this whole process.
            return _joined_path
        if name in _METADATA_CLASSES.get(module, ()):
            found = super().find_class(module, name)
            if not isinstance(found, type):
                return lambda *values: found(*values)
            return _TensorProperties if found is TensorProperties else found
        if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            return getattr(torch, name)
        raise pickle.UnpicklingError(f"{module}.{name} does not belong into checkpoint metadata")

    def load_reduce(self) -> None:
        _check_small(self.stack[-1], *self.stack[-1])
        super().load_reduce()

    def load_build(self) -> None:
        state = self.stack[-1]
        _check_small(*(state if type(state) is tuple else (state,)))
        super().load_build()

    def load_setitem(self) -> None:
        _check_keys(self.stack[-2:-1])
        super().load_setitem()

    def load_setitems(self) -> None:
        _check_keys(self.stack[::2])
        super().load_setitems()

    for _name in ("reduce", "build", "setitem", "setitems"):
        dispatch[getattr(pickle, _name.upper())[0]] = vars()[f"load_{_name}"]
    del _name


def _joined_path(*parts: str) -> str:
    if sum(map(len, parts)) > _LONGEST_PATH:
        raise pickle.UnpicklingError("it has a path longer than paths can be")
    return "/".join(parts)


def _check_small(*values: Any) -> None:
    """Refuses large containers where the unpickler would copy them."""
    if any(type(value) in (tuple, list, dict) and len(value) > _MOST_FIELDS for value in values):
        raise pickle.UnpicklingError("an object in it has more fields than any of checkpoint metadata")


def _check_keys(keys: Sequence[Any]) -> None:
    """Refuses keys of dicts that are neither names nor places of parts of tensors."""
    for key in keys:
        if type(key) is MetadataIndex:
            parts = vars(key)
            named = type(parts.get("fqn")) is str and (parts.get("index") is None or _is_count(parts["index"]))
            if named and (parts.get("offset") is None or _is_size(parts["offset"])):
                continue
        elif type(key) is str:
            continue
        raise pickle.UnpicklingError(f"it has a key of type {type(key).__name__} that is no key of checkpoint metadata")


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value < 1 << 48


def _is_size(value: Any) -> bool:
    return type(value) is torch.Size and len(value) <= _MOST_FIELDS and all(map(_is_count, value))


def _check_metadata(metadata: Any) -> None:
    """Checks the types of all that is read of metadata, and that its tensors are no larger than what is stored of them.

    Raises:
        UnpicklingError: Something is of another type, or does not add up.
    """
    if type(metadata) is not Metadata or not all(
        type(vars(metadata).get(name)) is dict for name in ("state_dict_metadata", "storage_data")
    ):
        raise pickle.UnpicklingError("it is no checkpoint metadata")
    stored: Counter[str] = Counter()
    for index, info in metadata.storage_data.items():
        file = getattr(info, "relative_path", None)
        if not (type(index) is MetadataIndex and type(info) is _StorageInfo and isinstance(file, str)):
            raise pickle.UnpicklingError(f"a place in it is a {type(info).__name__}")
        if os.path.basename(file) != file or file in ("", ".", "..") or not file.isprintable():
            raise pickle.UnpicklingError(f"{file} leads out of the checkpoint")
        if not (_is_count(info.offset) and _is_count(info.length)) or getattr(info, "transform_descriptors", None):
            raise pickle.UnpicklingError(f"{index.fqn} is not stored as checkpoints of this project store it")
        stored[index.fqn] += info.length
    for key, tensor in metadata.state_dict_metadata.items():
        if type(key) is str and isinstance(tensor, BytesStorageMetadata):
            continue
        if type(key) is not str or isinstance(tensor, BytesStorageMetadata) or not _is_tensor(tensor):
            raise pickle.UnpicklingError(f"{key if type(key) is str else 'a key'} is described by no tensor's metadata")
        elements = sum(_elements(chunk.sizes) for chunk in tensor.chunks)
        if elements < _elements(tensor.size):
            raise pickle.UnpicklingError(f"parts of {key} are missing")
        if elements * tensor.properties.dtype.itemsize > stored[key]:
            raise pickle.UnpicklingError(f"{key} is larger than what is stored of it")


def _elements(size: torch.Size) -> int:
    # torch's own count overflows.
    return math.prod(int(length) for length in size)


def _is_tensor(tensor: Any) -> bool:
    """Whether metadata of a tensor has the types that it should, and parts that lie in it."""
    if type(tensor) is not TensorStorageMetadata or not {"size", "properties", "chunks"} <= vars(tensor).keys():
        return False
    size, chunks, properties = tensor.size, tensor.chunks, tensor.properties
    return (
        _is_size(size)
        and isinstance(properties, TensorProperties)
        and isinstance(vars(properties).get("dtype"), torch.dtype)
        and type(chunks) is list
        and all(type(chunk) is ChunkStorageMetadata and _is_chunk(vars(chunk), size) for chunk in chunks)
    )


def _is_chunk(chunk: Mapping[str, Any], size: torch.Size) -> bool:
    offsets, sizes = chunk.get("offsets", ()), chunk.get("sizes", ())
    if not (_is_size(offsets) and _is_size(sizes)):
        return False
    return len(offsets) == len(sizes) == len(size) and all(
        o + n <= s for o, n, s in zip(offsets, sizes, size, strict=True)
    )


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
            # Whole, so that a length in it that the file has not is not allocated.
            content = io.BytesIO((Path(self.path) / TENSORS_FILE).read_bytes())
            try:
                with _unchanged_classes():
                    metadata = _MetadataUnpickler(content).load()
                _check_metadata(metadata)
            except (pickle.UnpicklingError, MemoryError):
                raise
            except Exception as error:  # of any type, for what is no pickle
                raise pickle.UnpicklingError(f"{TENSORS_FILE} cannot be read: {one_line(error, named=True)}") from error
            if type(getattr(metadata, "storage_meta", None)) is not StorageMeta:
                metadata.storage_meta = StorageMeta()
            self._metadata = metadata
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


def written(results: list[WriteResult]) -> Future[list[WriteResult]]:
    """What a writer answers that has written already."""
    done: Future[list[WriteResult]] = Future()
    done.set_result(results)
    return done


class Writer(dcp.FileSystemWriter):
    """DCP's writer of one synced file for each rank that has something to write; a full disk is reported as it is.

    Attributes:
        digests: Size and sha256 of this rank's files, taken from what was handed to the system, by name.
    """

    def __init__(self, directory: Path) -> None:
        super().__init__(directory, single_file_per_rank=True, sync_files=True, thread_count=1)
        self.digests: dict[str, FileDigest] = {}
        self.fs = _HashingFileSystem(self.digests)

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        if not plan.items:
            # DCP makes an empty file, which nothing refers to.
            return written([])
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
