"""What a command has started is asked to end when it is, and does not outlive it."""

import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from tests.launch import ROOT, environment

# Ends at the first signal that asks, with a file that says which came.
CHILD = """
import pathlib, signal, sys, time
def asked(number, frame):
    pathlib.Path(sys.argv[1], "asked").write_text(signal.Signals(number).name)
    sys.exit(75)
for number in (signal.SIGTERM, signal.SIGINT):
    signal.signal(number, asked)
pathlib.Path(sys.argv[1], "ready").touch()
time.sleep(600)
"""
# Two commands, the second of which must not be started once the first was asked to stop.
PARENT = """
import sys
from tgdpo.child_processes import Commands
with Commands() as commands:
    command = [sys.executable, "-c", sys.argv[1], sys.argv[2]]
    statuses = [commands.run(command) for _ in range(2)]
print(statuses, commands.asked, flush=True)
"""
CAPTURED = (
    "import sys\nfrom tgdpo.child_processes import run_captured\nrun_captured([sys.executable, '-c', *sys.argv[1:3]])"
)


def has_ended(process: psutil.Process) -> bool:
    """Nobody may be there to ask for its status, so that it stays a zombie."""
    try:
        return not process.is_running() or process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def until(holds: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 120
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def start(code: str, directory: Path) -> tuple[subprocess.Popen[str], list[psutil.Process]]:
    process = subprocess.Popen(
        [sys.executable, "-c", code, CHILD, str(directory)],
        cwd=ROOT, env=environment(), stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    until((directory / "ready").exists)
    return process, psutil.Process(process.pid).children(recursive=True)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP])
def test_a_signal_is_passed_on_and_nothing_more_is_started(tmp_path: Path, number: signal.Signals) -> None:
    process, children = start(PARENT, tmp_path)
    process.send_signal(number)
    output, _ = process.communicate(timeout=120)
    assert output == "[75, 75] True\n"
    assert (tmp_path / "asked").read_text() == "SIGTERM"
    assert all(map(has_ended, children))


@pytest.mark.skipif(sys.platform != "linux", reason="needs prctl")
@pytest.mark.parametrize("code", [PARENT, CAPTURED], ids=["commands", "captured"])
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_command_does_not_outlive_who_started_it(tmp_path: Path, code: str, number: signal.Signals) -> None:
    process, children = start(code, tmp_path)
    process.send_signal(number)
    process.wait(timeout=120)
    until(lambda: all(map(has_ended, children)))
    assert (tmp_path / "asked").read_text() == "SIGTERM"


def test_statuses_are_those_of_shells(tmp_path: Path) -> None:
    code = (
        "import sys\nfrom tgdpo.child_processes import Commands\nwith Commands() as commands:\n"
        " print([commands.run([sys.executable, '-c', code]) for code in\n"
        "  ('', 'raise SystemExit(3)', 'import os; os.kill(os.getpid(), 9)')], commands.asked)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment(), capture_output=True, text=True)
    assert done.stdout == "[0, 3, 137] False\n"
