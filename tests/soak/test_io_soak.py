"""A short soak; ``python -m tests.soak.io_soak --faults 20`` is the long one."""

from pathlib import Path

from tests.soak.io_soak import soak


def test_two_faults_cost_only_unsaved_steps(tmp_path: Path) -> None:
    soak(tmp_path, faults=2, seed=0)
