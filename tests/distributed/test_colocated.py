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
def facts(root: Path) -> dict[int, list[dict[str, Any]]]:
    """By the chunks of a stage: what each stage found, in four micro batches."""
    (root / "config.json").write_text(json.dumps(make_problem(root)))
    done = run_forked("tests.distributed.worker_colocated", [str(root / "config.json")], processes=2)
    lines = [line.removeprefix("FACTS ") for line in done.stdout.splitlines() if line.startswith("FACTS ")]
    return dict(zip((1, 2), map(json.loads, lines), strict=True))


Facts = dict[int, list[dict[str, Any]]]
# Of each stage, by the chunks: how many tensors go forwards. Backwards it is the other way round.
SENT = {1: (4, 0), 2: (8, 4)}


@pytest.mark.parametrize("chunks", [1, 2])
def test_backward_traffic_is_that_of_policy_only_training(facts: Facts, chunks: int) -> None:
    for stage, sent in zip(facts[chunks], reversed(SENT[chunks]), strict=True):
        assert stage["backward_bytes"] == stage["policy_only_backward_bytes"] == sent * 256 * stage["policy_width"] * 4


@pytest.mark.parametrize("chunks", [1, 2])
def test_forward_traffic_carries_all_three_models(facts: Facts, chunks: int) -> None:
    for stage, sent in zip(facts[chunks], SENT[chunks], strict=True):
        widths = stage["policy_width"] + sum(stage["frozen_widths"])
        assert stage["frozen_widths"] == [64, 32]
        assert stage["policy_only_forward_bytes"] == sent * 256 * stage["policy_width"] * 4
        assert stage["forward_bytes"] == sent * 256 * widths * 4
        assert stage["waiting"] == 0


@pytest.mark.parametrize("chunks", [1, 2])
def test_frozen_models_hold_no_training_state(facts: Facts, chunks: int) -> None:
    for stage in facts[chunks]:
        assert stage["frozen_elements"] > 0
        assert stage["frozen_trainable"] == 0
        assert stage["frozen_gradients"] == 0
        assert stage["policy_gradient_norm"] > 0
        assert stage["buffer_elements"] == stage["policy_only_buffer_elements"]
        assert stage["optimizer_elements"] == stage["policy_elements"] == stage["policy_only_elements"]


@pytest.mark.parametrize("chunks", [1, 2])
def test_a_dry_run_counts_the_parameters_that_each_stage_holds(root: Path, facts: Facts, chunks: int) -> None:
    layout = make_layout(1, 2, 1, False, 2, chunks)
    policy, guide = read_hf_config(root / "policy"), read_hf_config(root / "guide")
    for stage, held in enumerate(facts[chunks]):
        assert stage_parameters(policy, layout, stage) == held["policy_elements"]
        frozen = stage_parameters(policy, layout, stage) + stage_parameters(guide, layout, stage)
        assert frozen == held["frozen_elements"]
