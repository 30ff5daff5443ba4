"""Prefetched frozen passes change no bit of a run, whatever the layout, with evaluations and stops in between."""

import json
from pathlib import Path
from typing import Any

import pytest

from megatron_tgdpo.config.loading import config_from_dict
from megatron_tgdpo.errors import UserError
from tests.distributed.common import make_problem, merged, read_metrics
from tests.processes import run_forked
from tests.unit.config.test_loading import VALID

STEPS = 5
LAYOUTS: dict[str, dict[str, Any]] = {
    "pp4": {"pipeline": 4},
    "tp2-pp2": {"tensor": 2, "pipeline": 2, "sequence_parallel": True},
    "dp2-pp2": {"pipeline": 2},
}
SERIES = (
    "train/loss",
    "train/grad_norm",
    "rewards/margins",
    "guidance/weight_std",
    "eval/loss",
    "eval/rewards/margins",
)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All runs, in one launch of four processes."""
    root = tmp_path_factory.mktemp("prefetch")
    config = make_problem(root, tied=True)
    config = merged(
        config,
        data={"validation": config["data"]["train"]},
        batch={"global_pairs": 11, "tokens_per_micro_batch": 128},
        train={"steps": STEPS},
        eval={"every_steps": 2},
        checkpoint={"every_steps": STEPS},
        preflight={"enabled": False},
    )

    def run(kind: str, name: str, prefetch: bool, **train: Any) -> dict[str, Any]:
        sections = {"parallel": LAYOUTS[name], "guidance": {"prefetch": prefetch}, "train": train}
        return {"config": merged(config, **sections, output_dir=str(root / f"{kind}-{name}"))}

    cases = [run("colocated", name, False) for name in LAYOUTS]
    cases += [run("prefetch", name, True) for name in LAYOUTS]
    cases += [run("stopped", "pp4", True, exit_step=3), run("stopped", "pp4", True)]
    (root / "cases.json").write_text(json.dumps(cases))
    run_forked("tests.distributed.worker_train", [str(root / "cases.json")], processes=4)
    return root


@pytest.mark.parametrize("name", ["prefetch-pp4", "prefetch-tp2-pp2", "prefetch-dp2-pp2", "stopped-pp4"])
def test_prefetch_changes_no_bit(runs: Path, name: str) -> None:
    colocated = read_metrics(runs / f"colocated-{name.partition('-')[2]}")
    steps = read_metrics(runs / name)
    assert len(steps) == len(colocated) == STEPS
    assert len({step["train/loss"] for step in steps}) == STEPS - 1  # the first learning rate is 0
    for got, want in zip(steps, colocated, strict=True):
        if name.startswith("prefetch"):
            assert ("eval/loss" in got) == (got["step"] in (2, 4, 5))
        for key in SERIES:
            if key in got and key in want:
                assert got[key] == want[key], f"{key} of step {want['step']}"


@pytest.mark.parametrize(
    ("sections", "expected"),
    [
        ({}, "with one stage"),
        ({"parallel": {"pipeline": 2}, "guidance": {"mode": "cached", "cache": "there"}}, "no frozen models run"),
    ],
)
def test_prefetch_needs_stages_and_frozen_models(sections: dict[str, Any], expected: str) -> None:
    with pytest.raises(UserError, match=f"guidance.prefetch is true.*{expected}"):
        config_from_dict(merged(merged(VALID, **sections), guidance={"prefetch": True}))
