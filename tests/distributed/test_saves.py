"""Saves that fail, that are slow, and that nobody asked for."""

import json
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from megatron_tgdpo.signals import FAILED_STATUS, STORAGE_STATUS
from tests.checkpoints import is_complete
from tests.distributed.common import make_problem, merged, read_metrics
from tests.processes import run_forked

STEPS = 12


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    problem = make_problem(tmp_path_factory.mktemp("saves"))
    return merged(problem, train={"steps": STEPS}, checkpoint={"every_steps": 4, "keep": 0})


def write_config(directory: Path, config: dict[str, Any]) -> str:
    file = directory / "config.yaml"
    file.write_text(json.dumps(merged(config, output_dir=str(directory / "run"))))
    return str(file)


def saved_steps(directory: Path) -> list[int]:
    found = list((directory / "run" / "checkpoints").iterdir())
    assert all(is_complete(path) for path in found), found
    return sorted(int(path.name[5:]) for path in found)


@pytest.mark.parametrize("failing", [1, 2])
def test_a_save_that_fails_once_is_made_up_for(config: dict[str, Any], tmp_path: Path, failing: int) -> None:
    """The second of three, and the last."""
    file = write_config(tmp_path, config)
    done = run_forked("tests.distributed.worker_saves", [json.dumps({"fail": [failing]}), file], processes=2)
    assert "Input/output error" in done.stderr
    saved = saved_steps(tmp_path)
    assert saved[0] == 4
    assert saved[-1] == STEPS
    assert (tmp_path / "run" / "DONE").exists()
    assert len(read_metrics(tmp_path / "run")) == STEPS


def test_storage_that_keeps_failing_ends_with_a_status_that_is_requeued(config: dict[str, Any], tmp_path: Path) -> None:
    faults, file = json.dumps({"fail": [1, 2]}), write_config(tmp_path, config)
    done = run_forked("tests.distributed.worker_saves", [faults, file], processes=2, check=False)
    assert done.returncode == STORAGE_STATUS
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert "Input/output error" in line
    assert "Traceback" not in done.stderr
    assert saved_steps(tmp_path) == [4]
    run_forked("megatron_tgdpo.train", [file], processes=2)
    assert saved_steps(tmp_path) == [4, 8, 12]


def test_a_bad_step_does_not_cost_the_save_before_it(config: dict[str, Any], tmp_path: Path) -> None:
    """Writing the state of step 1 takes seconds; step 2 has a pair whose loss is not a number."""
    guide = tmp_path / "guide"
    guide.mkdir()
    for file in Path(config["model"]["guide"]).iterdir():
        (guide / file.name).write_bytes(file.read_bytes())
    weights = load_file(guide / "model.safetensors")
    weights["model.embed_tokens.weight"][:, 0] = 100.0
    weights["lm_head.weight"][3, 0] = -3e38  # the word w3 gets the logit -inf
    save_file(weights, guide / "model.safetensors", metadata={"format": "pt"})
    records = [{"prompt": "w9 w8", "chosen": "w7", "rejected": "w6 w5"} for _ in range(12)]
    records[8]["rejected"] = "w6 w3 w5"
    data = tmp_path / "nan.jsonl"
    data.write_text("".join(json.dumps(record) + "\n" for record in records))
    bad = merged(
        config,
        model={"guide": str(guide)},
        data={"train": str(data), "shuffle": False},
        train={"steps": 2},
        checkpoint={"every_steps": 1},
    )
    arguments = [json.dumps({"slow": 3}), write_config(tmp_path, bad)]
    done = run_forked("tests.distributed.worker_saves", arguments, processes=2, check=False)
    assert done.returncode == 1
    assert "nan.jsonl:9" in done.stderr
    assert saved_steps(tmp_path) == [1]


def test_an_exception_on_one_rank_does_not_cost_the_save_in_flight(config: dict[str, Any], tmp_path: Path) -> None:
    faults, file = json.dumps({"slow": 3, "broken": 5}), write_config(tmp_path, config)
    done = run_forked("tests.distributed.worker_saves", [faults, file], processes=2, check=False)
    assert done.returncode == FAILED_STATUS
    assert saved_steps(tmp_path) == [4]


def test_without_an_interval_a_run_saves_ten_times(config: dict[str, Any], tmp_path: Path) -> None:
    unset = merged(config, train={"steps": 25}, checkpoint={"every_steps": None})
    run_forked("megatron_tgdpo.train", [write_config(tmp_path, unset)])
    assert saved_steps(tmp_path) == [3, 6, 9, 12, 15, 18, 21, 24, 25]


@pytest.mark.parametrize("pattern", ["metrics.jsonl", "tensorboard/train/*"])
def test_a_full_disk_costs_no_step_and_ends_in_one_line(config: dict[str, Any], tmp_path: Path, pattern: str) -> None:
    """In the middle of a line or an event, before the second save; then the same command once more."""
    file = write_config(tmp_path, config)
    done = run_forked("tests.distributed.worker_full_disk", ["6", pattern, file], processes=2, check=False)
    assert done.returncode == STORAGE_STATUS
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert line.endswith("run: metrics.jsonl or tensorboard: cannot be written: File too large")
    assert "Traceback" not in done.stderr
    assert saved_steps(tmp_path) == [4]
    run_forked("megatron_tgdpo.train", [file], processes=2)
    assert [step["step"] for step in read_metrics(tmp_path / "run")] == list(range(1, STEPS + 1))
