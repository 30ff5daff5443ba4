"""The best checkpoint: saved when it is found, kept whatever its age, and known to a run that continues."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from tests.checkpoints import is_complete
from tests.distributed.common import make_problem, merged, write_pairs
from tests.processes import run_forked

NAN = float("nan")


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    root = tmp_path_factory.mktemp("best")
    problem = make_problem(root)
    write_pairs(root / "validation.jsonl", 4)
    return merged(
        problem,
        data={"validation": str(root / "validation.jsonl")},
        train={"steps": 8},
        eval={"every_steps": 2},
        checkpoint={"every_steps": 100, "keep": 1, "best_metric": "eval/loss"},
        preflight={"enabled": False},
    )


def train(
    directory: Path,
    config: dict[str, Any],
    values: dict[int, float],
    *overrides: str,
    processes: int = 1,
    **faults: Any,
) -> str:
    file = directory / "config.yaml"
    file.write_text(json.dumps(merged(config, output_dir=str(directory / "run"))))
    given = json.dumps({"values": values, **faults})
    return run_forked("tests.distributed.worker_best", [given, str(file), *overrides], processes=processes).stderr


def best(directory: Path) -> tuple[int, float]:
    record = json.loads((directory / "run" / "best.json").read_text())
    return record["step"], record["value"]


def saved(directory: Path) -> list[int]:
    found = list((directory / "run" / "checkpoints").glob("step_*[0-9]"))
    assert all(is_complete(path) for path in found), found
    return sorted(int(path.name[5:]) for path in found)


def test_the_best_is_saved_at_once_and_never_removed(config: dict[str, Any], tmp_path: Path) -> None:
    """No save was due before the last step; the two ranks see other values, and do the same."""
    train(tmp_path, config, {2: 3.0, 4: 1.0, 6: 1.5, 8: 2.0}, processes=2)
    assert best(tmp_path) == (4, 1.0)
    assert saved(tmp_path) == [4, 8]


def test_equal_values_and_values_that_are_no_numbers_are_no_better(config: dict[str, Any], tmp_path: Path) -> None:
    log = train(tmp_path, config, {2: NAN, 4: 1.0, 6: 1.0, 8: NAN})
    assert best(tmp_path) == (4, 1.0)
    assert saved(tmp_path) == [4, 8]
    assert "step 2: eval/loss is nan" in log


def test_the_mode_says_which_values_are_better(config: dict[str, Any], tmp_path: Path) -> None:
    largest = merged(config, checkpoint={"best_mode": "max"})
    train(tmp_path, largest, {2: 1.0, 4: 3.0, 6: 2.0, 8: float("inf")})
    assert best(tmp_path) == (4, 3.0)


def test_a_run_that_continues_compares_with_the_best_before(config: dict[str, Any], tmp_path: Path) -> None:
    train(tmp_path, config, {2: 1.0, 4: 3.0, 5: 4.0}, "train.exit_step=5")
    assert (best(tmp_path), saved(tmp_path)) == ((2, 1.0), [2, 5])
    train(tmp_path, config, {6: 2.0, 7: 1.5}, "train.exit_step=7", processes=2)
    assert (best(tmp_path), saved(tmp_path)) == ((2, 1.0), [2, 7])
    # What a start that was killed between the two did not write, the checkpoint says.
    (tmp_path / "run" / "best.json").write_text("{")
    train(tmp_path, config, {8: 1.25})
    assert (best(tmp_path), saved(tmp_path)) == ((2, 1.0), [2, 8])


def test_values_that_were_measured_otherwise_do_not_compare(config: dict[str, Any], tmp_path: Path) -> None:
    train(tmp_path, config, {2: 1.0, 4: 3.0}, "train.exit_step=4")
    more = tmp_path / "more.jsonl"
    write_pairs(more, 6)
    train(tmp_path, merged(config, data={"validation": str(more)}), {6: 2.0, 8: 2.5})
    assert (best(tmp_path), saved(tmp_path)) == ((6, 2.0), [6, 8])


def test_a_best_checkpoint_that_is_gone_is_not_compared_with(config: dict[str, Any], tmp_path: Path) -> None:
    train(tmp_path, config, {2: 1.0, 4: 3.0}, "train.exit_step=4")
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "step_00000002")
    log = train(tmp_path, config, {6: 2.0, 8: 2.5})
    assert "the best checkpoint, of step 2, is not in" in log
    assert (best(tmp_path), saved(tmp_path)) == ((6, 2.0), [6, 8])


def test_an_evaluation_whose_save_failed_is_not_the_best(config: dict[str, Any], tmp_path: Path) -> None:
    """The save is made up for with the state of the next step, which nobody evaluated."""
    train(tmp_path, config, {2: 3.0, 4: 1.0, 6: 2.0, 8: 2.5}, "checkpoint.keep=0", processes=2, fail=[1])
    assert best(tmp_path) == (6, 2.0)
    assert 4 not in saved(tmp_path)


@pytest.mark.parametrize(
    ("metric", "hint"),
    [
        ("eval/rewards/accuracy", "did you mean eval/rewards/accuracies?"),
        ("rewards/margins", "did you mean eval/rewards/margins?"),
        ("train/loss", "did you mean eval/loss?"),
        ("zzz", "there are eval/loss, eval/rewards/chosen,"),
    ],
)
def test_a_metric_that_is_not_there_stops_the_run_before_it_loads(
    config: dict[str, Any], tmp_path: Path, metric: str, hint: str
) -> None:
    file = tmp_path / "config.yaml"
    file.write_text(json.dumps(merged(config, checkpoint={"best_metric": metric}, output_dir=str(tmp_path / "run"))))
    done = run_forked("megatron_tgdpo.train", [str(file)], check=False)
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert line.startswith(f"error: checkpoint.best_metric: no evaluation of this run logs {metric!r}; {hint}")
    assert done.returncode == 1
    assert not (tmp_path / "run").exists()
