"""Reads rows of single tensors of a Megatron checkpoint, in this process alone and without megatron-core."""

import math
import pickle
import struct
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import IO, cast

import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorStorageMetadata
from torch.distributed.checkpoint.planner import ReadItem
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

from megatron_tgdpo.checkpoints.dcp_io import SafeReader
from megatron_tgdpo.checkpoints.manifest import check_files
from megatron_tgdpo.errors import UserError
from megatron_tgdpo.storage.atomic_directory import load_error
from megatron_tgdpo.storage.files import FilePart
from megatron_tgdpo.storage.tensor_files import FileReader

_BLOCK_BYTES = 16 << 20
# A zip entry's local header: 26 bytes, then the lengths of its name and its extra field.
_LOCAL_HEADER = struct.Struct("<26x2H")


class CheckpointReader:
    """The tensors of a checkpoint, of training too; nothing but metadata is read until rows are asked for.

    Rows come straight from where they lie in the files, so that memory holds little more than them even where a saved
    part of the tensor is much larger. For one thread at a time.

    Args:
        path: The checkpoint.

    Attributes:
        path: As given.
        tensors: Size, dtype and saved parts of each, by megatron-core's name.

    Raises:
        UserError: The checkpoint is incomplete, or its metadata cannot be understood.
        StorageError: It cannot be read.
    """

    def __init__(self, path: Path) -> None:
        check_files(path)
        self.path = path
        self._files = FileReader(path)
        self._places: dict[MetadataIndex, tuple[str, int]] = {}
        self._parts: dict[tuple[str, int], dict[tuple[int, ...] | None, list[ChunkStorageMetadata]]] = {}
        with self._errors():
            metadata = SafeReader(path).read_metadata()
        self._storage = metadata.storage_data
        self.tensors: dict[str, TensorStorageMetadata] = {
            key: info for key, info in metadata.state_dict_metadata.items() if isinstance(info, TensorStorageMetadata)
        }

    def rows(self, key: str, index: int | tuple[int, ...] | None, start: int, end: int) -> Tensor:
        """Rows [start, end) of a tensor, in the stored dtype.

        Args:
            key: The tensor's name.
            index: On the tensor's first axis, or axes, which the result has not: the layer, or layer and expert; None
                to take rows of the first axis itself.
            start: First row.
            end: Last row + 1.

        Raises:
            UserError: The files lack a part of it, or are damaged.
        """
        info, lead = self.tensors[key], (index,) if isinstance(index, int) else index or ()
        shape = (end - start, *info.size[len(lead) + 1 :])
        offsets = torch.Size((*lead, start, *(0 for _ in shape[1:])))
        wanted = ChunkStorageMetadata(offsets, torch.Size((*(1 for _ in lead), *shape)))
        target = torch.empty(wanted.sizes, dtype=info.properties.dtype)
        with self._errors():
            parts = self._parts_at(key, tuple(lead))
            items = create_read_items_for_chunk_list(key, replace(info, chunks=parts), [wanted])
            if sum(math.prod(item.lengths) for item in items) != target.numel():
                raise UserError(f"{self.path}: parts of {key} are missing")
            for item in items:
                assert item.storage_index.index is not None
                self._copy(item, parts[item.storage_index.index], target)
        return target.view(shape)

    def _parts_at(self, key: str, lead: tuple[int, ...]) -> list[ChunkStorageMetadata]:
        """The saved parts that may hold what is at ``lead`` of the first axes.

        A tensor of experts has parts by the ten thousand, and is asked for as often: none of these may look at all.
        """
        if (key, len(lead)) not in self._parts:
            by_place = self._parts[key, len(lead)] = {}
            for chunk in self.tensors[key].chunks:
                alone = all(size == 1 for size in chunk.sizes[: len(lead)])
                place = tuple(chunk.offsets[: len(lead)]) if alone else None
                by_place.setdefault(place, []).append(chunk)
        by_place = self._parts[key, len(lead)]
        return by_place.get(lead, []) + by_place.get(None, [])

    def _copy(self, item: ReadItem, chunk: ChunkStorageMetadata, target: Tensor) -> None:
        """Fills the part of ``target`` that one saved part holds: whole rows of it, so they lie in one run."""
        name, place = self._place(item.storage_index, chunk, target.dtype)
        strides = [math.prod(chunk.sizes[axis + 1 :]) for axis in range(len(chunk.sizes))]
        place += target.element_size() * sum(o * s for o, s in zip(item.storage_offsets, strides, strict=True))
        for axis, (offset, length) in enumerate(zip(item.dest_offsets, item.lengths, strict=True)):
            target = target.narrow(axis, offset, length)
        if target.is_contiguous():
            self._files.read_into(target, name, place)
            return
        step = max(1, _BLOCK_BYTES // (target.shape[-1] * target.element_size()))
        for matrix in _matrices(target):
            for block in matrix.split(step):
                dense = torch.empty_like(block, memory_format=torch.contiguous_format)
                self._files.read_into(dense, name, place)
                block.copy_(dense)
                place += dense.nbytes

    def _place(self, index: MetadataIndex, chunk: ChunkStorageMetadata, dtype: torch.dtype) -> tuple[str, int]:
        """File and byte where the data of a saved part begin: it is a zip archive as ``torch.save`` writes it."""
        if index not in self._places:
            stored = self._storage[index]
            with (self.path / stored.relative_path).open("rb") as stream:
                view = FilePart(stream.fileno(), stored.offset, stored.length)
                try:
                    tensor = torch.load(cast(IO[bytes], view), map_location="meta", weights_only=True)
                except Exception:
                    if view.failure is not None:
                        raise view.failure from None
                    raise
                view.seek(0)
                with zipfile.ZipFile(view) as archive:
                    entry = next(entry for entry in archive.infolist() if entry.filename.endswith("/data/0"))
                view.seek(entry.header_offset)
                header = _LOCAL_HEADER.unpack(view.read(_LOCAL_HEADER.size))
            plain = entry.compress_type == zipfile.ZIP_STORED and tensor.is_contiguous() and not tensor.storage_offset()
            sound = tensor.dtype == dtype and tensor.shape == chunk.sizes
            if not (plain and sound and entry.file_size == tensor.nbytes):
                raise UserError(f"{self.path / stored.relative_path}: a part of {index.fqn} is not as .metadata says")
            start = stored.offset + entry.header_offset + _LOCAL_HEADER.size + sum(header)
            self._places[index] = stored.relative_path, start
        return self._places[index]

    @contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except UserError:
            raise
        except (
            pickle.UnpicklingError,
            zipfile.BadZipFile,
            struct.error,
            OSError,
            MemoryError,
            EOFError,
            LookupError,
            StopIteration,
            AttributeError,
            TypeError,
            ValueError,
            RuntimeError,
        ) as error:
            raise load_error(self.path, error) from error


def _matrices(tensor: Tensor) -> Iterator[Tensor]:
    """A tensor's last two axes, for every place on the others."""
    if tensor.dim() <= 2:
        yield tensor
    else:
        for part in tensor:
            yield from _matrices(part)
