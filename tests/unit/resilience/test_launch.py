"""Ranks that a command starts itself: who is told of a signal, what status is left, and which line is last."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from megatron_tgdpo.signals import BAD_NODE_STATUS, INTERRUPTED_STATUS, STOPPED_STATUS
from tests.launch import PATIENCE, ROOT, environment

# A command as ours are; sys.argv[2] says what its ranks do.
COMMAND = """
import argparse, os, pathlib, signal, sys, time
from megatron_tgdpo import signals
from megatron_tgdpo.errors import BadNodeError, UserError
from megatron_tgdpo.resilience import launch
from megatron_tgdpo.resilience.entry import run_and_exit

def act(rank):
    here, what = pathlib.Path(sys.argv[1]), sys.argv[2]
    (here / f"rank{rank}").write_text(os.environ["WORLD_SIZE"] + os.environ["LOCAL_RANK"])
    if what == "bad input":
        raise UserError("c.yaml: wrong")
    if what == "bad node":
        raise BadNodeError("node n1 is slow")
    if what == "one fails" and rank == 1:
        raise ValueError("the cause")
    if what == "one is killed" and rank == 1:
        while not (here / "rank0").exists():
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGKILL)
    if what in ("one fails", "one is killed"):
        while not (here / "rank1").exists():
            time.sleep(0.01)
        time.sleep(0.5)  # as a lost connection takes some time to show
        raise ConnectionError("lost the other")
    if what == "waits":
        signals.listen()
        (here / f"ready{rank}").touch()
        while not signals.requested():
            time.sleep(0.01)
        if (here / "hold").exists():
            time.sleep(600)
        raise signals.StoppedEarly("asked to stop")
    return int(what)

parser = argparse.ArgumentParser()
parser.add_argument("here")
parser.add_argument("what")
launch.nproc_argument(parser)
given = parser.parse_args()
run_and_exit(act, given.nproc)
"""


def start(tmp_path: Path, what: str, **variables: str) -> subprocess.Popen[str]:
    file = tmp_path / "command.py"
    file.write_text(COMMAND)
    return subprocess.Popen(
        [sys.executable, "command.py", str(tmp_path), what, "--nproc", "2"],
        cwd=tmp_path,
        env={**environment(), "PYTHONPATH": str(ROOT), **variables},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(process: subprocess.Popen[str]) -> tuple[int, list[str]]:
    """The exit status, and the lines of stderr."""
    _, errors = process.communicate(timeout=PATIENCE)
    return process.returncode, errors.splitlines()


def until_ready(tmp_path: Path, process: subprocess.Popen[str]) -> list[psutil.Process]:
    deadline = time.monotonic() + PATIENCE
    while not all((tmp_path / f"ready{rank}").exists() for rank in range(2)):
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.05)
    return psutil.Process(process.pid).children()


def test_ranks_know_their_places(tmp_path: Path) -> None:
    assert finish(start(tmp_path, "0")) == (0, [])
    assert [(tmp_path / f"rank{rank}").read_text() for rank in range(2)] == ["20", "21"]


@pytest.mark.parametrize(
    ("what", "status", "line"),
    [("bad input", 1, "error: c.yaml: wrong"), ("bad node", BAD_NODE_STATUS, "error: node n1 is slow")],
)
def test_what_all_ranks_know_is_one_line_and_its_status_is_kept(
    tmp_path: Path, what: str, status: int, line: str
) -> None:
    assert finish(start(tmp_path, what)) == (status, [line])


def test_the_last_line_is_the_cause_and_not_what_it_led_to(tmp_path: Path) -> None:
    status, lines = finish(start(tmp_path, "one fails"))
    assert status == 70
    assert any("lost the other" in line for line in lines)
    assert lines[-1] == "error: rank 1, which failed first: ValueError: the cause"


def test_a_rank_that_was_killed_is_named(tmp_path: Path) -> None:
    status, lines = finish(start(tmp_path, "one is killed"))
    assert (status, lines[-1]) == (137, "error: rank 1 was ended by SIGKILL")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP])
def test_a_signal_reaches_every_rank_once(tmp_path: Path, number: signal.Signals) -> None:
    process = start(tmp_path, "waits")
    children = until_ready(tmp_path, process)
    # A terminal's Ctrl-C goes to the whole foreground process group: to ranks in it, it would come twice.
    assert all(os.getpgid(child.pid) != os.getpgid(process.pid) for child in children)
    process.send_signal(number)
    status, lines = finish(process)
    assert status == STOPPED_STATUS
    assert lines.count("asked to stop; start the same command again to continue") == 1
    assert not any("interrupted again" in line for line in lines)
    assert psutil.wait_procs(children, timeout=PATIENCE)[1] == []


def test_a_second_ctrl_c_ends_all_at_once(tmp_path: Path) -> None:
    (tmp_path / "hold").touch()
    process = start(tmp_path, "waits")
    children = until_ready(tmp_path, process)
    assert process.stderr is not None
    process.send_signal(signal.SIGTERM)
    assert "saving after the step" in process.stderr.readline()
    process.send_signal(signal.SIGINT)
    assert finish(process)[0] == INTERRUPTED_STATUS
    assert psutil.wait_procs(children, timeout=PATIENCE)[1] == []


@pytest.mark.skipif(sys.platform != "linux", reason="needs prctl")
def test_ranks_do_not_outlive_who_started_them(tmp_path: Path) -> None:
    process = start(tmp_path, "waits")
    children = until_ready(tmp_path, process)
    process.kill()
    assert psutil.wait_procs(children, timeout=PATIENCE)[1] == []
    process.communicate()


def test_another_launcher_is_not_contradicted(tmp_path: Path) -> None:
    status, lines = finish(start(tmp_path, "0", RANK="0", WORLD_SIZE="4"))
    (line,) = lines
    assert (status, line) == (
        1,
        "error: --nproc is 2, but torchrun or srun started 4 ranks: leave --nproc out",
    )
