"""A short soak; ``python -m tests.soak.kill_soak --kills 30`` is the long one."""

from pathlib import Path

from tests.soak.kill_soak import soak


def test_three_kills_cost_only_unsaved_steps(tmp_path: Path) -> None:
    soak(tmp_path, kills=3, seed=0)
