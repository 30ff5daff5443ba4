"""Keeps two runs out of one output directory, by a file that says who is in it and changes while he is.

No lock of the file system: not all shared ones have them, and one that a lost node held could stay. No clock either,
since those of two nodes differ: a file that does not change while it is watched belongs to nobody any more.
"""

import contextlib
import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import psutil

from megatron_tgdpo.errors import UserError
from megatron_tgdpo.signals import FAILED_STATUS, last_words
from megatron_tgdpo.storage.atomic_file import replacing
from megatron_tgdpo.storage.files import write_error
from megatron_tgdpo.storage.json_text import parse_json

LOCK_FILE = "running.json"
_INTERVAL = 5.0
# Shared file systems may show a change seconds late.
_WATCHED_INTERVALS = 4


class RunLock:
    """Held by a run's first rank from :meth:`acquire` to :meth:`release`; a killed one's is free at its next start.

    Where two acquire it at one moment, the last to write has it, and the other's process ends.

    Args:
        output_dir: The run's directory.
        interval: Seconds between two changes of the file.
        env: Where Slurm says which job this is; ``os.environ`` by default.
        name: Of the file; another one for what starts runs in the directory itself.
    """

    def __init__(
        self,
        output_dir: Path,
        interval: float = _INTERVAL,
        env: Mapping[str, str] | None = None,
        name: str = LOCK_FILE,
    ) -> None:
        self._file = output_dir / name
        self._interval = interval
        env = os.environ if env is None else env
        self._owner = {
            "id": uuid.uuid4().hex,
            "host": _host(),
            "pid": os.getpid(),
            "job": env.get("SLURM_JOB_ID"),
            "restart": env.get("SLURM_RESTART_COUNT", "0"),
        }
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="run lock", daemon=True)

    def acquire(self) -> None:
        """Makes or takes the directory; waits some intervals where the last run there may still be alive.

        Raises:
            UserError: It is, or the directory cannot be written; a StorageError where that may pass.
        """
        owner = self._read()
        ended = owner is not None and self._has_ended(owner)
        if not ended and self._state() is not None and self._changes():
            raise UserError(
                f"{self._file.parent}: {_describe(self._read())} is writing to it: wait for its end, stop it, or "
                "choose another output_dir"
            )
        try:
            self._file.parent.mkdir(parents=True, exist_ok=True)
            self._write(0)
        except OSError as error:
            raise write_error(self._file.parent, error) from error
        self._thread.start()

    def release(self) -> None:
        """Gives the directory back; nothing where it was not taken."""
        if self._thread.ident is None:
            return
        self._stop.set()
        self._thread.join()
        if self._is_mine():
            self._file.unlink(missing_ok=True)

    def _has_ended(self, owner: dict[str, Any]) -> bool:
        """Whether it is certain without watching: an earlier start of this job, or a process that is gone."""
        job, restart = self._owner["job"], self._owner["restart"]
        if job is not None and owner.get("job") == job and owner.get("restart") != restart:
            return True
        return owner.get("host") == self._owner["host"] and not psutil.pid_exists(int(owner.get("pid", 0)))

    def _changes(self) -> bool:
        before = self._state()
        for _ in range(_WATCHED_INTERVALS):
            time.sleep(self._interval)
            if self._state() not in (None, before):
                return True
        return False

    def _beat(self) -> None:
        count = 0
        while not self._stop.wait(self._interval):
            count += 1
            if not self._is_mine():
                owner = self._read() or {}
                place = f"process {owner.get('pid')} on {owner.get('host')}"
                last_words(f"{self._file.parent}: taken over by {place}: this run ends")
                os._exit(FAILED_STATUS)
            try:
                self._write(count)
            except OSError:
                # A full disk is for the checkpoints to tell; a new time needs no room on it.
                with contextlib.suppress(OSError):
                    os.utime(self._file)

    def _is_mine(self) -> bool:
        """Unless somebody else's name is in it; it may also be gone, or not readable at this moment."""
        owner = self._read()
        return owner is None or owner.get("id") == self._owner["id"]

    def _write(self, count: int) -> None:
        # Whoever reads it finds a whole name, whenever this process ends. Not synced: that may take longer than others
        # watch, and a machine that went down writes nothing.
        with replacing(self._file, synced=False) as temporary:
            temporary.write_text(json.dumps({**self._owner, "beat": count}) + "\n", encoding="utf-8")

    def _read(self) -> dict[str, Any] | None:
        try:
            owner = parse_json((self._state() or (b"", 0))[0])
        except ValueError:
            return None
        return owner if isinstance(owner, dict) else None

    def _state(self) -> tuple[bytes, int] | None:
        """The file's content and time, one of which every beat changes; None where it cannot be read."""
        try:
            with self._file.open("rb") as file:
                return file.read(), os.fstat(file.fileno()).st_mtime_ns
        except OSError:
            return None


def _describe(owner: dict[str, Any] | None) -> str:
    if owner is None:
        return "another process"
    job = f" of job {owner['job']}" if owner.get("job") else ""
    return f"process {owner.get('pid')}{job} on {str(owner.get('host')).split()[0]}"


def _host() -> str:
    """Names the machine, and the container where process numbers are its own."""
    with contextlib.suppress(OSError):
        return f"{socket.gethostname()} {os.readlink('/proc/self/ns/pid')}"
    return socket.gethostname()
