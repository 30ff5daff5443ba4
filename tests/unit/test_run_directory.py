"""The output directory belongs to one run; its metrics continue without repeated or missing steps."""

import json
from pathlib import Path
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from megatron_tgdpo.config import config_from_dict, load_config
from megatron_tgdpo.errors import UserError
from megatron_tgdpo.run_directory import MetricsLog, claim_output_dir, is_done, mark_done, record_start
from tests.distributed.common import merged
from tests.unit.test_config import VALID


def values(tmp_path: Path, **sections: Any) -> dict[str, Any]:
    changed = {name: dict(v) if isinstance(v, dict) else v for name, v in VALID.items()}
    for name, section in sections.items():
        changed[name] = {**changed.get(name, {}), **section}
    return {**changed, "output_dir": str(tmp_path / "run")}


def claim_and_step(tmp_path: Path) -> None:
    claim_output_dir(config_from_dict(values(tmp_path)))
    (tmp_path / "run" / "metrics.jsonl").write_text('{"step": 1}\n')


def test_a_run_that_made_no_step_may_be_configured_anew(tmp_path: Path) -> None:
    claim_output_dir(config_from_dict(values(tmp_path)))
    claim_output_dir(config_from_dict(values(tmp_path, loss={"alpha": 0.9})))
    assert load_config(tmp_path / "run" / "config.yaml").loss.alpha == 0.9


def test_the_same_run_may_come_back_on_another_layout(tmp_path: Path) -> None:
    claim_and_step(tmp_path)
    again = values(tmp_path, parallel={"tensor": 2}, checkpoint={"keep": 5}, train={"exit_step": 3})
    claim_output_dir(config_from_dict(again))


@pytest.mark.parametrize(
    ("section", "changes", "named"),
    [
        ("loss", {"alpha": 0.9}, "loss.alpha"),
        ("train", {"seed": 5}, "train.seed"),
        ("batch", {"global_pairs": 16}, "batch.global_pairs"),
        ("optimizer", {"lr": 1e-3}, "optimizer.lr"),
    ],
)
def test_another_run_is_refused(tmp_path: Path, section: str, changes: dict[str, Any], named: str) -> None:
    claim_and_step(tmp_path)
    with pytest.raises(UserError, match=named):
        claim_output_dir(config_from_dict(values(tmp_path, **{section: changes})))


def test_a_run_that_is_continued_with_other_values_is_done_no_more(tmp_path: Path) -> None:
    claim_and_step(tmp_path)
    mark_done(tmp_path / "run", 10)
    longer = values(tmp_path, train={"steps": 20})
    with pytest.raises(UserError, match=r"train\.steps 20, was 10"):
        is_done(config_from_dict(longer))
    asked = config_from_dict(merged(longer, train={"resume": "changed"}))
    assert not is_done(asked)
    claim_output_dir(asked)
    record_start(asked, {}, 10, 20)
    assert not (tmp_path / "run" / "DONE").exists()
    mark_done(tmp_path / "run", 20)
    assert is_done(config_from_dict(longer)), "config.yaml says what the run is by now"
    moved = merged(longer, model={"guide": "elsewhere"})
    assert not is_done(config_from_dict(moved)), "only its content tells whether it is another"


def test_an_unreadable_config_of_a_run_is_named(tmp_path: Path) -> None:
    claim_and_step(tmp_path)
    (tmp_path / "run" / "config.yaml").write_text("a: [1")
    with pytest.raises(UserError, match=r"run/config\.yaml: cannot be read"):
        claim_output_dir(config_from_dict(values(tmp_path)))


def test_metrics_are_cut_back_to_the_checkpoint_they_continue_from(tmp_path: Path) -> None:
    config = config_from_dict({**VALID, "output_dir": str(tmp_path)})
    log = MetricsLog(config, 0)
    for step in (1, 2, 3, 4):
        log.write(step, {"train/loss": float(step)})
    log.close()
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 5, "train/lo')  # killed while writing
    log = MetricsLog(config, 2)
    log.write(3, {"train/loss": 30.0})
    log.close()
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert lines == [
        {"step": 1, "train/loss": 1.0},
        {"step": 2, "train/loss": 2.0},
        {"step": 3, "train/loss": 30.0},
    ]
    board = EventAccumulator(str(tmp_path / "tensorboard"))
    board.Reload()
    assert [(event.step, event.value) for event in board.Scalars("train/loss")] == [(1, 1.0), (2, 2.0), (3, 30.0)]
