"""One output directory, one run: whoever is in it keeps others out, and nobody who is gone does."""

import json
import subprocess
import sys
import time
from pathlib import Path
from unittest import mock

import pytest

from megatron_tgdpo.errors import UserError
from megatron_tgdpo.resilience.run_lock import LOCK_FILE, RunLock
from tests.launch import PATIENCE, ROOT, environment

INTERVAL = 0.05
ELSEWHERE = {"id": "other", "host": "far pid:[1]", "pid": 1, "job": "7", "restart": "0", "beat": 3}


def lock(directory: Path, **variables: str) -> RunLock:
    return RunLock(directory, INTERVAL, variables)


def leave(directory: Path, **values: object) -> None:
    """As a run that was killed leaves it: at once, for a run that reads it meanwhile."""
    written = directory / "written"
    written.write_text(json.dumps({**ELSEWHERE, **values}))
    written.replace(directory / LOCK_FILE)


def test_a_second_run_is_refused_until_the_first_has_ended(tmp_path: Path) -> None:
    first = lock(tmp_path / "run", SLURM_JOB_ID="12")
    first.acquire()
    # Who watches for longer than others need to show a sign of life, also on a busy machine.
    patient = RunLock(tmp_path / "run", 40 * INTERVAL, {"SLURM_JOB_ID": "13"})
    with pytest.raises(UserError, match=r"run: process \d+ of job 12 on \S+ is writing to it: .* another output_dir"):
        patient.acquire()
    first.release()
    assert not (tmp_path / "run" / LOCK_FILE).exists()
    second = lock(tmp_path / "run")
    second.acquire()
    second.release()


def test_a_lost_run_is_watched_and_then_replaced(tmp_path: Path) -> None:
    leave(tmp_path)
    started = time.monotonic()
    ours = lock(tmp_path, SLURM_JOB_ID="8")
    ours.acquire()
    assert time.monotonic() - started >= 4 * INTERVAL
    assert json.loads((tmp_path / LOCK_FILE).read_text())["job"] == "8"
    ours.release()


@pytest.mark.parametrize("content", [b"", b"half a li", b"[]"])
def test_what_is_not_a_name_keeps_nobody_out(tmp_path: Path, content: bytes) -> None:
    (tmp_path / LOCK_FILE).write_bytes(content)
    ours = lock(tmp_path)
    ours.acquire()
    ours.release()


def test_requeued_jobs_and_dead_processes_are_not_waited_for(tmp_path: Path) -> None:
    with mock.patch("time.sleep", side_effect=AssertionError("waited")):
        leave(tmp_path)
        requeued = lock(tmp_path, SLURM_JOB_ID="7", SLURM_RESTART_COUNT="1")
        requeued.acquire()
        mine = json.loads((tmp_path / LOCK_FILE).read_text())
        requeued.release()
        gone = subprocess.Popen([sys.executable, "-c", ""])
        gone.wait()
        leave(tmp_path, host=mine["host"], pid=gone.pid, job=None)
        again = lock(tmp_path)
        again.acquire()
        again.release()


def test_a_run_whose_place_was_taken_ends_and_says_by_whom(tmp_path: Path) -> None:
    code = (
        "import sys, time, pathlib\nfrom megatron_tgdpo.resilience.run_lock import RunLock\n"
        f"RunLock(pathlib.Path(sys.argv[1]), {INTERVAL}).acquire()\nprint('in', flush=True)\ntime.sleep({PATIENCE})"
    )
    run = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path)],
        cwd=ROOT, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert run.stdout is not None
    assert run.stdout.readline() == "in\n"
    deadline = time.monotonic() + PATIENCE
    while run.poll() is None:
        assert time.monotonic() < deadline
        leave(tmp_path)
        time.sleep(INTERVAL)
    assert run.returncode == 70
    assert run.communicate()[1] == f"{tmp_path}: taken over by process 1 on far pid:[1]: this run ends\n"


def test_a_reader_never_sees_it_half_written(tmp_path: Path) -> None:
    ours = lock(tmp_path)
    ours.acquire()
    with (tmp_path / LOCK_FILE).open() as seen:
        first = (tmp_path / LOCK_FILE).read_text()
        deadline = time.monotonic() + 60
        while (tmp_path / LOCK_FILE).read_text() == first:
            assert time.monotonic() < deadline
            time.sleep(INTERVAL)
        # What was opened before the change is whole still: the new content is another file.
        assert json.loads(seen.read())["beat"] == json.loads(first)["beat"]
    ours.release()
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_gives_the_place_to_nobody(tmp_path: Path) -> None:
    code = (
        "import resource, sys, time, pathlib\nfrom megatron_tgdpo.resilience.run_lock import RunLock\n"
        f"RunLock(pathlib.Path(sys.argv[1]), {INTERVAL}, {{'SLURM_JOB_ID': '5'}}).acquire()\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (10, 10))\nprint('full', flush=True)\ntime.sleep(600)"
    )
    run = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path)], cwd=ROOT, env=environment(), stdout=subprocess.PIPE, text=True
    )
    try:
        assert run.stdout is not None
        assert run.stdout.readline() == "full\n"
        with pytest.raises(UserError, match=rf"process {run.pid} of job 5 on \S+ is writing to it"):
            RunLock(tmp_path, 1.0, {}).acquire()
        assert json.loads((tmp_path / LOCK_FILE).read_text())["pid"] == run.pid
    finally:
        run.kill()
        run.wait()
    # It is gone, and so is what its last attempt left.
    ours = lock(tmp_path)
    ours.acquire()
    ours.release()
    assert list(tmp_path.iterdir()) == []
