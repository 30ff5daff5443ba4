"""Commands that one command starts, and that end when it does."""

import contextlib
import ctypes
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from types import FrameType, TracebackType

import psutil

from megatron_tgdpo.signals import STOPPED_STATUS

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)
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


class Commands:
    """Runs commands one after another; asked to stop, it passes that on to the one that runs, and starts no more.

    A context manager for the main thread: between entering and leaving, INT, TERM, HUP and USR1 only ask. To a command
    all of them are TERM; INT after any of them is INT, which ends it at once. It has a session of its own, so that a
    terminal's Ctrl-C reaches it only from here.

    Attributes:
        asked: Whether a signal has come.
    """

    def __init__(self) -> None:
        self.asked = False
        self._process: subprocess.Popen[bytes] | None = None
        self._launches = False
        self._before: dict[int, signal._HANDLER] = {}

    def __enter__(self) -> "Commands":
        self._before = {number: signal.signal(number, self._ask) for number in _SIGNALS}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def run(self, command: Sequence[str], *, launches_ranks: bool = False) -> int:
        """Runs a command to its end.

        Args:
            command: Program and arguments.
            launches_ranks: It is torchrun, which gives its ranks seconds to end: they are asked themselves.

        Returns:
            Its exit status, as shells report it; 75 where it was asked to stop, or was not started because of that.
        """
        if self.asked:
            return STOPPED_STATUS
        self._launches = launches_ranks
        self._process = subprocess.Popen(command, start_new_session=True, preexec_fn=end_with_parent)
        try:
            if self.asked:  # while it was being started
                self._send(signal.SIGTERM)
            status = self._process.wait()
        finally:
            self._process = None
        if status and self.asked:
            return STOPPED_STATUS
        return 128 - status if status < 0 else status

    def _ask(self, number: int, frame: FrameType | None) -> None:
        at_once = self.asked and number == signal.SIGINT
        self.asked = True
        self._send(signal.SIGINT if at_once else signal.SIGTERM)

    def _send(self, number: signal.Signals) -> None:
        process = self._process
        if process is None:
            return
        with contextlib.suppress(psutil.NoSuchProcess):
            launcher = psutil.Process(process.pid)
            ranks = launcher.children() if self._launches else []
            for each in ranks or [launcher]:
                with contextlib.suppress(psutil.NoSuchProcess):
                    each.send_signal(number)


def run_captured(
    command: Sequence[str], *, env: dict[str, str] | None = None, cwd: str | os.PathLike[str] | None = None
) -> subprocess.CompletedProcess[str]:
    """Runs a command that ends with this one, and returns its status and output."""
    return subprocess.run(
        command, env=env, cwd=cwd, capture_output=True, text=True, check=False, preexec_fn=end_with_parent
    )
