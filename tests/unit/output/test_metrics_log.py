"""Metrics continue without repeated or missing steps, whatever happened to the disk."""

import contextlib
import json
import math
import resource
from collections.abc import Iterator
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from megatron_tgdpo.config.loading import config_from_dict
from megatron_tgdpo.errors import StorageError
from megatron_tgdpo.output.metrics import shortened
from megatron_tgdpo.output.metrics_log import MetricsLog
from tests.unit.config.test_loading import VALID

LOSS = "1_learning/loss"


def scalars(directory: Path) -> list[tuple[int, float]]:
    board = EventAccumulator(str(directory / "tensorboard" / "train"))
    board.Reload()
    return [(event.step, event.value) for event in board.Scalars(LOSS)]


def scalars_by_file(directory: Path) -> list[tuple[int, float]]:
    """As `scalars`; that reads files of one second in the order of their names, in which 10 is before 9."""
    found: dict[int, float] = {}
    for file in sorted(
        (directory / "tensorboard" / "train").iterdir(), key=lambda file: int(file.name.rsplit(".", 1)[1])
    ):
        board = EventAccumulator(str(file))
        board.Reload()
        events = board.Scalars(LOSS) if LOSS in board.Tags()["scalars"] else []
        found |= {event.step: event.value for event in events}
    return sorted(found.items())


def lines(directory: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]


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
    assert lines(tmp_path) == [
        {"step": 1, "train/loss": 1.0},
        {"step": 2, "train/loss": 2.0},
        {"step": 3, "train/loss": 30.0},
    ]
    assert scalars(tmp_path) == [(1, 1.0), (2, 2.0), (3, 30.0)]


@contextlib.contextmanager
def files_of_at_most(size: int) -> Iterator[None]:
    """Writes fail behind so many bytes of a file, in the middle of a line too, as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def size_of(directory: Path, pattern: str) -> int:
    return max(file.stat().st_size for file in directory.glob(pattern))


@pytest.mark.parametrize("pattern", ["metrics.jsonl", "tensorboard/train/*"])
@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_what_a_full_disk_does_not_take_is_written_later(tmp_path: Path, pattern: str) -> None:
    config = config_from_dict({**VALID, "output_dir": str(tmp_path)})
    log = MetricsLog(config, 0)
    log.write(1, {"train/loss": 1.0})
    many = {f"figure/{number}": 0.5 for number in range(400 if pattern == "metrics.jsonl" else 1)}
    with files_of_at_most(size_of(tmp_path, pattern) + 20):
        for step in (2, 3):
            log.write(step, {"train/loss": float(step), **many})
        assert len(lines_that_are_whole(tmp_path)) < 3
        with pytest.raises(StorageError, match=r"metrics\.jsonl or tensorboard: cannot be written: File too large"):
            log.check()
    log.check()
    log.write(4, {"train/loss": 4.0})
    log.check()
    log.close()
    assert [line["step"] for line in lines(tmp_path)] == [1, 2, 3, 4]
    assert scalars_by_file(tmp_path) == [(1, 1.0), (2, 2.0), (3, 3.0), (4, 4.0)]


def lines_that_are_whole(directory: Path) -> list[str]:
    return [line for line in (directory / "metrics.jsonl").read_text().splitlines(keepends=True) if line[-1] == "\n"]


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_run_that_ends_with_a_half_written_line_loses_no_step(tmp_path: Path) -> None:
    config = config_from_dict({**VALID, "output_dir": str(tmp_path)})
    log = MetricsLog(config, 0)
    log.write(1, {"train/loss": 1.0})
    with files_of_at_most((tmp_path / "metrics.jsonl").stat().st_size + 5):
        log.write(2, {"train/loss": 2.0})
        log.close()
        # Continuing needs no room for what is kept.
        again = MetricsLog(config, 1)
        assert [line["step"] for line in lines(tmp_path)] == [1]
    again.write(2, {"train/loss": 2.5})
    again.check()
    again.close()
    assert [(line["step"], line["train/loss"]) for line in lines(tmp_path)] == [(1, 1.0), (2, 2.5)]
    assert scalars_by_file(tmp_path) == [(1, 1.0), (2, 2.5)]


def test_numbers_have_the_digits_that_they_are_worth() -> None:
    """Speed is measured to few; a loss keeps what tells the last bit of a float32."""
    assert shortened({"train/loss": 0.1 + 2**-31, "train/lr": 7e-7, "perf/step_seconds": 1.2345678901}) == {
        "train/loss": 0.100000000466, "train/lr": 7e-7, "perf/step_seconds": 1.23457,
    }  # fmt: skip
    assert math.isnan(shortened({"eval/loss": math.nan})["eval/loss"])
