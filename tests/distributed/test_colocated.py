"""Frozen models ride along without gradients, gradient buffers, optimizer state or backward traffic."""

import json
from pathlib import Path
from typing import Any

import pytest

from megatron_tgdpo.distributed.layout import make_layout
from megatron_tgdpo.models.hf_config import read_hf_config
from megatron_tgdpo.planning.memory import stage_parameters
from tests.distributed.common import make_problem
from tests.processes import run_forked


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("colocated")


@pytest.fixture(scope="module")
def facts(root: Path) -> list[dict[str, Any]]:
    (root / "config.json").write_text(json.dumps(make_problem(root)))
    done = run_forked("tests.distributed.worker_colocated", [str(root / "config.json")], processes=2)
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("FACTS ")]
    return json.loads(line.removeprefix("FACTS "))


def test_backward_traffic_is_that_of_policy_only_training(facts: list[dict[str, Any]]) -> None:
    last = facts[1]
    assert last["backward_bytes"] == last["policy_only_backward_bytes"] == 3 * 256 * last["policy_width"] * 4
    assert facts[0]["backward_bytes"] == 0


def test_forward_traffic_carries_all_three_models(facts: list[dict[str, Any]]) -> None:
    first = facts[0]
    widths = first["policy_width"] + sum(first["frozen_widths"])
    assert first["frozen_widths"] == [64, 32]
    assert first["policy_only_forward_bytes"] == 3 * 256 * first["policy_width"] * 4
    assert first["forward_bytes"] == 3 * 256 * widths * 4


def test_frozen_models_hold_no_training_state(facts: list[dict[str, Any]]) -> None:
    for stage in facts:
        assert stage["frozen_elements"] > 0
        assert stage["frozen_trainable"] == 0
        assert stage["frozen_gradients"] == 0
        assert stage["policy_gradient_norm"] > 0
        assert stage["buffer_elements"] == stage["policy_only_buffer_elements"]
        assert stage["optimizer_elements"] == stage["policy_elements"]


def test_a_dry_run_counts_the_parameters_that_each_stage_holds(root: Path, facts: list[dict[str, Any]]) -> None:
    layout = make_layout(1, 2, 1, False, 2)
    policy, guide = read_hf_config(root / "policy"), read_hf_config(root / "guide")
    for stage, held in enumerate(facts):
        assert stage_parameters(policy, layout, stage) == held["policy_elements"]
        frozen = stage_parameters(policy, layout, stage) + stage_parameters(guide, layout, stage)
        assert frozen == held["frozen_elements"]
