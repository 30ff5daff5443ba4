"""Runs commands of this project, several at a time, and only those whose results are not there yet.

Each runs in a process of its own, forked from one that has imported the heavy libraries: a command starts at once.
"""

import multiprocessing
import os
import runpy
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path

from megatron_tgdpo.errors import UserError
from megatron_tgdpo.resilience.launch import end_with_parent

# None of them starts a thread on import, which forking would lose.
_IMPORTED = [
    "megatron_tgdpo.resilience.heartbeat",
    "megatron_tgdpo.training.run",
    "checkpoints_convert.export",
    "tgdpo.generation.backends",
]


@dataclass(frozen=True)
class Command:
    """``python -m module arguments``.

    Attributes:
        module: Of this project.
        arguments: Its command line.
        result: What is there once it has succeeded, and not before.
    """

    module: str
    arguments: tuple[str, ...]
    result: Path

    def __str__(self) -> str:
        return " ".join(["python -m", self.module, *self.arguments])


@dataclass(frozen=True)
class Job:
    """Commands that follow from one another.

    Attributes:
        name: For progress and errors.
        commands: In order.
        log: File that their output is appended to.
    """

    name: str
    commands: tuple[Command, ...]
    log: Path

    @property
    def is_done(self) -> bool:
        return all(command.result.exists() for command in self.commands)


def run_jobs(title: str, jobs: Sequence[Job], workers: int) -> None:
    """Runs the jobs that are not done, ``workers`` at a time, one thread each.

    Raises:
        UserError: A command failed; no more are started, and those that run are waited for.
    """
    waiting = [job for job in jobs if not job.is_done]
    print(f"{title}: {len(jobs) - len(waiting)} of {len(jobs)} done before", flush=True)
    start = time.monotonic()
    with ThreadPoolExecutor(workers) as pool:
        futures = {pool.submit(_run_job, job): job for job in waiting}
        try:
            for count, future in enumerate(as_completed(futures), start=1):
                future.result()
                spent = time.monotonic() - start
                left = spent / count * (len(waiting) - count)
                print(f"  {count}/{len(waiting)} {futures[future].name}, {spent:.0f} s, {left:.0f} s left", flush=True)
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def _run_job(job: Job) -> None:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_IMPORTED)
    job.log.parent.mkdir(parents=True, exist_ok=True)
    for command in job.commands:
        if command.result.exists():
            continue
        process = context.Process(target=_run_command, args=(command, job.log))
        process.start()
        process.join()
        if process.exitcode or not command.result.exists():
            raise UserError(
                f"{job.name}: exit status {process.exitcode} of {command}; the end of {job.log}: {_last_line(job.log)}"
            )


def _last_line(log: Path) -> str:
    lines = log.read_text(encoding="utf-8", errors="replace").split("\n") if log.exists() else []
    return next((line for line in reversed(lines) if line.strip()), "(nothing)")


def _run_command(command: Command, log: Path) -> None:
    import torch

    # The fork server, which ends with the command that started it.
    end_with_parent()
    torch.set_num_threads(1)
    descriptor = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    for stream in (1, 2):
        os.dup2(descriptor, stream)
    os.close(descriptor)
    print(command, flush=True)
    sys.argv = [command.module, *command.arguments]
    runpy.run_module(command.module, run_name="__main__", alter_sys=True)
