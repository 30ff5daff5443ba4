"""What one pair of megatron-core and torch has written, another reads, and goes on with: both ways.

The other environment is named by TGDPO_OTHER_PYTHON; ``bash tests/run_newest.sh`` makes both.
"""

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from megatron_tgdpo.checkpoints.listing import newest_checkpoint
from tests.distributed.common import assert_same_weights, make_problem, merged, read_metrics
from tests.launch import OTHER_PYTHON, run_module

pytestmark = pytest.mark.skipif(not OTHER_PYTHON, reason="TGDPO_OTHER_PYTHON names no environment")

STEPS, STOP = 6, 3
TP2 = {"tensor": 2, "sequence_parallel": True}
PP2 = {"pipeline": 2}
PYTHONS = {"here": sys.executable, "there": OTHER_PYTHON}
SERIES = ("train/loss", "train/grad_norm", "train/lr", "rewards/margins", "guidance/weight_std", "logps/chosen")


def launch(python: str, root: Path, cases: list[dict[str, Any]]) -> None:
    """Runs worker_train's cases on two ranks of an environment."""
    file = root / f"{python}-cases.json"
    file.write_text(json.dumps(cases))
    run_module("tests.distributed.worker_train", [str(file)], processes=2, python=PYTHONS[python])


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """In each environment: a whole run, one that stopped, for each dtype, and a guidance cache."""
    root = tmp_path_factory.mktemp("versions")
    config = make_problem(root, tied=True)
    config = merged(config, batch={"global_pairs": 11}, train={"steps": STEPS}, parallel=TP2)
    for python in PYTHONS:
        cases: list[dict[str, Any]] = [{"config": run_of(config, root, "cache", python), "precompute": 8}]
        for dtype in ("fp32", "bf16"):
            ours = merged(config, precision={"dtype": dtype})
            cases.append({"config": run_of(ours, root, f"whole-{dtype}", python)})
            stopped = merged(ours, train={"exit_step": STOP})
            cases.append({"config": run_of(stopped, root, f"stopped-{dtype}", python)})
        launch(python, root, cases)
    return root, config


def run_of(config: dict[str, Any], root: Path, name: str, python: str) -> dict[str, Any]:
    """The config of a run of this name that an environment writes, or a cache."""
    if name == "cache":
        guidance = {"mode": "cached", "cache": str(root / f"cache-{python}")}
        return merged(config, guidance=guidance, output_dir=str(root / f"cached-{python}"))
    return merged(config, output_dir=str(root / f"{name}-{python}"))


@pytest.fixture(scope="module")
def read(written: tuple[Path, dict[str, Any]]) -> Path:
    """Each environment goes on with what the other has written."""
    root, config = written
    for reader, writer in (("here", "there"), ("there", "here")):
        cached = run_of(config, root, "cache", writer)
        cases: list[dict[str, Any]] = [
            {"config": merged(cached, output_dir=str(root / f"verify-{reader}")), "verify": 32},
            {"config": merged(cached, output_dir=str(root / f"from-cache-{reader}"))},
        ]
        for dtype in ("fp32", "bf16"):
            ours = merged(config, precision={"dtype": dtype}, parallel={**TP2, "tensor": 1, "sequence_parallel": False})
            cases.append({"config": run_of(merged(ours, parallel=PP2), root, f"stopped-{dtype}", writer)})
        launch(reader, root, cases)
    return root


@pytest.mark.parametrize("writer", PYTHONS)
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_a_run_goes_on_under_other_versions_and_another_layout(read: Path, dtype: str, writer: str) -> None:
    continued = read_metrics(read / f"stopped-{dtype}-{writer}")
    whole = read_metrics(read / f"whole-{dtype}-{writer}")
    assert [step["step"] for step in continued] == list(range(1, STEPS + 1))
    # bf16 rounds sums of other lengths differently on another layout.
    limit = {"fp32": 2e-5, "bf16": 2e-2}[dtype]
    for got, want in zip(continued, whole, strict=True):
        for key in SERIES if dtype == "fp32" else ("train/loss", "train/lr"):
            assert got[key] == pytest.approx(want[key], rel=limit, abs=limit / 2), f"{key} of step {got['step']}"


@pytest.mark.parametrize("reader", PYTHONS)
def test_a_guidance_cache_is_read_by_other_versions(read: Path, reader: str) -> None:
    got, want = read_metrics(read / f"from-cache-{reader}"), read_metrics(read / f"whole-fp32-{reader}")
    assert len(got) == len(want) == STEPS
    for one, other in zip(got, want, strict=True):
        assert one["train/loss"] == pytest.approx(other["train/loss"], rel=1e-6)


@pytest.mark.parametrize("writer", PYTHONS)
def test_both_export_a_checkpoint_to_the_same_bits(read: Path, writer: str, tmp_path: Path) -> None:
    checkpoint = newest_checkpoint(read / f"stopped-fp32-{writer}")
    assert checkpoint is not None
    for python, executable in PYTHONS.items():
        arguments = ["convert", "to-hf", "--megatron", str(checkpoint), "--out", str(tmp_path / python)]
        run_module("tgdpo", arguments, python=executable)
    assert_same_weights(tmp_path / "here", tmp_path / "there")


def test_both_import_a_model_to_the_same_bits(written: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    root, _ = written
    for python, executable in PYTHONS.items():
        imported = str(tmp_path / f"megatron-{python}")
        arguments = ["convert", "to-megatron", "--hf", str(root / "policy"), "--out", imported, "--dtype", "fp32"]
        run_module("tgdpo", arguments, python=executable)
    for python, other in (("here", "there"), ("there", "here")):
        imported = str(tmp_path / f"megatron-{other}")
        arguments = ["convert", "to-hf", "--megatron", imported, "--out", str(tmp_path / python)]
        run_module("tgdpo", arguments, python=PYTHONS[python])
        assert_same_weights(tmp_path / python, root / "policy")
