"""The count of open files and sockets, beside what process groups open; and runs whose limit is too low for them."""

import json
import sys
from pathlib import Path

import pytest

from tests.distributed.common import make_problem, merged
from tests.processes import run_forked


@pytest.mark.skipif(sys.platform != "linux", reason="counts in /proc")
@pytest.mark.parametrize("layout", ["1 1 1", "2 2 1", "1 2 2", "2 1 1"])
def test_the_count_is_that_of_the_groups(layout: str) -> None:
    done = run_forked("tests.distributed.worker_open_files", layout.split(), processes=4)
    opened, expected, groups, whole, needed = map(int, done.stdout.split())
    # What gloo opens for a group besides its connections is its own affair: one more or less in each.
    assert abs(opened - expected) <= groups, (opened, expected)
    assert whole <= needed


def test_a_rank_whose_limit_is_too_low_ends_all_before_they_meet(tmp_path: Path) -> None:
    config = tmp_path / "config.yaml"
    config.write_text(json.dumps(make_problem(tmp_path)))
    limits = json.dumps({"1": [150, 150]})
    done = run_forked("tests.distributed.worker_limited", [limits, str(config)], processes=2, check=False)
    assert done.returncode == 1
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert "error: rank 1: " in line
    assert "files and sockets, and the limit is 150: raise the hard limit of open files" in line
    assert not (tmp_path / "run").exists()


def test_a_soft_limit_that_is_too_low_is_raised(tmp_path: Path) -> None:
    config = tmp_path / "config.yaml"
    config.write_text(json.dumps(merged(make_problem(tmp_path), train={"steps": 1})))
    limits = json.dumps({rank: [70, None] for rank in "01"})
    done = run_forked("tests.distributed.worker_limited", [limits, str(config)], processes=2)
    raised = [int(line) for line in done.stdout.splitlines() if line.isdigit()]
    assert len(raised) == 2
    assert min(raised) > 128, "what one rank opens beside its groups"
    assert (tmp_path / "run" / "DONE").exists()
