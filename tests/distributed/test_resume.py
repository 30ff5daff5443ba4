"""A run that stops and goes on gives the series of one that never stopped: to the last bit, or on another layout."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from megatron_tgdpo.checkpoints.listing import newest_checkpoint
from megatron_tgdpo.signals import STOPPED_STATUS
from tests.distributed.common import make_problem, merged, read_metrics, write_pairs
from tests.launch import PATIENCE, ROOT, environment
from tests.processes import run_forked, started_ranks
from tests.series import assert_same_series, logged_steps, wait_for_step

STEPS = 6
SERIES = ("train/loss", "train/grad_norm", "train/lr", "rewards/margins", "guidance/weight_std", "logps/chosen")
TP2 = {"tensor": 2, "sequence_parallel": True}
PP2 = {"pipeline": 2}
UNEVEN = {"pipeline": 2, "pipeline_layers": {"policy": [3, 1]}}
# name: layout before the stop, layout after, step of the stop; names that end in "bf16" train in it
STOPS: dict[str, tuple[dict[str, Any], dict[str, Any], int]] = {
    "tp2-after-1": (TP2, TP2, 1),
    "pp2-after-3": (PP2, PP2, 3),
    "dp2-after-5": ({}, {}, 5),
    "tp2-after-3-bf16": (TP2, TP2, 3),
    "dp2-to-tp2": ({}, TP2, 2),
    "tp2-to-uneven": (TP2, UNEVEN, 3),
    "pp2-uneven-to-dp2": (UNEVEN, {}, 4),
}


@pytest.fixture(scope="module")
def problem(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    root = tmp_path_factory.mktemp("resume")
    # Two epochs of cosine with warm-up: order, schedule and moments all must survive. Tied: two copies of a weight.
    config = make_problem(root, tied=True)
    return root, merged(config, batch={"global_pairs": 11}, train={"steps": STEPS}, checkpoint={"keep": 0})


def precision(name: str) -> dict[str, str]:
    return {"dtype": "bf16" if name.endswith("bf16") else "fp32"}


@pytest.fixture(scope="module")
def series(problem: tuple[Path, dict[str, Any]]) -> Path:
    """Runs everything in one launch of two processes; returns the directory of the runs."""
    root, config = problem
    cases = []
    for name, layout in (("tp2", TP2), ("pp2", PP2), ("dp2", {}), ("tp2-bf16", TP2)):
        cases.append(merged(config, parallel=layout, precision=precision(name), output_dir=str(root / name)))
    for name, (before, after, stop) in STOPS.items():
        ours = merged(config, precision=precision(name), output_dir=str(root / name))
        cases.append(merged(ours, parallel=before, train={"exit_step": stop}))
        cases.append(merged(ours, parallel=after))
    file = root / "cases.json"
    file.write_text(json.dumps([{"config": case, "export": None} for case in cases]))
    run_forked("tests.distributed.worker_train", [str(file)], processes=2)
    return root


@pytest.mark.parametrize("name", STOPS)
def test_a_continued_run_repeats_the_uninterrupted_one(series: Path, name: str) -> None:
    before, after, stop = STOPS[name]
    whole = read_metrics(series / (name[:3] + ("-bf16" if name.endswith("bf16") else "")))
    continued = read_metrics(series / name)
    assert [step["step"] for step in continued] == list(range(1, STEPS + 1))
    # Warm-up starts at learning rate 0, so the first two steps share a loss.
    assert len({step["train/loss"] for step in whole}) == STEPS - 1
    for got, want in zip(continued, whole, strict=True):
        for key in SERIES:
            if before == after or (got["step"] <= stop and before != UNEVEN):
                assert got[key] == want[key], f"{key} of step {got['step']}"
            else:
                assert got[key] == pytest.approx(want[key], rel=2e-5, abs=1e-5), f"{key} of step {got['step']}"


# Far more steps than a busy machine makes before a signal arrives.
LONG = {"train": {"steps": 2000}, "checkpoint": {"every_steps": 4, "keep": 2}}
FOLLOWED = 20


class Whole:
    """Longer runs on two data ranks; what was stopped is compared with one that nothing disturbed.

    Attributes:
        config: Config file of them all; ``output_dir`` and the last step are to be added.
    """

    def __init__(self, root: Path, config: dict[str, Any]) -> None:
        self.config = root / "whole.yaml"
        self.config.write_text(json.dumps(merged(config, **LONG)))
        self._steps, self._run = 0, root
        self._follow(FOLLOWED)

    def arguments(self, run: Path) -> list[str]:
        return [str(self.config), f"output_dir={run}"]

    def assert_same(self, run: Path) -> None:
        """Lets a run that was stopped go on for some steps, and compares them all."""
        last = logged_steps(run) + 5
        run_forked("megatron_tgdpo.train", [*self.arguments(run), f"train.exit_step={last}"], processes=2)
        self.assert_same_steps(run, last)

    def assert_same_steps(self, run: Path, last: int) -> None:
        """Compares the steps of a run that was stopped, up to its last."""
        if last > self._steps:
            self._follow(last)
        assert_same_series(run, self._run, last)

    def _follow(self, steps: int) -> None:
        self._steps, self._run = steps, self.config.parent / f"whole-{steps}"
        arguments = [*self.arguments(self._run), f"train.exit_step={steps}"]
        run_forked("megatron_tgdpo.train", arguments, processes=2)


@pytest.fixture(scope="module")
def whole(problem: tuple[Path, dict[str, Any]]) -> Whole:
    return Whole(*problem)


def test_a_killed_rank_ends_the_job_and_the_run_goes_on_exactly(whole: Whole, tmp_path: Path) -> None:
    killed = tmp_path / "run"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    job = subprocess.Popen(
        [*command, "-m", "megatron_tgdpo.train", *whole.arguments(killed)],
        cwd=ROOT, env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    wait_for_step(killed, 6, lambda: job.poll() is None)
    victim = max(psutil.Process(job.pid).children(), key=lambda process: process.pid)
    os.kill(victim.pid, signal.SIGKILL)
    assert job.wait(timeout=PATIENCE) != 0
    whole.assert_same(killed)
    last = logged_steps(killed)
    assert sorted(path.name for path in (killed / "checkpoints").iterdir()) == [
        f"step_{(last - 1) // 4 * 4:08d}",
        f"step_{last:08d}",
    ]


@pytest.mark.parametrize("request_to_stop", [signal.SIGUSR1, signal.SIGTERM, signal.SIGINT])
def test_one_rank_asked_to_stop_stops_all_after_the_same_step(
    whole: Whole, tmp_path: Path, request_to_stop: signal.Signals
) -> None:
    run = tmp_path / "run"
    with started_ranks(whole.arguments(run), 2, tmp_path / "logs") as ranks:
        wait_for_step(run, 2, lambda: ranks[0].poll() is None)
        ranks[1].send_signal(request_to_stop)
        assert [rank.wait(timeout=PATIENCE) for rank in ranks] == [STOPPED_STATUS, STOPPED_STATUS]
    saved = newest_checkpoint(run)
    assert saved is not None
    reached = logged_steps(run)
    assert int(saved.name[5:]) == reached
    assert f"saved after step {reached} of 2000" in (tmp_path / "logs" / "0.log").read_text()
    assert not (run / "DONE").exists()
    whole.assert_same(run)


@pytest.mark.parametrize("request_to_stop", [signal.SIGTERM, signal.SIGINT])
def test_the_torchrun_script_passes_a_stop_on_and_continues(
    whole: Whole, tmp_path: Path, request_to_stop: signal.Signals
) -> None:
    run = tmp_path / "run"
    command = ["bash", "launch/train.sh", *whole.arguments(run)]
    env = {**environment(), "TGDPO_PYTHON": sys.executable, "NPROC_PER_NODE": "2"}
    job = subprocess.Popen(
        command, cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )
    wait_for_step(run, 2, lambda: job.poll() is None)
    # A terminal's Ctrl-C goes to the whole foreground process group.
    os.killpg(job.pid, request_to_stop)
    output, _ = job.communicate(timeout=PATIENCE)
    assert job.returncode != 0
    assert "start the same command again" in output
    saved = newest_checkpoint(run)
    assert saved is not None
    reached = logged_steps(run)
    assert int(saved.name[5:]) == reached
    last = reached + 5
    again = subprocess.run(
        [*command, f"train.exit_step={last}"],
        cwd=ROOT, env=env, capture_output=True, text=True, timeout=PATIENCE, check=False,
    )  # fmt: skip
    assert again.returncode == 0
    assert f"step {last}/2000" in again.stdout + again.stderr
    whole.assert_same_steps(run, last)


def test_the_torchrun_script_leaves_a_finished_run_alone(whole: Whole, tmp_path: Path) -> None:
    run = tmp_path / "run"
    run_forked("megatron_tgdpo.train", [*whole.arguments(run), "train.steps=2"], processes=2)
    metrics = (run / "metrics.jsonl").read_bytes()
    again = subprocess.run(
        ["bash", "launch/train.sh", *whole.arguments(run), "train.steps=2"],
        cwd=ROOT, env={**environment(), "TGDPO_PYTHON": sys.executable, "NPROC_PER_NODE": "2"},
        capture_output=True, text=True, timeout=PATIENCE, check=False,
    )  # fmt: skip
    assert again.returncode == 0
    assert "finished already" in again.stdout + again.stderr
    assert (run / "metrics.jsonl").read_bytes() == metrics


def test_ctrl_c_to_torchrun_itself_saves(whole: Whole, tmp_path: Path) -> None:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    run = tmp_path / "run"
    job = subprocess.Popen(
        [*launcher, "-m", "megatron_tgdpo.train", *whole.arguments(run)],
        cwd=ROOT, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    wait_for_step(run, 2, lambda: job.poll() is None)
    job.send_signal(signal.SIGINT)
    output, _ = job.communicate(timeout=PATIENCE)
    assert "start the same command again" in output
    saved = newest_checkpoint(run)
    assert saved is not None
    assert int(saved.name[5:]) == logged_steps(run)


def test_a_stop_while_tokenising_is_not_kept_waiting(problem: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    _, config = problem
    write_pairs(tmp_path / "many.jsonl", 100_000)
    config = merged(config, data={"train": str(tmp_path / "many.jsonl")}, output_dir=str(tmp_path / "run"))
    file = tmp_path / "c.yaml"
    file.write_text(json.dumps(config))
    with started_ranks([str(file)], 2, tmp_path / "logs") as ranks:
        deadline = time.monotonic() + 120
        while not any(path.stat().st_size for path in (tmp_path / "run" / "data").glob("*")):
            assert ranks[0].poll() is None
            assert time.monotonic() < deadline, "tokenising did not begin"
            time.sleep(0.01)
        ranks[0].send_signal(signal.SIGUSR1)
        assert [rank.wait(timeout=PATIENCE) for rank in ranks] == [STOPPED_STATUS, STOPPED_STATUS]
    assert "while tokenising; start the same command again" in (tmp_path / "logs" / "0.log").read_text()
    assert not any((tmp_path / "run" / "data").iterdir())
