"""A short soak; ``python -m tests.soak.signal_soak --signals 20`` is the long one."""

from pathlib import Path

from tests.soak.signal_soak import soak


def test_stops_cost_no_step(tmp_path: Path) -> None:
    soak(tmp_path, signals=4, seed=0)
