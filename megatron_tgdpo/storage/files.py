"""Parts, digests and syncing of files, and what their errors mean."""

import contextlib
import errno
import hashlib
import io
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_tgdpo.errors import StorageError, UserError

_BLOCK_BYTES = 4 << 20
# What a wrong path or missing rights give; any other error is the storage's.
_WRONG_PATH = (FileNotFoundError, NotADirectoryError, IsADirectoryError, PermissionError)


class FilePart(io.RawIOBase):
    """A part of an open file as a file of its own, for reading.

    Args:
        descriptor: Of the open file; it stays open.
        start: The part's first byte.
        size: Its length; more than what the file has left is like a truncated file.

    Attributes:
        failure: The error of the last read that failed; readers on top of this one turn it into errors of their own.
    """

    failure: OSError | None = None

    def __init__(self, descriptor: int, start: int, size: int) -> None:
        super().__init__()
        self._descriptor, self._start, self._size, self._position = descriptor, start, size, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET, /) -> int:
        """Moves to a place in the part and returns it."""
        origin = {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self._size}[whence]
        if origin + offset < 0:
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        self._position = origin + offset
        return self._position

    def readinto(self, buffer: Any, /) -> int:
        """Reads up to the part's end into a buffer and returns the number of bytes."""
        view = memoryview(buffer).cast("B")[: max(self._size - self._position, 0)]
        try:
            count = os.preadv(self._descriptor, [view], self._start + self._position) if view else 0
        except OSError as error:
            self.failure = error
            raise
        self._position += count
        return count


@dataclass(frozen=True)
class FileDigest:
    """A file's size in bytes and sha256 (hex)."""

    size: int
    sha256: str


def file_digest(path: Path) -> FileDigest:
    """Reads a file whole.

    Raises:
        OSError: It cannot be read.
    """
    digest, size = hashlib.sha256(), 0
    with path.open("rb", buffering=0) as stream:
        block = bytearray(_BLOCK_BYTES)
        while count := stream.readinto(block):
            digest.update(memoryview(block)[:count])
            size += count
    return FileDigest(size, digest.hexdigest())


def read_error(path: Path | str, error: OSError | MemoryError) -> UserError:
    """What a failed read means: a wrong path, or storage (or memory) that fails and may work at the next start."""
    reason = error.strerror if isinstance(error, OSError) and error.strerror else type(error).__name__
    kind = UserError if isinstance(error, _WRONG_PATH) else StorageError
    return kind(f"{path}: cannot be read: {reason}")


def start_writeback(descriptor: int, offset: int, length: int) -> None:
    """Has the kernel store a part of a file without waiting for it, so that little is left for the final sync."""
    with contextlib.suppress(AttributeError, OSError):  # advice only: not every system takes it
        os.posix_fadvise(descriptor, offset, length, os.POSIX_FADV_DONTNEED)


def sync(path: Path) -> None:
    """Makes a file or a directory's entries survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_error(path: Path | str, error: OSError) -> UserError:
    """What a failed write means: a wrong place, or storage (a full disk) that may take it later."""
    kind = UserError if isinstance(error, (*_WRONG_PATH, FileExistsError)) else StorageError
    return kind(f"{path}: cannot be written: {error.strerror or error}")
