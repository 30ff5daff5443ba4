"""Reads and writes of large files past the page cache, where the file system can.

What is read or written once gains nothing from the cache. On the way through it every byte is copied into a page that
had to be found and emptied first; on virtual and on busy machines that takes longer than the disk does.
"""

import errno
import fcntl
import mmap
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np

from megatron_tgdpo.storage.files import FileReader

BUFFER_BYTES = 8 << 20
# Addresses, places and lengths must be multiples of it; no disk asks for a larger one.
ALIGNMENT = 4096
_DIRECT = getattr(os, "O_DIRECT", 0)


def open_direct(path: Path, flags: int) -> int:
    """Opens a file past the page cache, or through it where its file system has nothing else.

    Raises:
        OSError: It cannot be opened.
    """
    try:
        return os.open(path, flags | _DIRECT, 0o644)
    except OSError as error:
        if error.errno != errno.EINVAL or not _DIRECT:
            raise
    # It was made, but not opened.
    if flags & os.O_EXCL:
        path.unlink(missing_ok=True)
    return os.open(path, flags, 0o644)


def is_direct(descriptor: int) -> bool:
    """Whether a file is read and written past the page cache."""
    return bool(fcntl.fcntl(descriptor, fcntl.F_GETFL) & _DIRECT)


def attempt(descriptor: int, action: Callable[[], int]) -> int:
    """Reads or writes; through the page cache from then on, where that alone is possible.

    Args:
        descriptor: Of a file from :func:`open_direct`.
        action: Reads or writes it; called again after it was refused.

    Returns:
        The action's count of bytes.
    """
    try:
        return action()
    except OSError as error:
        if error.errno != errno.EINVAL or not is_direct(descriptor):
            raise
    fcntl.fcntl(descriptor, fcntl.F_SETFL, fcntl.fcntl(descriptor, fcntl.F_GETFL) & ~_DIRECT)
    return action()


def copy_bytes(target: memoryview, source: memoryview) -> None:
    """Copies bytes while other Python threads go on, which an assignment to a slice does not let them."""
    np.copyto(np.frombuffer(target, np.uint8), np.frombuffer(source, np.uint8))


class DirectReader(FileReader):
    """Reads at given places of the files of one directory, past the page cache; see ``FileReader``."""

    def __init__(self, directory: Path) -> None:
        super().__init__(directory)
        self._buffer = memoryview(mmap.mmap(-1, BUFFER_BYTES))

    def _open_file(self, path: Path) -> int:
        return open_direct(path, os.O_RDONLY)

    def _read(self, descriptor: int, view: memoryview, offset: int) -> int:
        skipped = offset % ALIGNMENT
        wanted = min(skipped + len(view), BUFFER_BYTES)
        window = self._buffer[: -(-wanted // ALIGNMENT) * ALIGNMENT]
        got = attempt(descriptor, lambda: os.preadv(descriptor, [window], offset - skipped))
        count = max(min(got, wanted) - skipped, 0)
        copy_bytes(view[:count], window[skipped : skipped + count])
        return count
