"""A sweep that is asked to stop has its training save, and leaves nothing running."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil

from megatron_tgdpo.checkpoints.directory import complete_checkpoints
from megatron_tgdpo.signals import STOPPED_STATUS
from tests.distributed.common import make_problem, merged
from tests.launch import ROOT, environment


def test_a_sweep_that_is_asked_to_stop_leaves_nothing_running(tmp_path: Path) -> None:
    config = tmp_path / "config.yaml"
    config.write_text(json.dumps(merged(make_problem(tmp_path), train={"steps": 100_000}, checkpoint={"keep": 1})))
    out = tmp_path / "sweep"
    arguments = [str(config), "--alpha", "0", "0.5", "--beta", "0.1", "--out", str(out), "--ranks", "2"]
    with (tmp_path / "log").open("w") as log:
        sweep = subprocess.Popen(
            [sys.executable, "-m", "tgdpo.sweep", *arguments], cwd=ROOT, env=environment(), stdout=log, stderr=log
        )
    started: list[psutil.Process] = []
    try:
        metrics, deadline = out / "alpha0-beta0.1" / "metrics.jsonl", time.monotonic() + 300
        while not (metrics.exists() and metrics.stat().st_size):
            assert sweep.poll() is None, (tmp_path / "log").read_text()
            assert time.monotonic() < deadline
            time.sleep(0.1)
        started = psutil.Process(sweep.pid).children(recursive=True)
        sweep.send_signal(signal.SIGTERM)
        assert sweep.wait(timeout=300) == STOPPED_STATUS, (tmp_path / "log").read_text()
        assert psutil.wait_procs(started, timeout=300)[1] == []
    finally:
        for process in [*started, psutil.Process(sweep.pid)] if sweep.poll() is None else started:
            if process.is_running():
                process.kill()
        sweep.wait()
    assert len(complete_checkpoints(metrics.parent)) == 1
    assert not (metrics.parent / "running.json").exists()
    assert not (out / "alpha0.5-beta0.1").exists()
    assert (tmp_path / "log").read_text().endswith("asked to stop; start the same command again to continue\n")
