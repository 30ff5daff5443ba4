"""The benchmark's plain Hugging Face step beside the tests' own reference, and the checks of losses."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch

from megatron_tgdpo.data.dataset import PreferencePair
from megatron_tgdpo.errors import UserError
from tests import reference
from tests.tiny_models import make_llama
from tools.benchmarks.training_step.measure import Job, check_losses, loss_differences
from tools.benchmarks.training_step.problem import ALPHA, BETA, CLIP, LEARNING_RATE, Problem
from tools.benchmarks.training_step.recorder import VariantResult
from tools.benchmarks.training_step.reference_step import ReferenceStep
from tools.benchmarks.training_step.report import metrics, yardstick_lines

SETTINGS = reference.Settings(2, 2, LEARNING_RATE, beta=BETA, alpha=ALPHA, clip_grad=CLIP)
PROBLEM = Problem(
    "scratch", "policy", "guide", "adapter", "guide_adapter", "pairs", "tokenizer", 96, 8, 4, "cpu", "fp32", 1
)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("variants")
    for seed, name in enumerate(("policy", "moved", "guide")):
        make_llama(root / name, seed=seed)
    return root


@pytest.fixture(scope="module")
def pairs() -> list[PreferencePair]:
    """Of unequal lengths: padding to a multiple of 8 falls on the chosen of some and on the rejected of others."""
    rng = np.random.default_rng(3)
    lengths = [(5, 9, 4), (7, 3, 11), (1, 6, 6), (12, 1, 30)]
    return [PreferencePair(*(rng.integers(3, 131, size) for size in sizes), i) for i, sizes in enumerate(lengths)]


def tokens(pair: PreferencePair) -> reference.Tokens:
    return reference.Tokens(pair.prompt.tolist(), pair.chosen.tolist(), pair.rejected.tolist())


@pytest.mark.parametrize("guided", [True, False])
def test_loss_and_gradient_of_a_pair(models: Path, pairs: list[PreferencePair], guided: bool) -> None:
    """The policy is not the reference here, as after some steps: every term of the loss counts."""
    guide = models / "guide" if guided else None
    variant = ReferenceStep(models / "policy", guide, "fp32", torch.device("cpu"))
    variant.policy.load_state_dict(reference.load(models / "moved").state_dict())
    policy, frozen = reference.load(models / "moved"), reference.load(models / "policy")
    guide_model = reference.load(guide) if guide is not None else None
    for pair in pairs:
        variant.policy.zero_grad()
        policy.zero_grad()
        loss, wanted = variant.pair_loss(pair), reference.pair_loss(policy, frozen, guide_model, tokens(pair), SETTINGS)
        loss.backward()
        wanted.backward()
        assert loss.item() == pytest.approx(wanted.item(), rel=1e-5)
        assert abs(loss.item() - math.log(2)) > 1e-3
        for ours, theirs in zip(variant.policy.parameters(), policy.parameters(), strict=True):
            torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-3, atol=1e-5 * float(theirs.grad.abs().max()))
    assert all(weight.grad is None for weight in variant.reference.parameters())


def test_steps(models: Path, pairs: list[PreferencePair]) -> None:
    variant = ReferenceStep(models / "policy", models / "guide", "fp32", torch.device("cpu"))
    wanted = reference.train(
        models / "policy", models / "policy", models / "guide", [tokens(pair) for pair in pairs], SETTINGS
    )
    losses = [variant.step(pairs[:2]), variant.step(pairs[2:])]
    assert losses == pytest.approx(wanted.losses, rel=1e-5)
    assert losses[0] == pytest.approx(math.log(2), rel=1e-5)
    assert abs(losses[1] - math.log(2)) > 5e-5
    # Beside what the steps changed in all, not element by element: Adam moves a weight whose gradient is only rounding
    # as far as any other.
    start = reference.load(models / "policy").state_dict()
    for name, weight in variant.policy.named_parameters():
        change = wanted.weights[name] - start[name]
        assert (weight.detach() - wanted.weights[name]).norm() < 0.02 * change.norm(), name


def test_timed_steps_take_every_pair_once() -> None:
    assert [PROBLEM.step_indices(step) for step in range(1, PROBLEM.steps + 1)] == [
        [0, 1, 2, 3],
        [4, 5, 6, 7],
        [0, 1, 2, 3],
    ]


def result(losses: list[float], seconds: float = 1.0, peak: int = 300) -> VariantResult:
    return VariantResult(
        losses, [seconds, seconds], imported_bytes=100, weight_bytes=50, peak_bytes=peak, product_flops=400.0
    )


def jobs(*variants: str) -> list[Job]:
    return [Job(variant, variant, PROBLEM) for variant in variants]


def test_losses_are_compared_within_an_objective() -> None:
    results = {
        "reference": [result([0.7, 0.6]), result([0.7, 0.6])],
        "colocated": [result([0.7, 0.6]), result([0.7, 0.6 * (1 + 2e-6)])],
        "dpo-colocated": [result([0.7, 0.5]), result([0.7, 0.5])],
    }
    differences = loss_differences(jobs(*results), results)
    assert differences == pytest.approx({"reference": 0.0, "colocated": 2e-6, "dpo-colocated": 0.0}, abs=1e-9)
    check_losses(jobs(*results), differences)


@pytest.mark.parametrize("loss", [0.6 * (1 + 1e-3), math.nan, math.inf])
def test_sides_that_compute_something_else_fail_the_benchmark(loss: float) -> None:
    results = {"reference": [result([0.7, 0.6])], "cached": [result([0.7, loss])]}
    differences = loss_differences(jobs(*results), results)
    with pytest.raises(UserError, match="cached: its losses differ"):
        check_losses(jobs(*results), differences)


def test_figures_are_ratios_of_the_same_round() -> None:
    losses = [0.7, 0.6]
    results = {
        "reference": [result(losses, 4.0, 1150), result(losses, 8.0, 1150), result(losses, 6.0, 1150)],
        "cached": [result(losses, 1.0, 350), result(losses, 4.0, 350), result(losses, 2.0, 350)],
        "dpo-cached": [result(losses, 1.0, 350), result(losses, 5.0, 350), result(losses, 2.0, 350)],
    }
    row = metrics(PROBLEM, 800, {"reference": 1000, "cached": 600, "dpo-cached": 600}, results)["cached"]
    assert (row["speed_ratio"].median, row["speed_ratio"].low, row["speed_ratio"].high) == (3.0, 2.0, 4.0)
    assert row["pairs_per_second"].median == 2.0  # 8 pairs in two steps of 2 s
    assert row["tokens_per_second"].median == 200.0
    assert row["product_share"].median == pytest.approx(600 / 4 / 400)  # FLOP in two steps of 2 s, by FLOP/s
    assert row["peak_ratio"].median == pytest.approx(350 / 1150)
    assert row["added_ratio"].median == pytest.approx(200 / 1000)
    assert yardstick_lines(results) == ["step of cached over policy-only DPO (dpo-cached): 1.000 (0.800-1.000)"]
