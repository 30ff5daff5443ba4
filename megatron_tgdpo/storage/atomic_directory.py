"""A directory that many ranks write and that appears whole, or not at all."""

import contextlib
import errno
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import TypeVar

import torch.distributed as dist
from torch.distributed.checkpoint.api import CheckpointException

from megatron_tgdpo.distributed.ranks import raise_on_all_ranks
from megatron_tgdpo.errors import StorageError, UserError, one_line
from megatron_tgdpo.storage.atomic_file import refuse_live, remove_stale, temporary_path
from megatron_tgdpo.storage.files import sync

# Says in a directory, by its name, that it is unfinished and whose it is.
_MARK = ".unfinished"

T = TypeVar("T")


class AtomicDirectory:
    """Context manager: what is written into ``temporary`` becomes ``path`` by :meth:`commit`, or is deleted.

    Entering and every method are collective, and raise the same error on every rank if they fail on any, so that no
    rank goes on to wait for one that failed.

    Args:
        path: The directory, on storage that all ranks share; it must not exist, or be empty.
        group: Of all ranks, for the collectives; None for the default group.

    Attributes:
        path: As given.
        group: As given.
        temporary: The directory to write into, of a name that no other writer has; made on entering. What a killed
            process leaves of it, the next writer of ``path`` removes.

    Raises:
        UserError: On entering: ``path`` is not empty or being written by another process of this machine, or
            ``temporary`` cannot be made.
    """

    def __init__(self, path: Path, group: dist.ProcessGroup | None = None) -> None:
        self.path = path
        self.group = group
        self.temporary = temporary_path(path)
        self._needed = 0

    def __enter__(self) -> "AtomicDirectory":
        name = [self.temporary]
        dist.broadcast_object_list(name, src=0, group=self.group)
        (self.temporary,) = name
        self.run_on_rank0(self._begin)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if kind is not None and dist.get_rank() == 0:
            shutil.rmtree(self.temporary, ignore_errors=True)

    def reserve(self, size: int) -> None:
        """Checks that ``size`` bytes are free; later errors say how many were needed.

        Raises:
            UserError: They are not.
        """
        self._needed = size
        self.run_on_rank0(self._check_space)

    def commit(self) -> None:
        """Syncs everything and renames ``temporary`` to ``path``.

        Raises:
            UserError: It could not be done; another process has made ``path`` meanwhile, or taken ``temporary`` away.
        """
        self.run_on_rank0(self._commit)

    def collect(self, found: Mapping[str, T]) -> dict[str, T]:
        """What all ranks have found, under names that differ; on every rank."""
        parts: list[Mapping[str, T]] = [{}] * dist.get_world_size()
        dist.all_gather_object(parts, found, group=self.group)
        return {name: value for part in parts for name, value in part.items()}

    def run_on_rank0(self, action: Callable[[], object]) -> None:
        """Runs a step on rank 0; see :meth:`run_on_all_ranks`."""
        self.run_on_all_ranks(action if dist.get_rank() == 0 else lambda: None)

    def run_on_all_ranks(self, action: Callable[[], T]) -> T:
        """Runs a step and has all ranks agree that it worked.

        Raises:
            UserError: It failed on some rank, with any error; a StorageError if that came from storage or memory.
        """

        def attempt() -> T:
            try:
                return action()
            except UserError:
                raise
            except (Exception, CheckpointException) as error:  # the latter derives from BaseException
                kind = StorageError if is_of_storage(error) else UserError
                raise kind(self._message(error)) from error

        return raise_on_all_ranks(attempt, self.group)

    def _begin(self) -> None:
        refuse_existing(self.path)
        refuse_live(self.path)
        self.temporary.mkdir(parents=True)
        (self.temporary / _MARK).write_text(self.temporary.name, encoding="utf-8")
        remove_stale(self.path, self.temporary)

    def _check_space(self) -> None:
        if shutil.disk_usage(self.path.parent).free < self._needed:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def _commit(self) -> None:
        for folder, _, names in os.walk(self.temporary):
            for name in names:
                sync(Path(folder, name))
            sync(Path(folder))
        if (self.temporary / _MARK).read_text(encoding="utf-8") != self.temporary.name:
            raise UserError(f"{self.temporary}: another process has written there: start again when it has ended")
        try:
            self.temporary.rename(self.path)  # an existing path is an empty directory, which this replaces
        except OSError:
            refuse_existing(self.path)  # another process was faster
            raise
        try:
            (self.path / _MARK).unlink()
            sync(self.path.parent)
        except OSError:
            # As if nothing had happened, so that the same can be tried again.
            self.path.rename(self.temporary)
            raise

    def _message(self, error: BaseException) -> str:
        text = f"{self.path}: saving failed, nothing was changed: {describe(error)}"
        if self._needed:
            with contextlib.suppress(OSError):
                free = shutil.disk_usage(self.path.parent).free
                text += f"; it needs {self._needed:,} bytes, {free:,} are free"
        return text


def refuse_existing(path: Path) -> None:
    """Stops early, before any work, where an output directory holds something.

    Raises:
        UserError: It does.
    """
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise UserError(f"{path}: exists and is not empty, delete it or choose another directory")


def load_error(path: Path, error: BaseException) -> UserError:
    """What to raise for an error while reading a checkpoint: one of its content, or of storage that may work later."""
    kind = StorageError if is_of_storage(error) else UserError
    return kind(f"{path}: cannot load: {describe(error)}")


def is_of_storage(error: BaseException) -> bool:
    """Whether beneath an error, DCP's of several ranks too, storage or memory has failed."""
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, CheckpointException):
            return any(is_of_storage(cause) for cause, _ in seen.failures.values())
        if isinstance(seen, (OSError, MemoryError, StorageError)):
            return not isinstance(seen, (FileNotFoundError, NotADirectoryError))
        seen = seen.__cause__ or seen.__context__
    return False


def describe(error: BaseException) -> str:
    """An error in one line, its type first; of DCP's collected failures the first one, named by its rank."""
    if isinstance(error, CheckpointException) and error.failures:
        rank, (cause, _) = min(error.failures.items())
        return f"rank {rank}: {describe(cause)}"
    if isinstance(error, UserError):
        return str(error)
    return one_line(error, named=True)
