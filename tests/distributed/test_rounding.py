"""bf16 with peaked weights: a cache serves every layout, and what is wrong is told from rounding."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from megatron_tgdpo.data.dataset import PreferenceDataset
from megatron_tgdpo.guidance.cache import GuidanceCache, write_manifest, write_shard
from megatron_tgdpo.models.logp_tolerance import NEGLIGIBLE
from tests.distributed.common import merged, read_metrics, write_pairs
from tests.processes import run_forked
from tests.tiny_models import make_model

LAYOUTS: dict[str, dict[str, Any]] = {
    "dp2": {},
    "tp2": {"tensor": 2},
    "tp2-sp": {"tensor": 2, "sequence_parallel": True},
    "cp2": {"context": 2},
    "pp2": {"pipeline": 2},
    "vpp2": {"pipeline": 2, "virtual_pipeline": 2},
}
PAIRS = 16


class Problem:
    """A policy of eight layers whose attention and logits are far from uniform, and its guide."""

    def __init__(self, root: Path) -> None:
        self.root = root
        # Several times the initial weights of real models: one unit of rounding moves a log-prob by 0.03 nats.
        for seed, name in enumerate(("policy", "guide"), 1):
            make_model(root / name, layers=8, seed=seed, initializer_range=0.06)
        write_pairs(root / "pairs.jsonl", PAIRS)

    def config(self, name: str, **sections: Any) -> dict[str, Any]:
        config: dict[str, Any] = {
            "model": {"policy": str(self.root / "policy"), "guide": str(self.root / "guide")},
            "data": {"train": str(self.root / "pairs.jsonl"), "max_length": 128, "workers": 1},
            "guidance": {"mode": "cached", "cache": str(self.root / "cache")},
            "parallel": {"timeout_minutes": 5},
            "batch": {"global_pairs": PAIRS, "tokens_per_micro_batch": 256},
            "optimizer": {"lr": 1e-5},
            "precision": {"dtype": "bf16"},
            "train": {"steps": 1},
            "preflight": {"enabled": False},
            "output_dir": str(self.root / name),
        }
        return merged(config, **sections)

    def cache(self, name: str) -> GuidanceCache:
        (prefix,) = (self.root / name / "data").glob("*.manifest.json")
        dataset = PreferenceDataset(str(prefix).removesuffix(".manifest.json"))
        return GuidanceCache(self.root / name / "train", dataset.lengths, use_guide=True)

    def spoiled(self, fault: str) -> Path:
        """A copy of the cache, whole and of the right key, with one fault in the reference's log-probs."""
        directory = self.root / f"cache-{fault}"
        shutil.copytree(self.root / "cache", directory)
        right = self.cache("cache")
        values = {role: np.concatenate(parts) for role, parts in zip(("reference", "guide"), _all(right), strict=True)}
        if fault == "checkpoint":
            values["reference"] = np.concatenate(_all(self.cache("cache-of-another"))[0])
        else:
            assert fault == "mask"
            start, end = right.shards.offsets(0)[3:5]
            values["reference"][start:end] = np.roll(values["reference"][start:end], 1)
        write_shard(directory / "train", 0, right.key, values)
        write_manifest(directory / "train", right.key, right.shards)
        return directory


def _all(cache: GuidanceCache) -> tuple[list[np.ndarray], ...]:
    return tuple(map(list, zip(*(cache.logps(index) for index in range(PAIRS)), strict=True)))  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def problem(tmp_path_factory: pytest.TempPathFactory) -> Problem:
    """A cache made by data ranks, and trained from on every layout."""
    made = Problem(tmp_path_factory.mktemp("rounding"))
    # The reference after a little training: 1 % of noise on its weights.
    make_model(made.root / "slightly", layers=8, seed=1, initializer_range=0.06, noise=0.01)
    another = {
        "model": {"reference": str(made.root / "slightly")},
        "guidance": {"cache": str(made.root / "cache-of-another")},
    }
    of_tp2 = {"parallel": LAYOUTS["tp2"], "guidance": {"cache": str(made.root / "cache-of-tp2")}}
    cases: list[dict[str, Any]] = [
        {"config": made.config("cache-run"), "precompute": PAIRS},
        {"config": made.config("another", **another), "precompute": PAIRS},
        {"config": made.config("of-tp2", **of_tp2), "precompute": PAIRS},
    ]
    for name, parallel in LAYOUTS.items():
        config = made.config(name, parallel=parallel)
        cases.append({"config": config})
        if name != "vpp2":
            cases.append({"config": config, "verify": PAIRS})
    (made.root / "cases.json").write_text(json.dumps(cases))
    run_forked("tests.distributed.worker_train", [str(made.root / "cases.json")], processes=2, timeout=900)
    return made


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_cache_serves_every_layout(problem: Problem, name: str) -> None:
    (step,) = read_metrics(problem.root / name)
    assert step["train/grad_norm"] > 0


def test_layouts_are_apart_by_rounding(problem: Problem) -> None:
    """By far more than what is never looked into; without that, the tests above would show nothing."""
    ours, theirs = (np.concatenate(_all(problem.cache(name))[0]) for name in ("cache", "cache-of-tp2"))
    assert 100 * NEGLIGIBLE.token < np.sqrt(np.square(ours - theirs).mean()) < 0.5


@pytest.mark.parametrize("fault", ["checkpoint", "mask"])
def test_a_wrong_cache_is_told_from_rounding(problem: Problem, fault: str) -> None:
    """Once by training on another layout, once by computing it again."""
    guidance = {"cache": str(problem.spoiled(fault))}
    file = problem.root / f"{fault}.yaml"
    file.write_text(yaml.safe_dump(problem.config(f"run-{fault}", guidance=guidance, parallel=LAYOUTS["tp2"])))
    trained = run_forked("megatron_tgdpo.train", [str(file)], processes=2, check=False)
    verified = run_forked("tgdpo.guidance", [str(file), "--verify", str(PAIRS)], processes=2, check=False)
    for done, message in ((trained, "the loss is not ln 2"), (verified, "a log-prob of the reference")):
        assert done.returncode == 1
        (line,) = {line for line in done.stderr.splitlines() if line.startswith("error: ")}
        assert message in line
        assert "rounding explains" in line
