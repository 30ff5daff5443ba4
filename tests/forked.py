"""Processes forked from one that has imported the heavy libraries already, so that a rank starts at once."""

import contextlib
import multiprocessing
import os
import runpy
import signal
import sys
from collections.abc import Mapping, Sequence
from io import TextIOWrapper
from pathlib import Path
from typing import cast

from tests.launch import ROOT, environment

# None of them starts a thread on import, which forking would lose.
_IMPORTED = [
    "megatron_tgdpo.resilience.heartbeat",
    "megatron_tgdpo.training.run",
    "checkpoints_convert.compare_outputs",
    "transformers.models.llama.modeling_llama",
    "pytest",
]
_SERVER = multiprocessing.get_context("forkserver")
_SERVER.set_forkserver_preload(_IMPORTED)


class Forked:
    """``python -m module`` in a process that is forked.

    Args:
        module: What to run as ``__main__``.
        arguments: Its command line.
        variables: Environment variables beside those of ``launch.environment``.
        stdout: File to append its standard output to; ranks may share one.
        stderr: The same for its standard error; may be the same file.
    """

    def __init__(
        self, module: str, arguments: Sequence[str], variables: Mapping[str, str], stdout: Path, stderr: Path
    ) -> None:
        places = {**environment(), **variables}
        self.process = _SERVER.Process(target=_run, args=(module, arguments, places, stdout, stderr))
        self.process.start()

    def poll(self) -> int | None:
        """Its exit status if it has ended; of a signal, minus its number."""
        return self.process.exitcode

    def wait(self, timeout: float | None = None) -> int:
        """Waits for its exit status.

        Raises:
            TimeoutError: It takes longer than ``timeout`` seconds.
        """
        self.process.join(timeout)
        status = self.process.exitcode
        if status is None:
            raise TimeoutError(f"process {self.process.pid} has not ended in {timeout} s")
        return status

    def send_signal(self, number: signal.Signals) -> None:
        assert self.process.pid is not None
        if self.poll() is None:
            # It may end in between.
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.process.pid, number)

    def kill(self) -> None:
        """Ends it for sure."""
        self.send_signal(signal.SIGKILL)
        self.process.join()


def _run(module: str, arguments: Sequence[str], variables: dict[str, str], stdout: Path, stderr: Path) -> None:
    import torch

    for number, file in ((1, stdout), (2, stderr)):
        descriptor = os.open(file, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        os.dup2(descriptor, number)
        os.close(descriptor)
    # The server's streams write a line and its end apart: a line of one rank must stay whole among those of others.
    for stream in (sys.stdout, sys.stderr):
        cast(TextIOWrapper, stream).reconfigure(line_buffering=True, write_through=False)
    os.environ.clear()
    os.environ.update(variables)
    os.chdir(ROOT)
    torch.set_num_threads(int(variables["OMP_NUM_THREADS"]))
    sys.argv = [module, *arguments]
    runpy.run_module(module, run_name="__main__", alter_sys=True)
