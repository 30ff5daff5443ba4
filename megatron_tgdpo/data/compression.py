"""Compressed files as streams of their content."""

import bz2
import gzip
import io
import zlib
from collections.abc import Callable
from typing import Any, BinaryIO

from megatron_tgdpo.errors import UserError, one_line
from megatron_tgdpo.storage.files import read_error

_BUFFER_BYTES = 1 << 20


def _zstd(file: BinaryIO) -> Any:
    import pyarrow

    return pyarrow.CompressedInputStream(pyarrow.PythonFile(file, mode="r"), "zstd")


# How each begins, and what opens it. Several members (as `cat a.gz b.gz` makes) are read one after another.
_OPEN: dict[str, tuple[bytes, Callable[[Any], Any]]] = {
    "gzip": (b"\x1f\x8b", lambda file: gzip.GzipFile(fileobj=file)),
    "bzip2": (b"BZh", bz2.BZ2File),
    "zstd": (b"\x28\xb5\x2f\xfd", _zstd),
}


def compression_of(file: BinaryIO) -> str | None:
    """``gzip``, ``bzip2`` or ``zstd`` by how a file begins, None if it is none of them; leaves it at its start."""
    file.seek(0)
    head = file.read(4)
    file.seek(0)
    return next((name for name, (start, _) in _OPEN.items() if head.startswith(start)), None)


def decompressed(path: str, file: "BinaryIO | CountedReads", compression: str) -> BinaryIO:
    """The content of a compressed file as a buffered stream.

    Reading it raises UserError where the file is damaged or truncated, and StorageError where it cannot be read.

    Args:
        path: the file's name, for errors.
        file: the file, at its start; it stays open.
        compression: what ``compression_of`` said.
    """
    return io.BufferedReader(_Content(path, _OPEN[compression][1](file), compression), _BUFFER_BYTES)


class CountedReads(io.RawIOBase):
    """A file that is read from its start to its end, with the number of bytes that were read of it so far."""

    def __init__(self, file: BinaryIO) -> None:
        super().__init__()
        self._file = file
        self.count = 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any, /) -> int:
        block = self._file.read(len(buffer))
        buffer[: len(block)] = block
        self.count += len(block)
        return len(block)


class _Content(io.RawIOBase):
    """Turns what a decompressor raises, which is of many types, into this project's errors."""

    def __init__(self, path: str, stream: Any, compression: str) -> None:
        super().__init__()
        self._path, self._stream, self._compression = path, stream, compression

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any, /) -> int:
        try:
            block = self._stream.read(len(buffer))
        except (OSError, EOFError, zlib.error) as error:
            if isinstance(error, OSError) and error.errno is not None:
                raise read_error(self._path, error) from error
            raise UserError(
                f"{self._path}: cannot be decompressed ({self._compression}): {one_line(error)}; is the file truncated?"
            ) from error
        buffer[: len(block)] = block
        return len(block)
