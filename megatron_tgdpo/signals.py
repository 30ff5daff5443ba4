"""Stopping early: a signal asks for it, and the run ends at the next step boundary with a checkpoint."""

import contextlib
import logging
import os
import signal
import sys
import threading
from types import FrameType

# Exit statuses, with the meaning they have in sysexits.h; bad input is 1.
STOPPED_STATUS = 75  # "temporary failure, try again later": saved, and can be continued
FAILED_STATUS = 70  # "internal software error"
STORAGE_STATUS = 74  # "input/output error": storage failed, which may pass
BAD_NODE_STATUS = 76  # "remote error": a node that preflight named
INTERRUPTED_STATUS = 128 + signal.SIGINT  # as shells report it

logger = logging.getLogger(__name__)

_requested = False


class StoppedEarly(Exception):
    """Raised on every rank when nothing is left to save after a stop: the run is not finished, and can be continued."""


def listen() -> None:
    """From now on USR1 (a time limit is near), TERM (preemption) and INT (Ctrl-C) only note that the run shall stop.

    INT after any of them ends the process at once, whatever it is doing. Call it in the main thread, once.
    """
    # Python runs handlers between two of its own instructions, so not during a backward pass or a collective. The
    # number of the signal is written to this pipe at once, and the thread sees it.
    read_end, write_end = os.pipe()
    os.set_blocking(write_end, False)
    signal.set_wakeup_fd(write_end)
    for number in (signal.SIGUSR1, signal.SIGTERM, signal.SIGINT):
        signal.signal(number, _note)
    threading.Thread(target=_watch, args=(read_end,), name="signals", daemon=True).start()


def requested() -> bool:
    """Whether this process was asked. The others may be asked a step later: ranks must agree before they act on it."""
    return _requested


def leave_if_requested(doing: str) -> None:
    """For long work on one rank, before there are steps.

    Args:
        doing: What is left unfinished.

    Raises:
        StoppedEarly: This process was asked to stop.
    """
    if _requested:
        raise StoppedEarly(f"asked to stop while {doing}")


def last_words(*lines: str) -> None:
    """Writes to stderr, if that takes them: a log on a full disk must not change how a process ends.

    All in one write: ranks share a log, and where Python does not buffer, ``print`` writes a line's end by itself.
    """
    with contextlib.suppress(OSError):
        sys.stderr.write("".join(f"{line}\n" for line in lines))
        sys.stderr.flush()


def _note(number: int, frame: FrameType | None) -> None:
    global _requested
    _requested = True


def _watch(read_end: int) -> None:
    global _requested
    asked = False
    while True:
        for number in os.read(read_end, 1):
            if asked and number == signal.SIGINT:
                last_words("interrupted again: ended at once, nothing more is saved")
                os._exit(INTERRUPTED_STATUS)
            if not asked:
                name = signal.Signals(number).name
                logger.info("%s: saving after the step that is running, then ending; Ctrl-C ends at once", name)
            _requested = asked = True
