"""Writes a large file from its first byte to its last, past the page cache: a conversion's output is not read soon."""

import hashlib
import mmap
import os
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

from megatron_tgdpo.storage.direct_io import ALIGNMENT, BUFFER_BYTES, attempt, copy_bytes, is_direct, open_direct
from megatron_tgdpo.storage.files import FileDigest, start_writeback

T = TypeVar("T")


class SequentialFile:
    """A new file and its two buffers, of which one is stored while the other is filled.

    A context manager: leaving it stores what is left, cuts the file to its length, syncs and closes it. Errors of the
    disk are raised by a later write, or on leaving. For one thread at a time.

    Args:
        path: The file, which must not exist.
        hashed: Whether its sha256 is wanted.

    Attributes:
        path: As given.

    Raises:
        OSError: It cannot be made.
    """

    def __init__(self, path: Path, *, hashed: bool = False) -> None:
        self.path = path
        self._sha256 = hashlib.sha256() if hashed else None
        self._descriptor = open_direct(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL)
        self._buffers = [mmap.mmap(-1, BUFFER_BYTES) for _ in range(2)]
        self._filled, self._stored = 0, 0
        self._thread = ThreadPoolExecutor(max_workers=1)
        self._storing: Future[None] | None = None

    def __enter__(self: T) -> T:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                self._finish()
        finally:
            self._thread.shutdown()
            os.close(self._descriptor)

    def tell(self) -> int:
        """Bytes written so far."""
        return self._stored + self._filled

    def write(self, data: Any) -> int:
        """Appends what is in a buffer, and returns its length in bytes.

        Raises:
            OSError: The disk is full, or anything else, now or a little before.
        """
        view = memoryview(data).cast("B")
        length = len(view)
        while view:
            count = min(len(view), BUFFER_BYTES - self._filled)
            copy_bytes(memoryview(self._buffers[0])[self._filled : self._filled + count], view[:count])
            self._filled, view = self._filled + count, view[count:]
            if self._filled == BUFFER_BYTES:
                self._store(BUFFER_BYTES)
        return length

    @property
    def digest(self) -> FileDigest:
        """Of the whole file; only after leaving, and if it was asked for."""
        assert self._sha256 is not None
        return FileDigest(self._stored, self._sha256.hexdigest())

    def flush(self) -> None:
        """Nothing: for writers that expect it of a file."""

    def _store(self, count: int) -> None:
        """Has the thread store the filled buffer's first bytes, and goes on with the other one."""
        self._wait()
        self._storing = self._thread.submit(self._keep, self._buffers[0], self._filled, count, self._stored)
        self._stored, self._filled = self._stored + self._filled, 0
        self._buffers.reverse()

    def _keep(self, buffer: mmap.mmap, filled: int, count: int, place: int) -> None:
        """Stores ``count`` bytes, of which ``filled`` are the file's and the rest is padding."""
        _write(self._descriptor, buffer, count, place)
        if self._sha256 is not None:
            with memoryview(buffer) as view:
                self._sha256.update(view[:filled])

    def _wait(self) -> None:
        if self._storing is not None:
            self._storing.result()

    def _finish(self) -> None:
        if self._filled:
            self._store(-(-self._filled // ALIGNMENT) * ALIGNMENT)
        self._wait()
        os.ftruncate(self._descriptor, self._stored)
        os.fsync(self._descriptor)


def _write(descriptor: int, buffer: mmap.mmap, count: int, place: int) -> None:
    done = 0
    with memoryview(buffer) as view:
        while done < count:
            rest, at = view[done:count], place + done
            done += attempt(descriptor, lambda rest=rest, at=at: os.pwrite(descriptor, rest, at))  # type: ignore[misc]
    if not is_direct(descriptor):
        start_writeback(descriptor, place, count)
