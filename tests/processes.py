"""Training ranks as plain processes, without a launcher that would end the others when one ends."""

import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.launch import ROOT, environment


@contextmanager
def started_ranks(arguments: list[str], count: int, logs: Path) -> Iterator[list[subprocess.Popen]]:
    """Starts ``count`` ranks of ``megatron_tgdpo.train``, whose output goes to ``logs/N.log``; kills what is left."""
    logs.mkdir(parents=True, exist_ok=True)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    ranks = []
    for rank in range(count):
        place = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(count)}
        with open(logs / f"{rank}.log", "ab") as log:
            ranks.append(
                subprocess.Popen(
                    [sys.executable, "-m", "megatron_tgdpo.train", *arguments],
                    cwd=ROOT,
                    env={**environment(), **place, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)},
                    stdout=log,
                    stderr=subprocess.STDOUT,
                )
            )
    try:
        yield ranks
    finally:
        for process in ranks:
            if process.poll() is None:
                os.kill(process.pid, 9)
            process.wait()
