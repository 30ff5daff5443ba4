"""Writes a safetensors file piece by piece: the library writes only what is in memory whole.

The format: 8 bytes of header length (little-endian), a JSON header padded with spaces, then the tensors' bytes.
"""

import json
import math
import os
import struct
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import TypeVar

import torch
from torch import Tensor

from megatron_tgdpo.storage.dtypes import SAFETENSORS_DTYPES, dtype_name
from megatron_tgdpo.storage.files import start_writeback
from megatron_tgdpo.storage.tensor_files import bytes_of

_ALIGNMENT = 8

T = TypeVar("T")


class SafetensorsFile:
    """A new file of tensors whose names, shapes and dtype are known before their content.

    A context manager: leaving it syncs and closes the file.

    Args:
        path: The file, which must not exist.
        shapes: Shape by name; the tensors lie in this order.
        dtype: Of them: bf16, fp16 or fp32.
        fp32: Names of those that are in fp32 all the same.

    Attributes:
        path: As given.
        size: Of the whole file, in bytes.

    Raises:
        OSError: It cannot be made.
    """

    def __init__(
        self, path: Path, shapes: Mapping[str, Sequence[int]], dtype: torch.dtype, fp32: Collection[str] = ()
    ) -> None:
        self.path = path
        self._stream = path.open("xb")
        self._dtypes = {name: torch.float32 if name in fp32 else dtype for name in shapes}
        self._shapes = {name: tuple(shape) for name, shape in shapes.items()}
        self._starts: dict[str, int] = {}
        header: dict[str, object] = {"__metadata__": {"format": "pt"}}
        position, in_header = 0, {kind: dtype_name(kind, SAFETENSORS_DTYPES) for kind in {*self._dtypes.values()}}
        for name, shape in self._shapes.items():
            own = self._dtypes[name]
            end = position + math.prod(shape) * own.itemsize
            header[name] = {"dtype": in_header[own], "shape": list(shape), "data_offsets": [position, end]}
            self._starts[name] = position
            position = end
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % _ALIGNMENT)
        self._data = self._stream.write(struct.pack("<Q", len(text)) + text)
        self.size = self._data + position

    def __enter__(self: T) -> T:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        with self._stream:
            if kind is None:
                self._stream.flush()
                os.fsync(self._stream.fileno())

    def write_rows(self, name: str, first: int, rows: Tensor) -> None:
        """Writes a tensor's rows from ``first`` on, in the order in which they lie in the file.

        Args:
            name: The tensor.
            first: Its first row that is written.
            rows: On the CPU, of the tensor's dtype.

        Raises:
            OSError: The disk is full, or anything else.
        """
        shape = self._shapes[name]
        if rows.dtype != self._dtypes[name] or tuple(rows.shape[1:]) != shape[1:] or first + rows.shape[0] > shape[0]:
            raise ValueError(f"{name}: rows {list(rows.shape)} of {rows.dtype} at {first} do not fit {list(shape)}")
        place = self._data + self._starts[name] + first * math.prod(shape[1:]) * rows.dtype.itemsize
        if place != self._stream.tell():
            raise ValueError(f"{name}: row {first} is not what comes next in {self.path}")
        self._stream.write(bytes_of(rows.contiguous()))
        start_writeback(self._stream.fileno(), place, rows.nbytes)
