"""Training from a guidance cache gives what training with the models gives, whatever layout made the cache."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from safetensors.numpy import load_file

from megatron_tgdpo.data.dataset import PreferenceDataset
from megatron_tgdpo.guidance.cache import GuidanceCache, shard_path, write_manifest, write_shard
from megatron_tgdpo.storage import atomic_file
from tests.distributed.common import make_problem, merged, read_metrics
from tests.launch import PATIENCE, ROOT, environment, run_module
from tests.processes import run_forked

STEPS = 4
SAME = ("train/loss", "train/grad_norm", "eval/loss", "rewards/margins", "guidance/weight_std", "logps/chosen")
# Layouts of trainings and, by the same names, of the caches they read; packs and shards of a cache.
LAYOUTS: dict[str, dict[str, Any]] = {
    "dp2": {},
    "tp2": {"tensor": 2, "sequence_parallel": True},
    "pp2": {"pipeline": 2},
    "cp2": {"context": 2},
}
CACHES = {"dp2": (256, 5), "tp2": (512, 32), "pp2": (128, 7), "cp2": (384, 32)}


class Problem:
    """Configs of one problem, co-located and cached."""

    def __init__(self, root: Path) -> None:
        self.root = root
        config = make_problem(root)
        self.config = merged(
            config,
            data={"validation": config["data"]["train"]},
            train={"steps": STEPS},
            checkpoint={"every_steps": STEPS},
            preflight={"enabled": False},
        )

    def colocated(self, name: str) -> dict[str, Any]:
        return merged(self.config, parallel=LAYOUTS[name], output_dir=str(self.root / f"colocated-{name}"))

    def cached(self, name: str, **sections: Any) -> dict[str, Any]:
        guidance = {"mode": "cached", "cache": str(self.root / f"cache-{name}")}
        config = merged(self.config, guidance=guidance, parallel=LAYOUTS[name])
        return merged(config, **{"output_dir": str(self.root / f"cached-{name}"), **sections})

    def cache(self, name: str, split: str = "train") -> GuidanceCache:
        (prefix,) = (self.root / f"cache-{name}" / "data").glob("*.manifest.json")
        dataset = PreferenceDataset(str(prefix).removesuffix(".manifest.json"))
        return GuidanceCache(self.root / f"cache-{name}" / split, dataset.lengths, use_guide=True)

    def write(self, name: str, config: dict[str, Any]) -> str:
        path = self.root / name
        path.write_text(yaml.safe_dump(config))
        return str(path)


@pytest.fixture(scope="module")
def problem(tmp_path_factory: pytest.TempPathFactory) -> Problem:
    """All caches and trainings, in one launch of two processes."""
    made = Problem(tmp_path_factory.mktemp("guidance"))
    cases: list[dict[str, Any]] = []
    for name, (pack, block) in CACHES.items():
        cases.append({"config": made.cached(name, batch={"tokens_per_micro_batch": pack}), "precompute": block})
    cases += [{"config": made.colocated(name)} for name in LAYOUTS]
    cases += [{"config": made.cached(name)} for name in LAYOUTS]
    alone = {"loss": {"method": "dpo"}, "model": {"guide": None}, "output_dir": str(made.root / "cached-dpo")}
    cases.append({"config": made.cached("dp2", **alone)})
    cases.append({"config": merged(made.colocated("dp2"), **{**alone, "output_dir": str(made.root / "colocated-dpo")})})
    # A cache made in one layout and checked in another.
    elsewhere = {"parallel": {**LAYOUTS["pp2"], "context": 1}, "guidance": {"cache": str(made.root / "cache-cp2")}}
    cases.append({"config": made.cached("cp2", **elsewhere), "verify": 8})
    (made.root / "cases.json").write_text(json.dumps(cases))
    run_forked("tests.distributed.worker_train", [str(made.root / "cases.json")], processes=2)
    return made


@pytest.mark.parametrize("name", [*LAYOUTS, "dpo"])
def test_cached_training_repeats_colocated_training(problem: Problem, name: str) -> None:
    cached = read_metrics(problem.root / f"cached-{name}")
    colocated = read_metrics(problem.root / f"colocated-{name}")
    assert len(cached) == len(colocated) == STEPS
    for got, want in zip(cached, colocated, strict=True):
        for key in SAME:
            if key in want:
                assert got[key] == pytest.approx(want[key], rel=2e-5, abs=1e-5), f"{key} of step {want['step']}"
    assert "eval/loss" in cached[-1]


def test_the_layout_that_made_a_cache_does_not_matter(problem: Problem) -> None:
    caches = {name: problem.cache(name) for name in CACHES}
    for pair in range(32):
        want = np.stack(caches["dp2"].logps(pair))  # type: ignore[arg-type]
        assert want.min() < -1.0
        for name, cache in caches.items():
            got = np.stack(cache.logps(pair))  # type: ignore[arg-type]
            assert np.allclose(got, want, atol=2e-5), f"pair {pair} of {name}"


def precompute(problem: Problem, config: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    return run_forked("tgdpo.guidance", [config, *arguments], check=False)


def test_killed_at_any_moment_it_continues(problem: Problem) -> None:
    """The first start is killed once three shards are there; the second keeps them."""
    directory = problem.root / "cache-killed"
    guidance = {"mode": "cached", "cache": str(directory)}
    config = problem.write("killed.yaml", merged(problem.cached("dp2"), guidance=guidance, data={"validation": None}))
    arguments = [sys.executable, "-m", "tgdpo.guidance", config, "--block-pairs", "1"]
    process = subprocess.Popen(arguments, cwd=ROOT, env=environment())
    deadline = time.monotonic() + PATIENCE
    while not shard_path(directory / "train", 2).exists():
        assert process.poll() is None, "it ended before it was killed"
        assert time.monotonic() < deadline, "no shards appeared"
        time.sleep(0.005)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    # As a kill in the middle of a write would leave it.
    host, namespace = atomic_file._here()
    left = directory / "train" / f"shard-00031.safetensors.{host}-{namespace}-{process.pid}-1-00c0ffee.tmp"
    left.write_bytes(b"half")
    before = {path.name: path.stat().st_mtime_ns for path in (directory / "train").glob("shard-*.safetensors")}
    assert len(before) < 32, "it was done before it was killed"
    assert not (directory / "train" / "manifest.json").exists()
    refused = run_forked("megatron_tgdpo.train", [config, f"output_dir={problem.root / 'refused'}"], check=False)
    assert refused.returncode == 1
    assert "no complete guidance cache" in refused.stderr
    done = precompute(problem, config, "--block-pairs", "1")
    assert done.returncode == 0, done.stderr
    assert not left.exists()
    after = {path.name: path.stat().st_mtime_ns for path in (directory / "train").glob("shard-*.safetensors")}
    assert len(after) == 32
    assert before.items() <= after.items()
    killed, whole = problem.cache("killed"), problem.cache("dp2")
    for pair in range(32):
        assert np.allclose(np.stack(killed.logps(pair)), np.stack(whole.logps(pair)), atol=2e-5)  # type: ignore[arg-type]


def test_a_cache_of_another_guide_or_with_a_flipped_byte_is_refused(problem: Problem) -> None:
    shard = shard_path(problem.root / "cache-dp2" / "train", 3)
    content = shard.read_bytes()
    output = problem.root / "refused-again"
    config = problem.write("stale.yaml", problem.cached("dp2", output_dir=str(output)))
    shard.write_bytes(content[:-5] + bytes([content[-5] ^ 4]) + content[-4:])
    damaged = run_forked("megatron_tgdpo.train", [config], check=False)
    verified = precompute(problem, config, "--verify", "4")
    shard.write_bytes(content)
    stale = run_forked("megatron_tgdpo.train", [config, f"model.guide={problem.root / 'policy'}"], check=False)
    overwritten = precompute(problem, config, f"model.guide={problem.root / 'policy'}")
    for done, message in (
        (damaged, "shard-00003.safetensors: missing or damaged"),
        (stale, "made for another guide"),
        (overwritten, "made for another guide"),
    ):
        assert done.returncode == 1
        (line,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
        assert message in line
    assert verified.returncode == 1


def test_a_wrong_value_is_found_by_computing_it_again(problem: Problem, tmp_path: Path) -> None:
    """A cache that is whole, of the right key, and wrong in one pair."""
    shutil.copytree(problem.root / "cache-tp2", tmp_path / "cache")
    directory, cache = tmp_path / "cache" / "train", problem.cache("tp2")
    values = load_file(shard_path(directory, 0))
    values["guide"] = values["guide"].copy()
    values["guide"][7] -= 0.01
    write_shard(directory, 0, cache.key, values)
    write_manifest(directory, cache.key, cache.shards)
    config = problem.write("wrong.yaml", problem.cached("dp2", guidance={"cache": str(tmp_path / "cache")}))
    done = precompute(problem, config, "--verify", "32")
    assert done.returncode == 1
    assert "a log-prob of the guide in 32 sampled pairs differs by 0.01 (" in done.stderr


def test_a_sweep_uses_one_cache(problem: Problem, tmp_path: Path) -> None:
    config = problem.write("sweep.yaml", problem.cached("dp2", train={"steps": 2}))
    arguments = [config, "--alpha", "0", "0.5", "--beta", "0.1", "--out", str(tmp_path / "sweep")]
    first = run_module("tgdpo.sweep", arguments)
    results = json.loads((tmp_path / "sweep" / "results.json").read_text())
    assert results.keys() == {"alpha0-beta0.1", "alpha0.5-beta0.1"}
    assert {f"{run['eval/loss']:.4f}" for run in results.values()} <= set(first.stdout.split())
    alphas = [results[name]["guidance/weight_std"] for name in ("alpha0-beta0.1", "alpha0.5-beta0.1")]
    assert alphas[0] == 0.0 < alphas[1]
    # Nothing is trained again.
    again = run_module("tgdpo.sweep", arguments)
    assert "===" not in again.stdout
    assert json.loads((tmp_path / "sweep" / "results.json").read_text()) == results
