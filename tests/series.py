"""Compares what runs logged, and follows a run while it logs."""

import json
import time
from collections.abc import Callable
from pathlib import Path

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests.launch import PATIENCE


def logged_steps(output_dir: Path) -> int:
    """The last whole step in ``metrics.jsonl``; 0 before the first."""
    try:
        lines = (output_dir / "metrics.jsonl").read_text().splitlines(keepends=True)
    except FileNotFoundError:
        return 0
    whole = [line for line in lines if line.endswith("\n")]
    return json.loads(whole[-1])["step"] if whole else 0


def wait_for_step(output_dir: Path, step: int, alive: Callable[[], bool], timeout: float = PATIENCE) -> None:
    """Waits until a step is logged; fails if it takes too long or the job is gone."""
    deadline = time.monotonic() + timeout
    while logged_steps(output_dir) < step:
        assert alive(), f"the job ended by itself before step {step}"
        assert time.monotonic() < deadline, f"step {step} was not reached in {timeout} s"
        time.sleep(0.02)


def assert_same_series(got: Path, want: Path, last: int | None = None) -> None:
    """Both runs logged the same steps once each with the same figures to the last bit, and TensorBoard shows them.

    Args:
        got: Output directory of a run.
        want: That of another.
        last: The last step of ``got``, where ``want`` may go on.
    """
    series = []
    for output_dir in (got, want):
        records = [json.loads(line) for line in (output_dir / "metrics.jsonl").read_text().splitlines()]
        series.append([{k: v for k, v in record.items() if not k.startswith("perf/")} for record in records])
    assert [record["step"] for record in series[0]] == list(range(1, (last or len(series[1])) + 1))
    assert series[0] == series[1][:last]
    board = EventAccumulator(str(got / "tensorboard" / "train"), size_guidance={"scalars": 0})
    board.Reload()
    events = [(event.step, event.value) for event in board.Scalars("1_learning/loss")]
    assert [step for step, _ in events] == [record["step"] for record in series[0]]
    for (_, value), record in zip(events, series[0], strict=True):
        assert abs(value - record["train/loss"]) <= 1e-6 * abs(record["train/loss"])  # floats of 32 bits
