"""Starts the ranks of a command on this machine: torchrun for one node, whose last line is what went wrong.

The ranks find each other by torchrun's variables. Signals are passed on to them, and they may take their time: none
is killed while it saves. The exit status is that of the rank that failed first, as ``launch/train.sbatch`` reads it.
"""

import argparse
import contextlib
import ctypes
import os
import signal
import subprocess
import sys
import time
from types import FrameType

from megatron_tgdpo.errors import UserError
from megatron_tgdpo.signals import STOPPED_STATUS, last_words

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)
# Of ranks, once another has failed: until they are asked to end, and then until they are killed.
_SECONDS_FOR_LAST_WORDS = 10
_SECONDS_TO_END = 30
_REPORTS = "TGDPO_LAUNCHER_FD"  # a pipe to the launcher, by which a rank says why it ends
_PR_SET_PDEATHSIG = 1  # linux/prctl.h
# Looked up before any fork: a child must not wait for the loader's lock, which a thread of its parent may have held.
_prctl = ctypes.CDLL(None).prctl if sys.platform == "linux" else None


def end_with_parent() -> None:
    """Has the kernel send TERM to this process when its parent ends, however that ends; only Linux can.

    For ``preexec_fn`` of :mod:`subprocess`, and for processes of :mod:`multiprocessing` to call. To the kernel
    the parent is the thread that started the process.
    """
    if _prctl is not None:
        _prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


def nproc_argument(parser: argparse.ArgumentParser) -> None:
    """Adds the option that :func:`start_ranks` takes."""
    parser.add_argument(
        "--nproc",
        type=int,
        metavar="N",
        help="ranks to start on this machine, one a GPU; not under torchrun or srun",
    )


def is_rank() -> bool:
    """Whether torchrun, srun or :func:`start_ranks` has started this process as one of several."""
    return "RANK" in os.environ or ("SLURM_STEP_ID" in os.environ and _started_by_srun() > 1)


def start_ranks(count: int | None) -> None:
    """Has ``count`` ranks run this process's own command line, and leaves with their exit status.

    Returns in each of them, and where one is enough: it runs here.

    Args:
        count: ``--nproc``, or None where it was not given.

    Raises:
        UserError: It is not above zero, or another launcher has started as many ranks as it wanted.
    """
    if count is None:
        return
    if count < 1:
        raise UserError(f"--nproc is {count}: it must be positive")
    if is_rank():
        started = int(os.environ.get("WORLD_SIZE") or _started_by_srun())
        if started != count:
            raise UserError(f"--nproc is {count}, but torchrun or srun started {started} ranks: leave --nproc out")
    elif count > 1:
        sys.exit(_launch(count))


def _started_by_srun() -> int:
    return int(os.environ.get("SLURM_NTASKS") or 1)


def report(line: str) -> None:
    """Tells the launcher, if :func:`start_ranks` started this rank, why it ends; in at most 500 characters."""
    with contextlib.suppress(KeyError, ValueError, OSError):
        os.write(int(os.environ[_REPORTS]), f"{os.environ['RANK']} {line[:500]}\n".encode())


def _launch(count: int) -> int:
    from torch.distributed import TCPStore

    # Kept here, as torchrun's agent does: no rank that ends takes it away from the others.
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    spec = sys.modules["__main__"].__spec__
    program = ["-m", spec.name.removesuffix(".__main__")] if spec is not None else [sys.argv[0]]
    reading, writing = os.pipe()
    os.set_blocking(reading, False)
    common = {
        **os.environ,
        "WORLD_SIZE": str(count),
        "LOCAL_WORLD_SIZE": str(count),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(store.port),
        "TORCHELASTIC_RUN_ID": "none",
        "TORCHELASTIC_RESTART_COUNT": "0",
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1"),
        _REPORTS: str(writing),
    }
    ranks = _Ranks()
    for number in _SIGNALS:
        signal.signal(number, ranks.pass_on)
    command = [sys.executable, *program, *sys.argv[1:]]
    for rank in range(count):
        ranks.start(command, {**common, "RANK": str(rank), "LOCAL_RANK": str(rank)}, writing)
    if len(ranks.processes) < count:
        ranks.send(signal.SIGKILL)  # those that are there would wait for the others
    failed = ranks.wait()
    os.close(writing)
    if failed is None:
        return 0
    with open(reading, "rb") as pipe:
        said = [line.split(" ", 1) for line in (pipe.read() or b"").decode(errors="replace").splitlines()]
    status = ranks.processes[failed].returncode
    if status < 0 and ranks.asked:
        return STOPPED_STATUS  # before it listened
    if status < 0:
        last_words(f"error: rank {failed} was ended by {signal.Signals(-status).name}")
        return 128 - status
    if not said:
        return status
    # The first is the cause: others may have failed because of it. Alone, it is the last line already.
    cause, line = int(said[0][0]), said[0][1]
    if len(said) > 1:
        last_words(f"error: rank {cause}, which failed first: {line}")
    return ranks.processes[cause].returncode or status


class _Ranks:
    """The processes of a command's ranks; signals to this one reach all of them, in sessions of their own.

    Attributes:
        asked: Whether a signal has come.
        processes: By rank.
    """

    def __init__(self) -> None:
        self.asked = False
        self.processes: list[subprocess.Popen[bytes]] = []

    def start(self, command: list[str], env: dict[str, str], reports: int) -> None:
        """Starts the next rank, unless a signal has come before it."""
        if not self.asked:
            self.processes.append(
                subprocess.Popen(
                    command, env=env, start_new_session=True, preexec_fn=end_with_parent, pass_fds=[reports]
                )
            )

    def pass_on(self, number: int, frame: FrameType | None) -> None:
        """A signal handler. To ranks HUP is TERM, which they know."""
        self.asked = True
        self.send(signal.SIGTERM if number == signal.SIGHUP else signal.Signals(number))

    def wait(self) -> int | None:
        """Waits until all have ended; the rank that failed first, if one did."""
        failed, deadline, how = None, None, signal.SIGTERM
        while True:
            statuses = [process.poll() for process in self.processes]
            if failed is None and any(statuses):
                # Of several at a time, one that was killed: the others may have failed because of it.
                failed = min(range(len(statuses)), key=lambda rank: (not statuses[rank], (statuses[rank] or 0) > 0))
            if None not in statuses:
                return failed
            if failed is not None and statuses[failed] != STOPPED_STATUS:
                deadline = deadline or time.monotonic() + _SECONDS_FOR_LAST_WORDS
                if time.monotonic() > deadline:
                    self.send(how)
                    deadline, how = time.monotonic() + _SECONDS_TO_END, signal.SIGKILL
            time.sleep(0.05)

    def send(self, number: signal.Signals) -> None:
        """Sends a signal to all that have not ended."""
        for process in self.processes:
            process.send_signal(number)
