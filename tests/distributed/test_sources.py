"""Runs whose data are shards, weighted datasets and several validation sets; and whose inputs are named on the Hub."""

import gzip
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from megatron_tgdpo.output.directory import SUMMARY_FILE
from tests.distributed.common import make_problem, merged, read_metrics
from tests.hub import Hub, serving
from tests.launch import run_module
from tests.processes import run_forked

SERIES = ("train/loss", "train/grad_norm", "rewards/margins", "logps/chosen")


@pytest.fixture(scope="module")
def problem(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """32 pairs in one file, and the same in two shards, of which one is compressed."""
    root = tmp_path_factory.mktemp("sources")
    config = merged(make_problem(root), preflight={"enabled": False})
    lines = (root / "pairs.jsonl").read_text().splitlines(keepends=True)
    (root / "shards").mkdir()
    (root / "shards" / "train-0.jsonl").write_text("".join(lines[:20]))
    (root / "shards" / "train-1.jsonl.gz").write_bytes(gzip.compress("".join(lines[20:]).encode()))
    return root, config


def train(root: Path, config: dict[str, Any], name: str, *, processes: int = 1, check: bool = True) -> Any:
    """Trains into ``root/name``; returns what the process left."""
    file = root / f"{name}.json"
    file.write_text(json.dumps(merged(config, output_dir=str(root / name))))
    return run_forked("megatron_tgdpo.train", [str(file)], processes=processes, check=check)


def series(directory: Path) -> list[list[float]]:
    return [[step[key] for key in SERIES] for step in read_metrics(directory)]


def test_shards_train_as_the_whole_file(problem: tuple[Path, dict[str, Any]]) -> None:
    root, config = problem
    shards = [f"{root}/shards/train-0.jsonl", f"{root}/shards/train-1.jsonl.gz"]
    train(root, config, "whole")
    weighted = [{"path": path, "weight": 1} for path in shards]
    for name, value in (("list", shards), ("directory", f"{root}/shards"), ("glob", f"{root}/shards/*"),
                        ("entries", [weighted[0], shards[1]])):  # fmt: skip
        train(root, merged(config, data={"train": value}), name)
        assert series(root / name) == series(root / "whole"), name
    # Of two datasets, too, which only a weight keeps apart here.
    (summary,) = json.loads((root / "list" / SUMMARY_FILE).read_text())["train"]
    assert (summary["pairs"], summary["sources"]) == (32, shards)


def test_weights_continue_on_any_layout(problem: tuple[Path, dict[str, Any]]) -> None:
    root, config = problem
    shards: list[dict[str, Any]] = [{"path": f"{root}/shards/train-0.jsonl", "weight": 0.3}]
    shards.append({"path": f"{root}/shards/train-1.jsonl.gz", "weight": 2})
    config = merged(config, data={"train": shards}, checkpoint={"every_steps": 3})
    train(root, merged(config, data={"train": shards[::-1]}), "reversed")
    train(root, config, "weighted")
    assert series(root / "weighted") != series(root / "reversed")
    train(root, merged(config, train={"exit_step": 3}), "stopped")
    train(root, config, "stopped")
    assert series(root / "stopped") == series(root / "weighted")
    # On two data ranks the same pairs, whose losses are summed in another order.
    train(root, config, "two", processes=2)
    for ours, theirs in zip(series(root / "two"), series(root / "weighted"), strict=True):
        assert ours == pytest.approx(theirs, rel=2e-5, abs=1e-5)
    # A weight is part of what the run is.
    shards[0]["weight"] = 0.5
    done = train(root, merged(config, data={"train": shards}), "stopped", check=False)
    assert done.returncode == 1
    assert "data.train of other token ids" in done.stderr
    done = train(root, merged(config, data={"train": [{**shards[0], "weight": 0.001}]}), "none", check=False)
    assert "data.train: a weight of 0.001 takes none of the 20 pairs" in done.stderr


def test_validation_sets_have_metrics_of_their_own(problem: tuple[Path, dict[str, Any]]) -> None:
    root, config = problem
    config = merged(config, train={"steps": 1})
    first, second = f"{root}/shards/train-0.jsonl", f"{root}/shards/train-1.jsonl.gz"
    train(root, merged(config, data={"validation": second}), "unnamed")
    done = train(root, merged(config, data={"validation": {"first": first, "second": [second]}}), "named")
    (one,), (two,) = read_metrics(root / "unnamed"), read_metrics(root / "named")
    names = [name.removeprefix("eval/") for name in one if name.startswith("eval/")]
    assert {"loss", "rewards/accuracies", "guidance/weight_std"} <= set(names)
    assert {name for name in two if name.startswith("eval/")} == {
        f"eval/{group}/{name}" for group in ("first", "second") for name in names
    }
    for name in names:
        assert two[f"eval/second/{name}"] == one[f"eval/{name}"]
    assert two["eval/first/logps/chosen"] != two["eval/second/logps/chosen"]
    assert "eval/first at step 1: loss " in done.stderr
    assert "eval/second at step 1: loss " in done.stderr


def test_caches_of_several_datasets(problem: tuple[Path, dict[str, Any]]) -> None:
    root, config = problem
    first, second = f"{root}/shards/train-0.jsonl", f"{root}/shards/train-1.jsonl.gz"
    data = {"train": [{"path": first, "weight": 0.5}, {"path": second, "weight": 2}]}
    config = merged(config, data={**data, "validation": {"first": first, "second": second}}, train={"steps": 2})
    train(root, config, "colocated")
    cached = merged(config, guidance={"mode": "cached", "cache": str(root / "cache")})
    file = root / "precompute.json"
    file.write_text(json.dumps(cached))
    run_forked("tgdpo.guidance", [str(file)])
    train(root, cached, "cached")
    for ours, theirs in zip(read_metrics(root / "cached"), read_metrics(root / "colocated"), strict=True):
        for name in ours:
            if not name.startswith("perf/"):
                assert ours[name] == pytest.approx(theirs[name], rel=2e-5, abs=1e-5), name


def test_the_user_is_told_what_became_of_the_data(problem: tuple[Path, dict[str, Any]]) -> None:
    root, config = problem
    told = train(root, merged(config, data={"max_length": 30}, train={"steps": 1}), "told").stderr
    (summary,) = json.loads((root / "told" / SUMMARY_FILE).read_text())["train"]
    cut = summary["truncated"]["chosen"] + summary["truncated"]["rejected"]
    assert summary["lost_ends"] == cut > 0.05 * summary["responses"]
    assert summary["responses"] == 64
    assert f"{summary['pairs']} pairs" in told
    assert f"chosen {summary['truncated']['chosen']}" in told
    assert f"({cut} of 64) are cut and lose their end token" in told
    # Preprocessing says the same, and more.
    arguments = ["--input", f"{root}/pairs.jsonl", "--tokenizer", f"{root}/policy", "--output", f"{root}/by/hand",
                 "--max-length", "30", "--workers", "1"]  # fmt: skip
    done = run_forked("tgdpo.preprocess", arguments)
    assert f"truncated: {', '.join(f'{what} {count}' for what, count in summary['truncated'].items())}" in done.stdout
    assert f"({cut} of 64) are cut and lose their end token" in done.stderr
    assert "lose their end token" not in train(root, merged(config, train={"steps": 1}), "short").stderr


@pytest.fixture
def hub() -> Iterator[Hub]:
    with serving() as served:
        yield served


def test_a_run_from_the_hub_stays_with_its_commits(
    problem: tuple[Path, dict[str, Any]], hub: Hub, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Online on two ranks, then offline after both repositories went on, then in an empty cache."""
    root, config = problem
    model = hub.commit_directory("models/owner/policy", root / "policy")
    lines = (root / "pairs.jsonl").read_text()
    data = hub.commit("datasets/owner/pairs", {"train.jsonl": lines, "test.jsonl": lines})
    ours = merged(config, model={"policy": "owner/policy"}, output_dir=str(tmp_path / "run"))
    ours = merged(ours, data={"train": {"path": "owner/pairs", "split": "train"}}, checkpoint={"every_steps": 3})
    file = tmp_path / "config.json"
    file.write_text(json.dumps(ours))
    for name, value in hub.environment(tmp_path / "home").items():
        monkeypatch.setenv(name, value)
    run_module("megatron_tgdpo.train", [str(file), "train.exit_step=3"], processes=2)
    pins = json.loads((tmp_path / "run" / "hub.json").read_text())
    assert pins == {
        "model": {"owner/policy": f"owner/policy@{model}"}, "dataset": {"owner/pairs": f"owner/pairs@{data}"},
        "run": {},
    }  # fmt: skip
    recorded = json.loads((tmp_path / "run/checkpoints/step_00000003/tgdpo.json").read_text())["config"]
    assert recorded["model"]["policy"] == f"owner/policy@{model}"
    assert recorded["data"]["train"] == {"path": f"owner/pairs@{data}", "split": "train"}
    hub.commit_directory("models/owner/policy", root / "guide")
    hub.commit("datasets/owner/pairs", {"train.jsonl": lines[: len(lines) // 2]})
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    run_module("megatron_tgdpo.train", [str(file)])
    train(root, merged(config, checkpoint={"every_steps": 3}), "local")
    for got, want in zip(series(tmp_path / "run"), series(root / "local"), strict=True):
        assert got == pytest.approx(want, rel=2e-5, abs=1e-5)
    shutil.rmtree(tmp_path / "home")
    done = run_module("megatron_tgdpo.train", [str(file)], check=False)
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert done.returncode == 1
    assert f"hf download owner/policy --revision {model}; or" in line
