"""Writes a safetensors file piece by piece: the library writes only what is in memory whole.

The format: 8 bytes of header length (little-endian), a JSON header padded with spaces, then the tensors' bytes.
"""

import errno
import json
import math
import os
import struct
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType

import torch
from torch import Tensor

from megatron_tgdpo.files import write_at

_DTYPES = {torch.bfloat16: "BF16", torch.float16: "F16", torch.float32: "F32"}
_ALIGNMENT = 8


class SafetensorsFile:
    """A file of tensors whose names, shapes and dtype are known before their content.

    A context manager around :meth:`write`: it opens the file, and leaves it synced and closed.

    Args:
        path: The file.
        shapes: Shape by name; the tensors lie in this order.
        dtype: Of all of them: bf16, fp16 or fp32.

    Attributes:
        path: As given.
        size: Of the whole file, in bytes.
    """

    def __init__(self, path: Path, shapes: Mapping[str, Sequence[int]], dtype: torch.dtype) -> None:
        self.path = path
        self._dtype = dtype
        self._shapes = {name: tuple(shape) for name, shape in shapes.items()}
        self._starts: dict[str, int] = {}
        header: dict[str, object] = {"__metadata__": {"format": "pt"}}
        position = 0
        for name, shape in self._shapes.items():
            end = position + math.prod(shape) * dtype.itemsize
            header[name] = {"dtype": _DTYPES[dtype], "shape": list(shape), "data_offsets": [position, end]}
            self._starts[name] = position
            position = end
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % _ALIGNMENT)
        self._header = struct.pack("<Q", len(text)) + text
        self.size = len(self._header) + position
        self._descriptor = -1

    def create(self) -> None:
        """Makes the file with its header and takes the space for the rest, so that a full disk shows at once.

        Raises:
            OSError: The disk is full, or anything else.
        """
        with self.path.open("xb") as stream:
            stream.write(self._header)
            stream.flush()
            try:
                os.posix_fallocate(stream.fileno(), 0, self.size)
            except (AttributeError, OSError) as error:
                # Not every system and file system can; the others tell while the file is written.
                if getattr(error, "errno", errno.EOPNOTSUPP) not in (errno.EOPNOTSUPP, errno.EINVAL):
                    raise
                stream.truncate(self.size)

    def __enter__(self) -> "SafetensorsFile":
        self._descriptor = os.open(self.path, os.O_WRONLY)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                os.fsync(self._descriptor)
        finally:
            os.close(self._descriptor)

    def write(self, name: str, first: int, rows: Tensor) -> None:
        """Writes a tensor's rows from ``first`` on; they are on the CPU and have the file's dtype.

        Raises:
            OSError: The disk is full, or anything else.
        """
        shape = self._shapes[name]
        if rows.dtype != self._dtype or tuple(rows.shape[1:]) != shape[1:] or first + rows.shape[0] > shape[0]:
            raise ValueError(f"{name}: rows {list(rows.shape)} of {rows.dtype} at {first} do not fit {list(shape)}")
        skipped = first * math.prod(shape[1:]) * self._dtype.itemsize
        write_at(self._descriptor, rows.contiguous(), len(self._header) + self._starts[name] + skipped)
