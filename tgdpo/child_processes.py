"""Commands that one command starts, and that end when it does."""

import os
import signal
import subprocess
from collections.abc import Sequence
from types import FrameType, TracebackType

from megatron_tgdpo.resilience.launch import end_with_parent
from megatron_tgdpo.signals import STOPPED_STATUS

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)


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
        self._before: dict[int, signal._HANDLER] = {}

    def __enter__(self) -> "Commands":
        self._before = {number: signal.signal(number, self._ask) for number in _SIGNALS}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def run(self, command: Sequence[str]) -> int:
        """Runs a command to its end.

        Args:
            command: Program and arguments.

        Returns:
            Its exit status, as shells report it; 75 where it was asked to stop, or was not started because of that.
        """
        if self.asked:
            return STOPPED_STATUS
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
        if self._process is not None:
            self._process.send_signal(number)


def run_captured(
    command: Sequence[str], *, env: dict[str, str] | None = None, cwd: str | os.PathLike[str] | None = None
) -> subprocess.CompletedProcess[str]:
    """Runs a command that ends with this one, and returns its status and output."""
    return subprocess.run(
        command, env=env, cwd=cwd, capture_output=True, text=True, check=False, preexec_fn=end_with_parent
    )
