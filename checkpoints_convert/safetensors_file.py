"""Writes a safetensors file piece by piece: the library writes only what is in memory whole.

The format: 8 bytes of header length (little-endian), a JSON header padded with spaces, then the tensors' bytes.
"""

import json
import math
import struct
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from checkpoints_convert.sequential_file import SequentialFile
from megatron_tgdpo.storage.dtypes import SAFETENSORS_DTYPES, dtype_name
from megatron_tgdpo.storage.files import bytes_of

_ALIGNMENT = 8


class SafetensorsFile(SequentialFile):
    """A new file of tensors whose names, shapes and dtype are known before their content.

    Args:
        path: The file, which must not exist.
        shapes: Shape by name; the tensors lie in this order.
        dtype: Of all of them: bf16, fp16 or fp32.

    Attributes:
        size: Of the whole file, in bytes.

    Raises:
        OSError: It cannot be made.
    """

    def __init__(self, path: Path, shapes: Mapping[str, Sequence[int]], dtype: torch.dtype) -> None:
        super().__init__(path)
        self._dtype = dtype
        self._shapes = {name: tuple(shape) for name, shape in shapes.items()}
        self._starts: dict[str, int] = {}
        header: dict[str, object] = {"__metadata__": {"format": "pt"}}
        position, dtype_in_header = 0, dtype_name(dtype, SAFETENSORS_DTYPES)
        for name, shape in self._shapes.items():
            end = position + math.prod(shape) * dtype.itemsize
            header[name] = {"dtype": dtype_in_header, "shape": list(shape), "data_offsets": [position, end]}
            self._starts[name] = position
            position = end
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % _ALIGNMENT)
        self._data = self.write(struct.pack("<Q", len(text)) + text)
        self.size = self._data + position

    def write_rows(self, name: str, first: int, rows: Tensor) -> None:
        """Writes a tensor's rows from ``first`` on, in the order in which they lie in the file.

        Args:
            name: The tensor.
            first: Its first row that is written.
            rows: On the CPU, of the file's dtype.

        Raises:
            OSError: The disk is full, or anything else.
        """
        shape = self._shapes[name]
        if rows.dtype != self._dtype or tuple(rows.shape[1:]) != shape[1:] or first + rows.shape[0] > shape[0]:
            raise ValueError(f"{name}: rows {list(rows.shape)} of {rows.dtype} at {first} do not fit {list(shape)}")
        skipped = first * math.prod(shape[1:]) * self._dtype.itemsize
        if self._data + self._starts[name] + skipped != self.tell():
            raise ValueError(f"{name}: row {first} is not what comes next in {self.path}")
        self.write(bytes_of(rows.contiguous()))
