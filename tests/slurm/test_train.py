"""The very script that users submit, on a real Slurm: a run that is stopped in any way ends as if it never was."""

import json
import os
import re
import sys
from pathlib import Path

import pytest

from tests.distributed.common import merged
from tests.launch import ROOT
from tests.processes import run_forked
from tests.series import assert_same_series, logged_steps, wait_for_step
from tests.slurm.cluster import SMALL, Cluster, Job

# For what happens to jobs and nodes, however many ranks a node has: each imports for seconds at each start.
ONE_A_NODE = "--ntasks-per-node=1"
slow = pytest.mark.skipif("TGDPO_SLOW_TESTS" not in os.environ, reason="slow: bash tests/slurm/run_all.sh")


def test_slurm_accepts_every_script(cluster: Cluster) -> None:
    for script in ("launch/train.sbatch", "launch/stage.sbatch"):
        assert "to start at" in cluster.run("sbatch", "--test-only", script, "config.yaml")
    assert "n[1-2]" in cluster.run("sbatch", "--test-only", "--nodes=2", "launch/train.sbatch", "config.yaml")


def test_a_run_ends_once_and_says_so_when_submitted_again(
    cluster: Cluster, uninterrupted: Path, config_file: Path, tmp_path: Path
) -> None:
    assert (uninterrupted / "DONE").exists()
    (logs,) = (uninterrupted / "logs").iterdir()
    assert sorted(log.name for log in logs.iterdir()) == [f"rank_{rank}.log" for rank in range(4)]
    metrics = (uninterrupted / "metrics.jsonl").read_bytes()
    again = cluster.train(tmp_path, [str(config_file), f"output_dir={uninterrupted}"])
    assert again.wait() == "COMPLETED"
    assert "finished already" in again.text()
    assert (uninterrupted / "metrics.jsonl").read_bytes() == metrics


def test_the_doctor_sees_the_whole_allocation(cluster: Cluster, config_file: Path, tmp_path: Path) -> None:
    job = cluster.train(tmp_path, ["--doctor", str(config_file), f"output_dir={tmp_path}/run"])
    assert job.wait() == "COMPLETED", job.text()
    assert "4 ranks: CPU" in job.text()
    assert f"ready: tgdpo train {config_file} output_dir={tmp_path}/run" in job.text()
    assert not (tmp_path / "run").exists()
    bad = ["--doctor", str(config_file), f"output_dir={tmp_path}/run", "data.train=none.json"]
    job = cluster.train(tmp_path, bad, ONE_A_NODE)
    assert job.wait() == "FAILED", job.text()
    assert "STOP  none.json" in job.text()


def near_the_time_limit(job: Job) -> None:
    """The signal that ``--signal=B:USR1`` brings."""
    job.cluster.run("scancel", "--batch", "--signal=USR1", job.number)


def signal_the_ranks(job: Job) -> None:
    job.cluster.run("scancel", "--signal=USR1", job.number)


def preempt(job: Job) -> None:
    options = ("--partition=high", "--nodes=2", "--exclusive", "--output=/dev/null")
    job.cluster.run("sbatch", *options, "--wrap=sleep 1")


def lose_a_node(job: Job) -> None:
    before = job.field("Restarts")
    job.cluster.run("scontrol", "update", "NodeName=n2", "State=DOWN", "Reason=test")
    job.wait_until(lambda: job.field("Restarts") != before, "been requeued")
    # Refused where the node has reported back by itself.
    job.cluster.run("scontrol", "update", "NodeName=n2", "State=RESUME", check=False)


def test_a_run_stopped_in_every_way_repeats_the_uninterrupted_one(
    cluster: Cluster, config_file: Path, tmp_path: Path
) -> None:
    """One run: a user cancels its first job, and what may happen to a job happens to the second, one after another."""
    run, whole = tmp_path / "run", tmp_path / "whole"
    # Far more steps than a busy machine makes before the last event.
    config = merged(json.loads(config_file.read_text()), parallel={"tensor": 1}, train={"steps": 20_000})
    endless = tmp_path / "endless.yaml"
    endless.write_text(json.dumps(config))
    arguments = [str(endless), f"output_dir={run}"]
    cancelled = cluster.train(tmp_path, arguments, ONE_A_NODE)
    wait_for_step(run, 2, cancelled.alive)
    cluster.run("scancel", cancelled.number)
    assert cancelled.wait() == "CANCELLED"
    cancelled.wait_until(lambda: not cluster.run("squeue", "--noheader"), "left the queue")
    assert cancelled.field("Restarts") == "0"
    assert not (run / "DONE").exists()

    job = cluster.train(tmp_path, arguments, "--partition=low", ONE_A_NODE)
    events = (near_the_time_limit, signal_the_ranks, preempt, lose_a_node)
    logs = [run / "logs" / f"{job.number}.{restart}" / "rank_0.log" for restart in range(len(events) + 1)]
    for restart, event in enumerate(events):
        job.wait_until(lambda log=logs[restart]: log.exists() and log.read_text().count(" s/step ") >= 2, "trained")
        if event is events[-1]:
            # For the next start, which reads the file anew, and may be beyond it.
            endless.write_text(json.dumps(merged(config, train={"exit_step": logged_steps(run) + 10})))
        event(job)
        job.wait_until(lambda restart=restart: job.field("Restarts") == str(restart + 1), "been requeued")
        assert job.text().count("stopped early and saved") == restart + (event is not lose_a_node)
    assert job.wait() == "COMPLETED", job.text()
    assert job.field("Restarts") == str(len(events))
    for log in logs[1:]:
        assert "continuing after step" in log.read_text()
    last = logged_steps(run)
    run_forked("megatron_tgdpo.train", [str(endless), f"output_dir={whole}", f"train.exit_step={last}"], processes=2)
    assert_same_series(run, whole)


def test_a_node_that_fails_preflight_is_left_out(cluster: Cluster, config_file: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    # Python imports this at its start: on the first node, the files of other ranks are not seen.
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "sitecustomize.py").write_text(
        "import os, pathlib\n"
        "read = pathlib.Path.read_text\n"
        "def blind(self, *arguments, **options):\n"
        "    return '' if '.canary' in str(self) else read(self, *arguments, **options)\n"
        "if os.environ.get('SLURMD_NODENAME') == 'n1':\n"
        "    pathlib.Path.read_text = blind\n"
    )
    arguments = [str(config_file), f"output_dir={run}", "train.exit_step=2"]
    job = cluster.train(tmp_path, arguments, "--nodes=1", PYTHONPATH=f"{tmp_path}/site:{ROOT}")
    assert job.wait() == "COMPLETED", job.text()
    assert job.field("Restarts") == "1"
    assert "preflight: node n1: does not see what node n1 writes" in job.text()
    assert "left out from now on: n1" in job.text()
    assert job.field("NodeList") == "n2"
    assert (run / "bad_nodes").read_text().startswith("n1\tdoes not see")


def test_bad_input_is_not_tried_again(cluster: Cluster, config_file: Path, tmp_path: Path) -> None:
    bad = [str(config_file), f"output_dir={tmp_path}/run", "data.validation=nowhere.json"]
    bad_data = cluster.train(tmp_path, bad, ONE_A_NODE)
    assert bad_data.wait() == "FAILED"
    assert "nowhere.json" in bad_data.text()
    assert "bad input, not requeued" in bad_data.text()
    bad_key = cluster.train(tmp_path, [str(config_file), "loss.betta=1"])
    assert bad_key.wait() == "FAILED"
    assert "loss.betta" in bad_key.text()


def test_restarts_without_progress_end(cluster: Cluster, config_file: Path, tmp_path: Path) -> None:
    """A python whose training always crashes."""
    crashing = tmp_path / "python"
    crashing.write_text('#!/bin/sh\n[ "$2 $3" != "tgdpo train" ] || exit 70\nexec "$REAL_PYTHON" "$@"\n')
    crashing.chmod(0o755)
    variables = {"REAL_PYTHON": sys.executable, "TGDPO_PYTHON": str(crashing), "TGDPO_MAX_RESTARTS": "1"}
    job = cluster.train(tmp_path, [str(config_file), f"output_dir={tmp_path}/run"], **variables)
    assert job.wait() == "FAILED", job.text()
    assert job.field("Restarts") == "2"
    assert "restarted 1 times without a new checkpoint (still at step 0)" in job.text()


@slow
def test_a_real_time_limit_as_often_as_needed(cluster: Cluster, config_file: Path, tmp_path: Path) -> None:
    """Two minutes, the signal some 75 s before (or up to 60 s earlier): several legs of a run that is longer."""
    arguments = [str(config_file), "train.steps=300", "checkpoint.every_steps=1000"]
    whole = cluster.train(tmp_path, [*arguments, f"output_dir={tmp_path}/whole"])
    assert whole.wait() == "COMPLETED"
    job = cluster.train(tmp_path, [*arguments, f"output_dir={tmp_path}/run"], "--time=2", "--signal=B:USR1@75")
    assert job.wait(1800) == "COMPLETED", job.text()
    assert int(job.field("Restarts")) >= 2
    print(f"restarts under a time limit of 2 minutes: {job.field('Restarts')}")
    assert_same_series(tmp_path / "run", tmp_path / "whole")


@slow
def test_the_whole_mission_as_a_chain_of_jobs(cluster: Cluster, config_file: Path, tmp_path: Path) -> None:
    config = merged(json.loads(config_file.read_text()), model={"guide": None}, guide={"method": "dpo", "beta": 0.01})
    (tmp_path / "config.yaml").write_text(json.dumps(config))
    out = tmp_path / "out"
    submit = ("bash", str(ROOT / "launch" / "pipeline.sh"), str(tmp_path / "config.yaml"), f"output_dir={out}")
    variables = {"TGDPO_TRAIN_OPTIONS": " ".join(SMALL), "TGDPO_STAGE_OPTIONS": "--cpus-per-task=1"}
    printed = cluster.run(*submit, **variables)
    jobs = dict(re.findall(r"^(\w+): job (\d+)", printed, re.M))
    assert list(jobs) == ["guide", "train", "export", "evaluate"], printed
    last = Job(cluster, jobs["evaluate"], out / f"slurm-{jobs['evaluate']}-evaluate.out")
    assert last.wait() == "COMPLETED", last.text()
    assert (out / "guide" / "DONE").exists()
    (exported,) = (out / "hf").iterdir()
    assert (exported / "model.safetensors").exists()
    assert list(json.loads((out / "evaluation.json").read_text())["models"]) == ["reference", "tgdpo", "guide"]
    again = cluster.run(*submit, **variables)
    assert again.count("complete, skipped") == 4, again
