"""``tgdpo doctor`` names everything that would stop a run, at once, and leaves nothing behind."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.distributed.common import make_problem, merged
from tests.processes import run_forked


@pytest.fixture(scope="module")
def problem(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return make_problem(tmp_path_factory.mktemp("doctor"))


def examined(config: dict[str, Any], tmp_path: Path, status: int = 0) -> tuple[list[str], str]:
    """Lines that start with ``ok``, ``note`` or ``STOP``, and the last one, of two ranks."""
    file = tmp_path / "config.yaml"
    file.write_text(yaml.safe_dump(config))
    done = run_forked("tgdpo.doctor", [str(file)], processes=2, check=False)
    assert done.returncode == status, done.stderr
    *lines, last = done.stdout.splitlines()
    assert all(line.split()[0] in ("ok", "note", "STOP") for line in lines), lines
    return lines, last


def test_a_run_that_nothing_stops(problem: dict[str, Any], tmp_path: Path) -> None:
    out = tmp_path / "runs" / "first"
    lines, last = examined(merged(problem, output_dir=str(out), parallel={"tensor": 2}), tmp_path)
    assert last == f"ready: tgdpo train {tmp_path}/config.yaml"
    assert not [line for line in lines if line.startswith("STOP")]
    said = "\n".join(lines)
    for what in (
        "2 ranks: CPU", "versions: python", "models: policy", "data.train: ", "layout: TP2", "memory: the fullest",
        "network: all-reduce tp: 1 groups", "all ranks have the same versions",
    ):  # fmt: skip
        assert what in said, what
    assert not (tmp_path / "runs").exists()


def stops(lines: list[str]) -> list[str]:
    return [line.removeprefix("STOP").strip() for line in lines if line.startswith("STOP")]


def test_everything_that_stops_it_is_named(problem: dict[str, Any], tmp_path: Path) -> None:
    raw = tmp_path / "pairs.jsonl"
    raw.write_text(json.dumps({"prompt": "a", "chosen": "b"}) + "\n")
    data = {"train": str(raw), "validation": str(tmp_path / "none.json")}
    config = merged(problem, output_dir=str(tmp_path / "run"), data=data, parallel={"tensor": 3})
    lines, last = examined(config, tmp_path, status=1)
    assert last == "3 problems: nothing was trained"
    found = stops(lines)
    assert found[0].startswith(f"{raw}:1: ")
    assert found[1].startswith(f"{tmp_path}/none.json")
    assert found[2].startswith("world size 2 is not divisible by parallel.tensor")


def test_an_output_directory_that_cannot_be(problem: dict[str, Any], tmp_path: Path) -> None:
    nowhere = tmp_path / "file" / "run"
    nowhere.parent.write_text("")
    lines, last = examined(merged(problem, output_dir=str(nowhere)), tmp_path, status=1)
    assert last == "1 problem: nothing was trained"
    assert stops(lines)[0].startswith(f"{nowhere}")
