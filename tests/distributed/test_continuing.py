"""A run continues as it was, or changed where that is asked for; what changed behind its back is named."""

import json
import math
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from tests.distributed.common import make_problem, merged, read_metrics, write_pairs
from tests.processes import run_forked

STEPS, STOP = 6, 3


class Problem:
    """A run that stopped after three of six steps, and copies of it to continue."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.config = merged(make_problem(root), preflight={"enabled": False}, output_dir=str(root / "stopped"))
        self.train(self.config, "train.exit_step=3")

    def train(self, config: dict[str, Any], *overrides: str, processes: int = 1) -> str:
        """Trains; returns what was logged."""
        return run_forked("megatron_tgdpo.train", [self.write(config), *overrides], processes=processes).stderr

    def refusal(self, config: dict[str, Any], *overrides: str, processes: int = 1) -> str:
        """The one error line of a training that must not start."""
        done = run_forked("megatron_tgdpo.train", [self.write(config), *overrides], processes=processes, check=False)
        assert done.returncode == 1, done.stderr
        assert "Traceback" not in done.stderr
        (line,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
        return line

    def write(self, config: dict[str, Any]) -> str:
        file = self.root / "config.yaml"
        file.write_text(json.dumps(config))
        return str(file)

    def copy(self, to: Path, *, only_checkpoints: bool = False) -> dict[str, Any]:
        """A copy of the stopped run, and its config there."""
        if only_checkpoints:
            shutil.copytree(self.root / "stopped" / "checkpoints", to / "checkpoints")
        else:
            shutil.copytree(self.root / "stopped", to)
        return merged(self.config, output_dir=str(to))


@pytest.fixture(scope="module")
def problem(tmp_path_factory: pytest.TempPathFactory) -> Problem:
    return Problem(tmp_path_factory.mktemp("continuing"))


def metadata(run: Path, step: int) -> dict[str, Any]:
    return json.loads((run / "checkpoints" / f"step_{step:08d}" / "tgdpo.json").read_text())


def cosine(lr: float, step: int, steps: int) -> float:
    """The learning rate of a step (from 1) after one step of warm-up."""
    return lr * 0.5 * (1 + math.cos(math.pi * (step - 2) / (steps - 1)))


def other_weights(model: Path, to: Path) -> Path:
    """A copy whose weights have the same names and sizes."""
    shutil.copytree(model, to)
    weights = load_file(to / "model.safetensors")
    name = "model.layers.0.mlp.up_proj.weight"
    save_file({**weights, name: weights[name] * 1.5}, to / "model.safetensors", metadata={"format": "pt"})
    return to


@pytest.mark.parametrize("only_checkpoints", [True, False])
def test_another_learning_rate_is_asked_for_and_taken(problem: Problem, tmp_path: Path, only_checkpoints: bool) -> None:
    """Whether the run's directory was copied, or its checkpoints alone."""
    config = problem.copy(tmp_path / "run", only_checkpoints=only_checkpoints)
    config = merged(config, optimizer={"lr": 1e-6})
    assert "optimizer.lr 1e-06, was 0.001: give train.resume=changed" in problem.refusal(config)
    logged = problem.train(config, "train.resume=changed", "loss.alpha=0.25")
    assert "continuing with optimizer.lr 1e-06, was 0.001" in logged
    assert "continuing with loss.alpha 0.25, was 0.5" in logged
    steps = {step["step"]: step for step in read_metrics(tmp_path / "run")}
    for step in range(STOP + 1, STEPS + 1):
        assert steps[step]["train/lr"] == pytest.approx(cosine(1e-6, step, STEPS), rel=1e-9)
    saved = metadata(tmp_path / "run", STEPS)
    assert saved["config"]["optimizer"]["lr"] == 1e-6
    changes = {change["key"]: change for change in saved["changes"]}
    assert changes["optimizer.lr"] == {"after_step": STOP, "key": "optimizer.lr", "was": 1e-3, "now": 1e-6}
    assert changes["loss.alpha"]["now"] == 0.25
    assert "lr: 1.0e-06" in (tmp_path / "run" / "config.yaml").read_text()


@pytest.mark.parametrize("change", ["beta1=0.5", "beta2=0.9", "eps=1e-2", "weight_decay=0.5", "clip_grad=0.01"])
def test_every_setting_of_the_optimizer_takes_effect(
    problem: Problem, continued: list[dict[str, float]], tmp_path: Path, change: str
) -> None:
    """The first step after the stop has the weights of before, the second those that the new setting made."""
    config = problem.copy(tmp_path / "run")
    problem.train(config, "train.resume=changed", f"optimizer.{change}", "train.exit_step=5")
    changed = {step["step"]: step for step in read_metrics(tmp_path / "run")}
    assert changed[4]["train/loss"] == continued[3]["train/loss"]
    assert changed[5]["train/loss"] != continued[4]["train/loss"]


@pytest.fixture(scope="module")
def continued(problem: Problem, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, float]]:
    """The series of the run when it continues as it was."""
    run = tmp_path_factory.mktemp("continued") / "run"
    problem.train(problem.copy(run))
    return read_metrics(run)


def test_a_finished_run_goes_on_for_more_steps_of_another_size(problem: Problem, tmp_path: Path) -> None:
    """Pairs follow those that were consumed, so that none is skipped or repeated in an epoch."""
    config = problem.copy(tmp_path / "run")
    problem.train(config)
    assert (tmp_path / "run" / "DONE").exists()
    asked = ("train.resume=changed", "train.steps=8", "batch.global_pairs=4", "optimizer.schedule=constant")
    logged = problem.train(config, *asked)
    assert "continuing with train.steps 8, was 6" in logged
    saved = metadata(tmp_path / "run", 8)
    assert saved["consumed_pairs"] == 6 * 6 + 2 * 4
    assert [step["train/lr"] for step in read_metrics(tmp_path / "run")[6:]] == [1e-3, 1e-3]
    assert json.loads((tmp_path / "run" / "DONE").read_text()) == {"step": 8}
    # The same command again has nothing to do, and the run is by now what it became.
    again = problem.train(config, *asked)
    assert f"nothing to do in {tmp_path / 'run'}: step 8 of 8 is done, and the run is finished: give" in again
    assert f"the model: {tmp_path / 'run' / 'checkpoints' / 'step_00000008'}" in again
    # It is said before models are built, which ends with their sizes.
    assert "parameters on rank 0" in logged
    assert "parameters on rank 0" not in again
    assert "step 8 of 8 is done" in problem.train(config, *asked, "train.resume=same")
    assert "train.exit_step is 7: leave it out" in problem.train(config, *asked, "train.steps=9", "train.exit_step=7")
    assert "train.steps=5 asks for 5 steps" in problem.refusal(config, *asked, "train.steps=5")
    branch = f"train.branch_from={tmp_path / 'run' / 'checkpoints' / 'step_00000008'}"
    config = merged(config, output_dir=str(tmp_path / "branch"))
    assert "train.steps=8 asks for 8 steps" in problem.refusal(config, *asked[1:], branch)
    assert not (tmp_path / "branch" / "DONE").exists()


def test_a_stop_after_a_change_is_continued_exactly(problem: Problem, tmp_path: Path) -> None:
    asked = ("train.resume=changed", "train.steps=8", "batch.global_pairs=4", "optimizer.beta1=0.8")
    problem.train(problem.copy(tmp_path / "whole"), *asked)
    config = problem.copy(tmp_path / "again")
    problem.train(config, *asked, "train.exit_step=5")
    problem.train(config, *asked[1:])
    whole, again = read_metrics(tmp_path / "whole"), read_metrics(tmp_path / "again")
    keys = ("step", "train/loss", "train/grad_norm", "train/lr")
    assert [[step[key] for key in keys] for step in again] == [[step[key] for key in keys] for step in whole]
    assert len(whole) == 8


def test_other_data_starts_at_its_beginning(problem: Problem, tmp_path: Path) -> None:
    write_pairs(tmp_path / "other.jsonl", 20)
    config = merged(problem.copy(tmp_path / "run"), data={"train": str(tmp_path / "other.jsonl")})
    assert "data.train of other token ids" in problem.refusal(config)
    problem.train(config, "train.resume=changed")
    assert metadata(tmp_path / "run", STEPS)["consumed_pairs"] == (STEPS - STOP) * 6


def test_a_branch_has_the_weights_and_the_optimizer(
    problem: Problem, continued: list[dict[str, float]], tmp_path: Path
) -> None:
    checkpoint = problem.root / "stopped" / "checkpoints" / "step_00000003"
    config = merged(problem.config, train={"branch_from": str(checkpoint)}, output_dir=str(tmp_path / "same"))
    problem.train(config)
    assert read_metrics(tmp_path / "same")[-1]["train/loss"] == continued[-1]["train/loss"]
    config = merged(config, output_dir=str(tmp_path / "branch"), optimizer={"lr": 1e-4})
    problem.train(config, "train.exit_step=4")
    problem.train(config)
    steps = read_metrics(tmp_path / "branch")
    assert [step["step"] for step in steps] == [4, 5, 6]
    assert steps[0]["train/loss"] == continued[3]["train/loss"]
    assert steps[0]["train/lr"] == pytest.approx(cosine(1e-4, 4, STEPS), rel=1e-9)
    changes = metadata(tmp_path / "branch", 6)["changes"]
    assert {change["key"]: change["after_step"] for change in changes} == {"optimizer.lr": 3, "output_dir": 3}
    # Without its optimizer it is a model like any other.
    fresh = merged(problem.config, output_dir=str(tmp_path / "fresh"), model={"policy": str(checkpoint)})
    problem.train(fresh, f"model.reference={problem.config['model']['policy']}", "train.check_start=false")
    assert [step["step"] for step in read_metrics(tmp_path / "fresh")] == list(range(1, STEPS + 1))
    line = problem.refusal(merged(config, output_dir=str(tmp_path / "no"), train={"branch_from": str(tmp_path)}))
    assert f"{tmp_path}: not a complete Megatron checkpoint" in line


def test_a_checkpoint_that_is_cut_off_is_not_branched_from(problem: Problem, tmp_path: Path) -> None:
    """Sizes are compared even where checksums are not."""
    checkpoint = shutil.copytree(problem.root / "stopped" / "checkpoints" / "step_00000003", tmp_path / "cut")
    file = next(checkpoint.glob("*.distcp"))
    size = file.stat().st_size
    os.truncate(file, size - 1)
    config = merged(problem.config, train={"branch_from": str(checkpoint)}, output_dir=str(tmp_path / "run"))
    line = problem.refusal(config, "checkpoint.verify=false")
    damage = f"{file}: {size - 1:,} bytes, {size:,} were written"
    assert line == f"error: train.branch_from: {damage}: name another checkpoint"


@pytest.mark.parametrize("role", ["guide", "reference", "policy"])
def test_a_model_that_was_replaced_in_place_is_refused_by_name(problem: Problem, tmp_path: Path, role: str) -> None:
    """By files of the same names and sizes."""
    models = {name: str(shutil.copytree(problem.root / "policy", tmp_path / name)) for name in ("policy", "reference")}
    models["guide"] = str(shutil.copytree(problem.root / "guide", tmp_path / "guide"))
    config = merged(problem.copy(tmp_path / "run"), model=models)
    # First as it was: the same bytes at other paths.
    assert "continuing after step 3" in problem.train(config, "train.exit_step=4")
    other = other_weights(tmp_path / role, tmp_path / "other")
    shutil.copyfile(other / "model.safetensors", tmp_path / role / "model.safetensors")
    line = problem.refusal(config, processes=2)
    assert f"model.{role} of other weights" in line
    assert len(read_metrics(tmp_path / "run")) == 4
    if role == "policy":
        assert "cannot be continued" in problem.refusal(config, "train.resume=changed")
    else:
        assert f"continuing with model.{role} of other weights" in problem.train(config, "train.resume=changed")


def test_tokens_that_were_replaced_in_place_are_refused(problem: Problem, tmp_path: Path) -> None:
    """Other valid token ids in a file of the same size; the manifest beside it is the old one."""
    (binary,) = (problem.root / "stopped" / "data").glob("*.bin")
    for file in binary.parent.glob(f"{binary.stem}.*"):
        shutil.copyfile(file, tmp_path / file.name)
    config = merged(problem.copy(tmp_path / "run"), data={"train": str(tmp_path / binary.stem)})
    problem.train(config, "train.exit_step=4")
    content = bytearray((tmp_path / binary.name).read_bytes())
    content[0:4], content[4:8] = content[4:8], content[0:4]
    assert content[0:4] != content[4:8]
    (tmp_path / binary.name).write_bytes(bytes(content))
    assert f"{binary.name} is damaged" in problem.refusal(config, processes=2)
    assert f"{binary.name} is damaged" in problem.refusal(merged(config, output_dir=str(tmp_path / "new")))


def test_nothing_is_hashed_twice(problem: Problem, tmp_path: Path) -> None:
    config = problem.copy(tmp_path / "run")
    assert "hashing" in problem.train(config, "train.exit_step=4")  # the data is at another path
    assert "hashing" not in problem.train(config, "train.exit_step=5")
    assert "hashing 7 files" in problem.train(config, "train.rehash=true")
