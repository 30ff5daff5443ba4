"""Whole LoRA runs: the identities of the loss, one base for three models, stopping and going on, runs as guides."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from megatron_tgdpo.checkpoints import find_model
from megatron_tgdpo.checkpoints.listing import newest_checkpoint
from megatron_tgdpo.checkpoints.reader import CheckpointReader
from megatron_tgdpo.errors import UserError
from tests.distributed.common import make_problem, merged, read_metrics
from tests.processes import run_forked
from tests.tiny_models import make_llama
from tgdpo import pipeline

SERIES = ("train/loss", "train/grad_norm", "train/lr", "rewards/margins")
TP2 = {"tensor": 2, "sequence_parallel": True}
PP2 = {"pipeline": 2}


@pytest.fixture(scope="module")
def problem(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    root = tmp_path_factory.mktemp("lora-runs")
    config = make_problem(root, tied=True)
    return root, merged(
        config, lora={"rank": 4}, optimizer={"lr": 1e-2, "eps": 1e-6}, checkpoint={"keep": 0, "every_steps": 6}
    )


@pytest.fixture(scope="module")
def runs(problem: tuple[Path, dict[str, Any]]) -> Path:
    """All runs in one launch of two processes."""
    root, config = problem

    def named(name: str, **sections: Any) -> dict[str, Any]:
        return {
            "config": merged(config, output_dir=str(root / name), **sections),
            "export": str(root / name / "adapter"),
        }

    dpo = {"loss": {"method": "dpo"}, "model": {"guide": None}}
    cases = [
        named("dpo", **dpo),
        named("alpha-0", loss={"alpha": 0.0}),
        # The adapter that a run begins with changes nothing.
        named("first-step", train={"exit_step": 1}, optimizer={"lr": 0.0}, **dpo),
        named("guide-zero", model={"guide": str(root / "first-step")}),
        named("guide-run", model={"guide": str(root / "dpo")}, parallel=TP2),
        named("guide-peft", model={"guide": str(root / "dpo" / "adapter")}),
        named("whole", parallel=TP2),
        named("stopped", parallel=TP2, train={"exit_step": 3}),
        named("stopped", parallel=TP2),
        named("moved", parallel=TP2, train={"exit_step": 3}),
        named("moved", parallel=PP2),
        # All weights train: the guide is an adapter of the reference, which is the policy's start.
        named("full", model={"guide": str(root / "dpo" / "adapter")}, lora={"rank": None}, parallel=PP2),
        named("bf16", precision={"dtype": "bf16"}, parallel=TP2, model={"guide": str(root / "dpo")}),
    ]
    for case in cases:
        if "exit_step" in case["config"]["train"] or case["config"]["lora"]["rank"] is None:
            del case["export"]
    file = root / "cases.json"
    file.write_text(json.dumps(cases))
    run_forked("tests.distributed.worker_train", [str(file)], processes=2, timeout=900)
    return root


def series(run: Path) -> dict[str, list[float]]:
    steps = read_metrics(run)
    assert [step["step"] for step in steps] == list(range(1, 7))
    return {name: [step[name] for step in steps] for name in SERIES}


def close(ours: dict[str, list[float]], theirs: dict[str, list[float]], rel: float = 1e-5) -> None:
    for name, values in ours.items():
        assert values == pytest.approx(theirs[name], rel=rel, abs=1e-6), name


@pytest.mark.parametrize("name", ["dpo", "alpha-0", "guide-zero", "guide-run", "whole", "full", "bf16"])
def test_a_fresh_adapter_is_the_reference(runs: Path, name: str) -> None:
    steps = read_metrics(runs / name)
    assert steps[0]["train/loss"] == pytest.approx(math.log(2), rel=1e-3 if name == "bf16" else 1e-6)
    assert abs(steps[-1]["train/loss"] - math.log(2)) > 1e-3, "nothing was learned"


@pytest.mark.parametrize("name", ["alpha-0", "guide-zero"])
def test_tgdpo_without_guidance_is_dpo(runs: Path, name: str) -> None:
    close(series(runs / name), series(runs / "dpo"))


def test_guidance_counts(runs: Path) -> None:
    assert series(runs / "guide-run")["train/loss"] != pytest.approx(series(runs / "dpo")["train/loss"], rel=1e-4)


def test_a_run_and_its_export_are_the_same_guide(runs: Path) -> None:
    close(series(runs / "guide-run"), series(runs / "guide-peft"))


def test_a_run_goes_on_as_if_it_had_not_stopped(runs: Path) -> None:
    assert series(runs / "stopped") == series(runs / "whole")
    ours, theirs = (load_file(runs / name / "adapter" / "adapter_model.safetensors") for name in ("stopped", "whole"))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())


def test_a_run_goes_on_on_another_layout(runs: Path) -> None:
    close(series(runs / "moved"), series(runs / "whole"))


def test_checkpoints_hold_the_adapter_alone(runs: Path) -> None:
    checkpoint = newest_checkpoint(runs / "whole")
    assert checkpoint is not None
    tensors = CheckpointReader(checkpoint).tensors
    assert all(".adapter." in name for name in tensors)
    # Weights, fp32 copy and two moments of each.
    assert len(tensors) == 4 * 4 * 2


def test_the_base_is_there_once(problem: tuple[Path, dict[str, Any]], runs: Path) -> None:
    root, config = problem
    file = root / "counted.json"
    guide = {"guide": str(runs / "dpo" / "adapter")}
    file.write_text(json.dumps(merged(config, model=guide, parallel=PP2, output_dir=str(root / "counted"))))
    done = run_forked("tests.distributed.worker_colocated", [str(file)], processes=2)
    whole, in_chunks = [line for line in done.stdout.splitlines() if line.startswith("FACTS ")]
    for facts in (fact for line in (whole, in_chunks) for fact in json.loads(line.removeprefix("FACTS "))):
        assert facts["frozen_widths"] == [64, 64], "reference and guide run along"
        assert facts["frozen_elements"] == 0, "their weights are the policy's"
        adapters = facts["policy_elements"] - facts["policy_only_elements"]
        trained = adapters / 2  # the guide's is as large
        assert facts["optimizer_elements"] == trained
        # Padded to what data ranks divide, of each chunk.
        assert trained <= facts["buffer_elements"] < trained + 2 * 1024
        assert facts["policy_gradient_norm"] > 0
        assert facts["backward_bytes"] == facts["policy_only_backward_bytes"]


def test_a_guidance_cache_is_not_made_with_an_adapter_of_another_base(
    problem: tuple[Path, dict[str, Any]], runs: Path
) -> None:
    root, config = problem
    make_llama(root / "other", seed=3, tied=True)
    models = {"policy": str(root / "other"), "guide": str(runs / "dpo")}
    ours = merged(
        config,
        model=models,
        guidance={"mode": "cached", "cache": str(root / "other-cache")},
        output_dir=str(root / "other-run"),
    )
    file = root / "other.json"
    file.write_text(json.dumps([{"config": ours, "precompute": 8}]))
    done = run_forked("tests.distributed.worker_train", [str(file)], check=False)
    assert done.returncode != 0
    assert "the guide's adapter" in done.stderr
    assert "was trained on another model than model.policy" in done.stderr
    assert not list((root / "other-cache").glob("train/shard-*"))


def test_a_pipeline_goes_on_with_a_run_that_is_trained(
    problem: tuple[Path, dict[str, Any]], runs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root, config = problem
    file = root / "pipeline.yaml"
    trained = merged(config, model={"guide": None}, loss={"method": "dpo"}, output_dir=str(runs / "dpo"))
    file.write_text(json.dumps(trained))
    pipeline.main([str(file), "--list"])
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["train", "complete"] in lines
    assert ["export", "to", "do"] in lines


def test_the_best_checkpoint_of_a_lora_run_is_no_whole_model(runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    newest = newest_checkpoint(runs / "dpo")
    monkeypatch.setattr(find_model, "_best_of_run", lambda *_: newest)
    assert find_model.find_local_model(runs / "dpo" / "best", "model.guide", adapter=True) == newest
    with pytest.raises(UserError, match="an adapter, of a LoRA run, no whole model"):
        find_model.find_local_model(runs / "dpo" / "best", "model.policy")
