"""``megatron_tgdpo.train`` on storage that fails: ``worker_io FAULTS.json CONFIG.yaml section.key=value ...``

Faults are injected where Python asks the system for something under ``checkpoints/``: opening, renaming, removing,
making and listing, and every write, sync and read of tensors.
"""

import json
import os
import sys
import threading
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_tgdpo.checkpoints import dcp_io
from megatron_tgdpo.train import main

EVENTS = ("open", "os.rename", "os.remove", "os.mkdir", "os.scandir", "os.rmdir")


@dataclass
class Faults:
    """Makes some calls of one rank fail.

    Attributes:
        rank: Whose.
        phase: ``save`` for those of the thread that writes checkpoints, ``load`` for all others.
        first: Number of the first call that fails, from 0.
        count: How many fail in a row.
        errno: With what.
        log: A line is written here for each.
    """

    rank: int
    phase: str
    first: int
    count: int
    errno: int
    log: str
    calls: int = field(default=0, init=False)

    def strike(self, what: str, path: object) -> None:
        """Counts a call; fails if it is its turn."""
        if not isinstance(path, (str, os.PathLike)) or "/checkpoints" not in os.fspath(path):
            return
        saves = threading.current_thread().name.startswith("checkpoint")
        if os.environ.get("RANK") != str(self.rank) or saves != (self.phase == "save"):
            return
        number, self.calls = self.calls, self.calls + 1
        if self.first <= number < self.first + self.count:
            text = f"rank {self.rank}, {self.phase}, call {number}: {what} {os.fspath(path)}: {os.strerror(self.errno)}"
            with open(self.log, "a", encoding="utf-8") as file:
                file.write(text + "\n")
            raise OSError(self.errno, os.strerror(self.errno), os.fspath(path))

    def install(self) -> None:
        """From now on."""
        sys.addaudithook(lambda event, arguments: self.strike(event, arguments[0]) if event in EVENTS else None)
        fsync, write, read = os.fsync, dcp_io.HashingStream.write, dcp_io._NotingFile.readinto

        def faulty_fsync(descriptor: int) -> None:
            self.strike("fsync", os.readlink(f"/proc/self/fd/{descriptor}"))
            fsync(descriptor)

        def faulty_write(stream: Any, data: Any) -> int:
            self.strike("write", stream._stream.name)
            return write(stream, data)

        def faulty_read(stream: Any, buffer: Any) -> int | None:
            try:
                self.strike("read", stream.name)
            except OSError as error:
                stream.failure = error
                raise
            return read(stream, buffer)

        os.fsync = faulty_fsync
        dcp_io.HashingStream.write = faulty_write  # type: ignore[method-assign]
        dcp_io._NotingFile.readinto = faulty_read  # type: ignore[method-assign]


if __name__ == "__main__":
    Faults(**json.loads(Path(sys.argv[1]).read_text())).install()
    main(sys.argv[2:])
