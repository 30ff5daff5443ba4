"""Overlap and offload change no figure: losses, gradient norms and checkpoints of runs with and without them."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.distributed.common import merged, read_metrics, write_pairs
from tests.processes import run_forked
from tests.tiny_models import make_model

KEYS = ("train/loss", "train/grad_norm", "rewards/margins")
# Packs hold one pair: with three pairs a step, one of the two data ranks runs an empty pack last, and there every
# parameter must still become ready (the norms of query and key heads too).
RUNS: dict[str, dict[str, Any]] = {
    "plain": {},
    "grad_reduce": {"overlap": {"grad_reduce": True}},
    "both": {"overlap": {"grad_reduce": True, "param_gather": True}},
    "both-continued": {"overlap": {"grad_reduce": True, "param_gather": True}},
    "frozen": {"offload": {"frozen": True}},
    "frozen-disk": {"offload": {"frozen": True, "frozen_from": "disk"}},
    "unfused": {"train": {"fused": "off"}},
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("overlap")
    for seed, name in enumerate(("policy", "guide")):
        make_model(root / name, "qwen3", layers=2, seed=seed)
    write_pairs(root / "pairs.jsonl", 12)
    base: dict[str, Any] = {
        "model": {"policy": str(root / "policy"), "guide": str(root / "guide")},
        "data": {"train": str(root / "pairs.jsonl"), "max_length": 64, "workers": 1},
        "parallel": {"timeout_minutes": 15},
        "batch": {"global_pairs": 3, "tokens_per_micro_batch": 128, "shared_prompts": False},
        "optimizer": {"lr": 1e-3, "warmup_ratio": 0.0},
        "precision": {"dtype": "fp32"},
        "train": {"steps": 4},
        "checkpoint": {"every_steps": 2, "keep": 0},
        "preflight": {"enabled": False},
    }
    cases = []
    for name, changes in RUNS.items():
        config = merged(base, **changes, output_dir=str(root / name))
        if name == "both-continued":
            cases.append({"config": merged(config, train={"exit_step": 2}), "export": None})
        cases.append({"config": config, "export": str(root / f"hf-{name}")})
    (root / "cases.json").write_text(json.dumps(cases))
    run_forked("tests.distributed.worker_train", [str(root / "cases.json")], processes=2)
    return root


@pytest.mark.parametrize("name", [name for name in RUNS if name != "plain"])
def test_series_and_weights_are_identical(runs: Path, name: str) -> None:
    plain, other = read_metrics(runs / "plain"), read_metrics(runs / name)
    assert [[step[key] for key in KEYS] for step in other] == [[step[key] for key in KEYS] for step in plain]
    assert len({step["train/loss"] for step in plain}) == 4
    wanted, found = (load_file(runs / f"hf-{which}" / "model.safetensors") for which in ("plain", name))
    assert wanted.keys() == found.keys()
    assert all(torch.equal(found[key], wanted[key]) for key in wanted)
    start = load_file(runs / "policy" / "model.safetensors")
    assert not torch.equal(start["model.norm.weight"], wanted["model.norm.weight"])
