"""Stopping early: a signal asks for it, and the run ends at the next step boundary with a checkpoint."""

import signal
from types import FrameType

# Exit statuses, with the meaning they have in sysexits.h; bad input is 1.
STOPPED_STATUS = 75  # "temporary failure, try again later": saved, and can be continued
FAILED_STATUS = 70  # "internal software error"
BAD_NODE_STATUS = 76  # "remote error": a node that preflight named

_requested = False


class StoppedEarly(Exception):
    """Raised on every rank after the checkpoint of a stop is saved: the run is not finished, and can be continued."""


def listen() -> None:
    """From now on USR1 (a time limit is near) and TERM (preemption) only note that this process shall stop."""
    signal.signal(signal.SIGUSR1, _note)
    signal.signal(signal.SIGTERM, _note)


def requested() -> bool:
    """Whether this process was asked. The others may be asked a step later: ranks must agree before they act on it."""
    return _requested


def _note(number: int, frame: FrameType | None) -> None:
    global _requested
    _requested = True
