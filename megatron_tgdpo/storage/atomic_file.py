"""Unfinished files and directories: each writer has a name of its own, by which what a killed one left is told.

    NAME.HOST-NAMESPACE-PID-START-RANDOM.tmp

NAMESPACE is the machine's number for the writer's set of process ids, since two containers of one host may both have a
process 7; START is when the process started, since there may be another 7 later. Clocks of two machines are not
compared; what one file system says of two of its files is.
"""

import contextlib
import os
import re
import secrets
import shutil
import socket
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil

from megatron_tgdpo.errors import UserError
from megatron_tgdpo.storage.files import sync, write_error

SUFFIX = ".tmp"
# Files that belong together share a name and have endings of their own behind it.
_NAME = re.compile(
    r"(?P<name>.+)\.(?P<host>\w+)-(?P<namespace>\d+)-(?P<pid>\d+)-(?P<start>\d+)-[0-9a-f]{8}\.tmp(?:\..+)?"
)
# Something of another machine that nobody wrote to for so long is nobody's.
_ABANDONED_SECONDS = 24 * 3600


def temporary_path(path: Path) -> Path:
    """A name beside ``path`` that no other writer has."""
    host, namespace = _here()
    process = f"{os.getpid()}-{_started(os.getpid())}"
    return path.with_name(f"{path.name}.{host}-{namespace}-{process}-{secrets.token_hex(4)}{SUFFIX}")


@contextlib.contextmanager
def replacing(path: Path, *, synced: bool = True) -> Iterator[Path]:
    """Yields the name of a file to write; it takes the place of ``path`` on leaving, whole or not at all.

    What killed writers of ``path`` left is removed.

    Args:
        path: The file.
        synced: Whether the new content must survive a power cut, which takes as long as the disk does.

    Raises:
        OSError: It cannot be written.
    """
    temporary = temporary_path(path)
    try:
        yield temporary
        if synced:
            sync(temporary)
        os.replace(temporary, path)
        if synced:
            sync(path.parent)
        remove_stale(path, path)
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def remove_stale(path: Path, written: Path) -> None:
    """Removes what writers of ``path`` left that are no more.

    Args:
        path: What they were writing.
        written: Something beside it that was written just before: the time by its file system.
    """
    for left in leftovers(path):
        # Another process may remove the same; what cannot be removed does no harm.
        with contextlib.suppress(OSError):
            if is_stale(left, written):
                shutil.rmtree(left) if left.is_dir() else left.unlink()


def refuse_live(path: Path) -> None:
    """Stops where another process of this machine is writing ``path`` at this moment.

    Raises:
        UserError: One is.
    """
    for left in leftovers(path):
        owner = _owner(left)
        if owner is not None and owner.pid != os.getpid() and owner.runs:
            raise UserError(f"{path}: process {owner.pid} is writing it ({left.name}): wait for its end, or stop it")


def leftovers(path: Path) -> list[Path]:
    """Unfinished files and directories of all writers of ``path``, dead or alive."""
    try:
        with os.scandir(path.parent) as entries:
            names = sorted(entry.name for entry in entries)
    except FileNotFoundError:
        return []
    matches = ((name, _NAME.fullmatch(name)) for name in names if name.startswith(f"{path.name}."))
    return [path.parent / name for name, match in matches if match and match["name"] == path.name]


def is_stale(left: Path, written: Path) -> bool:
    """Whether the writer of something unfinished is gone, for sure or as good as.

    Args:
        left: One of :func:`leftovers`.
        written: Something on the same file system that was written just before.

    Raises:
        OSError: One of them is not there any more.
    """
    owner = _owner(left)
    if owner is not None:
        return not owner.runs
    return written.stat().st_mtime - _last_write(left) > _ABANDONED_SECONDS


def _last_write(path: Path) -> float:
    inside = (Path(folder, name) for folder, folders, files in os.walk(path) for name in [*folders, *files])
    return max(file.lstat().st_mtime for file in [path, *inside])


@dataclass(frozen=True)
class _Owner:
    """A process of this machine that writes or wrote something."""

    pid: int
    start: int

    @property
    def runs(self) -> bool:
        return _started(self.pid) == self.start


def _owner(left: Path) -> _Owner | None:
    """Who wrote it, if he can be looked up here."""
    match = _NAME.fullmatch(left.name)
    if match is None or (match["host"], match["namespace"]) != _here():
        return None
    return _Owner(int(match["pid"]), int(match["start"]))


def _started(pid: int) -> int | None:
    """When a process started, on a clock of this machine that nobody sets; None if it is not there."""
    with contextlib.suppress(OSError):
        fields = Path(f"/proc/{pid}/stat").read_text(encoding="ascii", errors="replace")
        return int(fields.rpartition(")")[2].split()[19])  # the name, in brackets, may hold anything
    try:  # a system without /proc
        return int(psutil.Process(pid).create_time())
    except psutil.NoSuchProcess:
        return None


def _here() -> tuple[str, str]:
    """This machine and its set of process ids."""
    namespace = "0"
    with contextlib.suppress(OSError):
        namespace = re.sub(r"\D", "", os.readlink("/proc/self/ns/pid")) or "0"
    return re.sub(r"\W", "_", socket.gethostname())[:64], namespace


def write_atomically(path: Path, text: str) -> None:
    """Writes a file under a temporary name and renames it, so that it is there whole or not at all.

    Raises:
        UserError: It cannot be written; a StorageError where that may pass, as on a full disk.
    """
    try:
        with replacing(path) as temporary:
            temporary.write_text(text, encoding="utf-8")
    except OSError as error:
        raise write_error(path, error) from error
