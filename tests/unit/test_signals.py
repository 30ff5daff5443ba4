"""Signals, and when to save without being asked."""

import signal
import subprocess
import sys

from megatron_tgdpo.signals import INTERRUPTED_STATUS
from megatron_tgdpo.training.checkpoint_saver import save_due
from tests.launch import ROOT, environment

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


def test_saves_without_an_interval_are_never_far_apart() -> None:
    assert [step for step in range(1, 101) if save_due(step, 95, None, waited=60)] == list(range(10, 101, 10))
    assert save_due(7, 1000, None, waited=1801)
    assert not save_due(7, 1000, None, waited=1799)
    assert not save_due(7, 1000, 10, waited=1e6)
    assert save_due(20, 1000, 10, waited=0)
