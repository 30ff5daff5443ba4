"""A sweep that is asked to stop has its training save, and leaves nothing running."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from megatron_tgdpo.checkpoints.listing import complete_checkpoints
from megatron_tgdpo.signals import STOPPED_STATUS
from tests.distributed.common import make_problem, merged
from tests.launch import ROOT, environment
from tgdpo import pipeline, sweep


def test_a_sweep_that_is_asked_to_stop_leaves_nothing_running(tmp_path: Path) -> None:
    config = tmp_path / "config.yaml"
    config.write_text(json.dumps(merged(make_problem(tmp_path), train={"steps": 100_000}, checkpoint={"keep": 1})))
    out = tmp_path / "sweep"
    arguments = [str(config), "--alpha", "0", "0.5", "--beta", "0.1", "--out", str(out), "--nproc", "2"]
    with (tmp_path / "log").open("w") as log:
        running = subprocess.Popen(
            [sys.executable, "-m", "tgdpo.sweep", *arguments], cwd=ROOT, env=environment(), stdout=log, stderr=log
        )
    started: list[psutil.Process] = []
    try:
        metrics, deadline = out / "alpha0-beta0.1" / "metrics.jsonl", time.monotonic() + 300
        while not (metrics.exists() and metrics.stat().st_size):
            assert running.poll() is None, (tmp_path / "log").read_text()
            assert time.monotonic() < deadline
            time.sleep(0.1)
        started = psutil.Process(running.pid).children(recursive=True)
        running.send_signal(signal.SIGTERM)
        assert running.wait(timeout=300) == STOPPED_STATUS, (tmp_path / "log").read_text()
        assert psutil.wait_procs(started, timeout=300)[1] == []
    finally:
        for process in [*started, psutil.Process(running.pid)] if running.poll() is None else started:
            if process.is_running():
                process.kill()
        running.wait()
    assert len(complete_checkpoints(metrics.parent)) == 1
    assert not (metrics.parent / "running.json").exists()
    assert not (out / "alpha0.5-beta0.1").exists()
    assert (tmp_path / "log").read_text().endswith("asked to stop; start the same command again to continue\n")


def test_the_runs_of_a_sweep_must_share_a_guide(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = tmp_path / "config.yaml"
    config.write_text(json.dumps(merged(make_problem(tmp_path), model={"guide": None}, guide={"method": "dpo"})))
    with pytest.raises(SystemExit, match="1"):
        sweep.main([str(config), "--alpha", "0", "0.5", "--beta", "0.1", "--out", str(tmp_path / "sweep")])
    assert "guide.output_dir is not set: name the directory of the one guide of all runs" in capsys.readouterr().err
    assert not (tmp_path / "sweep").exists()


def test_ranks_that_the_layout_cannot_be_made_of_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tmp_path / "config.yaml"
    config.write_text(json.dumps(merged(make_problem(tmp_path), parallel={"tensor": 2})))
    given = [str(config), "--alpha", "0.5", "--beta", "0.1", "--out", str(tmp_path / "sweep")]
    for ranks, choices in ((["--nproc", "3"], "2 or 4"), ([], "2")):
        with pytest.raises(SystemExit, match="1"):
            sweep.main([*given, *ranks])
        assert f"= 2: start {choices} ranks, or change the layout\n" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="1"):
        pipeline.main([str(config), "--nproc", "3"])
    assert "= 2: start 2 or 4 ranks, or change the layout\n" in capsys.readouterr().err
    assert not (tmp_path / "sweep").exists()
    assert not (tmp_path / "run").exists()
