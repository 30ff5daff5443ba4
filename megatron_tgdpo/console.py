"""What a command writes on the console: its own lines and bars, and none of the libraries that it uses.

For command line programs; a program that imports this package as a library keeps its own settings.
"""

import logging
import os
import sys
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TextIO

if TYPE_CHECKING:
    from tqdm import tqdm

_OURS = ("megatron_tgdpo", "checkpoints_convert", "tgdpo", "tools", "__main__")
# Read by the libraries when they are imported, here and in processes that this one starts; who sets one keeps it.
_SETTINGS = {
    "DATASETS_VERBOSITY": "error",
    "HF_HUB_VERBOSITY": "error",
    "PYTHONWARNINGS": "ignore",
    "TF_CPP_MIN_LOG_LEVEL": "3",
    "TORCH_CPP_LOG_LEVEL": "ERROR",
    "TORCH_LOGS": "-all",  # "-" is: errors only
    "TQDM_DISABLE": "1",  # bars that do not ask for themselves, as ours do
    "TRANSFORMERS_VERBOSITY": "error",
    "VLLM_LOGGING_LEVEL": "ERROR",
}
_LOG_SECONDS = 30.0  # between two lines about the same work, where nobody looks on
_TERMINAL_SECONDS = 0.2
_LINE = "{desc}: {percentage:.0f}%, {n_fmt} of {total_fmt} [{elapsed}<{remaining}, {rate_fmt}{postfix}]"


def configure(level: int = logging.WARNING, format: str = "%(message)s") -> None:
    """Sets up logging and keeps libraries from writing to the console; the first thing that a command does.

    Their errors are shown. So is everything where ``python -W`` asks for warnings, and what their own variables ask for
    (``TORCH_LOGS``, ``TRANSFORMERS_VERBOSITY``).

    Args:
        level: Of our own lines.
        format: Of a line, as :mod:`logging` has it.
    """
    # To ignore some, as a command of ours sets for the processes that it starts, is not to ask for the others.
    asked = any(not option.startswith("ignore") for option in sys.warnoptions)
    for name, value in _SETTINGS.items():
        if name != "PYTHONWARNINGS" or not asked:
            os.environ.setdefault(name, value)
    if not asked:
        warnings.simplefilter("ignore")
        # Libraries set filters of their own: what passes them is logged, by a logger that is not ours.
        logging.captureWarnings(True)
    stream = logging.StreamHandler()
    stream.setFormatter(_Marked(format, datefmt="%H:%M:%S"))
    logging.basicConfig(level=level, handlers=[stream])
    for handler in logging.getLogger().handlers:
        handler.addFilter(_is_shown)


class _Marked(logging.Formatter):
    """Says of a warning that it is one."""

    def formatMessage(self, record: logging.LogRecord) -> str:
        if record.levelno == logging.WARNING:
            record.message = f"WARNING: {record.message}"
        return super().formatMessage(record)


def _is_shown(record: logging.LogRecord) -> bool:
    return record.levelno >= logging.ERROR or record.name.partition(".")[0] in _OURS


def progress(
    label: str, total: int | None, unit: str, *, initial: int = 0, shown: bool = True, leave: bool = True
) -> "tqdm[Any]":
    """A bar on stderr with rate and time left; where that is no terminal, a line every 30 seconds instead.

    Args:
        label: What is going on.
        total: Of ``unit``; bytes are ``"B"``.
        unit: What is counted.
        initial: How much was done before.
        shown: Whether there is one at all: on one rank, as a rule.
        leave: Whether a bar stays on the terminal when it is full.
    """
    from tqdm import tqdm

    terminal = sys.stderr.isatty()
    lines: dict[str, Any] = {"file": _Lines(sys.stderr), "delay": _LOG_SECONDS, "bar_format": _LINE, "leave": False}
    return tqdm(
        total=total,
        desc=label,
        unit=unit,
        unit_scale=unit == "B",
        initial=initial,
        miniters=1,
        mininterval=_TERMINAL_SECONDS if terminal else _LOG_SECONDS,
        disable=not shown,
        **({"dynamic_ncols": True, "leave": leave} if terminal else lines),
    )


@contextmanager
def waiting(label: str, *, shown: bool = True) -> Iterator[None]:
    """Says, while one long call runs, for how long it has: as :func:`progress` does, of what cannot be counted.

    Args:
        label: What is going on.
        shown: Whether anything is said.
    """
    if not shown:
        yield
        return
    terminal = sys.stderr.isatty()
    ended = threading.Event()

    def say() -> None:
        seconds, line = 0.0, ""
        while not ended.wait(interval := 1.0 if terminal else _LOG_SECONDS):
            seconds += interval
            line = f"{label}: {seconds:.0f} s"
            # With its end in one write, so that it stays whole beside what others write.
            sys.stderr.write(f"{line}\r" if terminal else f"{line}\n")
            sys.stderr.flush()
        if terminal:
            print(" " * len(line), end="\r", file=sys.stderr, flush=True)

    thread = threading.Thread(target=say, name="waiting", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


class _Lines:
    """Makes lines of what a bar would write over itself."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self.encoding = stream.encoding

    def write(self, text: str) -> None:
        if text := text.strip():
            self._stream.write(f"{text}\n")

    def flush(self) -> None:
        self._stream.flush()
