"""Signals, and when to save without being asked."""

import io
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from megatron_tgdpo.console import waiting
from megatron_tgdpo.signals import INTERRUPTED_STATUS, last_words
from megatron_tgdpo.training.checkpoint_saver import save_due
from tests.forked import Forked
from tests.launch import PATIENCE, ROOT, environment

# One call that never comes back to Python's own handlers, as a backward pass or a collective.
BUSY = """
import hashlib, logging
from megatron_tgdpo import signals
logging.basicConfig(level=logging.INFO)
signals.listen()
print("ready", flush=True)
hashlib.pbkdf2_hmac("sha512", b"", b"", 2**31 - 1)
"""


def test_a_second_ctrl_c_ends_a_process_that_does_not_listen() -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", BUSY], cwd=ROOT, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert process.stdout is not None
    assert process.stderr is not None
    try:
        assert process.stdout.readline() == b"ready\n"
        process.send_signal(signal.SIGINT)
        assert b"SIGINT: saving after the step" in process.stderr.readline()
        assert process.poll() is None
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=60) == INTERRUPTED_STATUS
    finally:
        process.kill()


class _Writes(io.RawIOBase):
    """What reaches the system, write by write."""

    def __init__(self) -> None:
        self.written: list[str] = []

    def writable(self) -> bool:
        return True

    def write(self, data: bytes) -> int:  # type: ignore[override]
        self.written.append(bytes(data).decode())
        return len(data)


def _wait_a_little() -> None:
    with waiting("loading"):
        time.sleep(0.2)


@pytest.mark.parametrize("say", [lambda: last_words("one", "two"), _wait_a_little], ids=["last words", "waiting"])
def test_what_is_said_is_one_write(say: Callable[[], None], monkeypatch: pytest.MonkeyPatch) -> None:
    """Ranks share a log, and launch/env.sh turns Python's buffers off: pieces of lines would mix."""
    raw = _Writes()
    monkeypatch.setattr("megatron_tgdpo.console._LOG_SECONDS", 0.02)
    monkeypatch.setattr(sys, "stderr", io.TextIOWrapper(raw, write_through=True))
    say()
    assert raw.written
    assert all(text.endswith("\n") for text in raw.written), raw.written


def test_lines_of_forked_ranks_stay_whole(tmp_path: Path) -> None:
    files = tmp_path / "stdout", tmp_path / "stderr"
    ranks = [Forked("tests.unit.worker_lines", [], {}, *files) for _ in range(2)]
    assert [rank.wait(PATIENCE) for rank in ranks] == [0, 0]
    for file in files:
        assert file.read_text().splitlines() == ["a line"] * 4000


def test_saves_without_an_interval_are_never_far_apart() -> None:
    assert [step for step in range(1, 101) if save_due(step, 95, None, waited=60)] == list(range(10, 101, 10))
    assert save_due(7, 1000, None, waited=1801)
    assert not save_due(7, 1000, None, waited=1799)
    assert not save_due(7, 1000, 10, waited=1e6)
    assert save_due(20, 1000, 10, waited=0)
