"""All combinations of how a run is laid out: refused for a reason that the manual has, or trained."""

from pathlib import Path
from typing import Any

import pytest

from tests.distributed.test_equivalence import CASES, Case
from tests.grid import Combination, grid, pairs, refusal, table

MANUAL = Path(__file__).parents[3] / "docs" / "configuration.md"


def combination(case: Case) -> dict[str, Any]:
    """What a case of the equivalence matrix chooses."""
    return {
        "method": case.loss["method"],
        "guidance": case.guidance,
        "tensor": min(case.tensor, 2),
        "sequence_parallel": case.sequence_parallel,
        "pipeline": min(case.pipeline, 2),
        "virtual_pipeline": case.virtual,
        "context": min(case.context, 2),
        "data": 1 + (case.processes > case.tensor * case.pipeline * case.context),
        "shared_prompts": case.shared_prompts is not False,
        "overlap": case.overlap,
        "recompute": case.recompute,
    }


@pytest.fixture(scope="module")
def accepted() -> list[Combination]:
    return [chosen for chosen in grid() if refusal(chosen) is None]


def test_the_manual_has_the_counts() -> None:
    assert table() in MANUAL.read_text()


def test_every_two_choices_that_go_together_are_trained_together(accepted: list[Combination]) -> None:
    together = set().union(*(pairs(chosen) for chosen in accepted))
    trained = set().union(*(pairs(combination(case)) for case in CASES))
    assert not together - trained


def test_no_case_is_one_that_is_refused() -> None:
    assert [case.name for case in CASES if refusal(combination(case)) is not None] == []
