"""Intervals against published and hand-computed figures, and how often they hold; the warning about a guide."""

import math
import random

import pytest

from megatron_tgdpo.guidance.monitor import GuideWatch, guide_doubt, guide_warning
from megatron_tgdpo.intervals import Estimate, mean_interval, ratio_interval, wilson


def test_wilson() -> None:
    # Newcombe (1998), Statistics in Medicine 17, table I, method 3: 81/263, 15/148, 0/20, 1/29.
    for successes, trials, low, high in [
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ]:
        estimate = wilson(successes, trials)
        assert estimate.value == successes / trials
        assert (round(estimate.low or 0.0, 4), round(estimate.high or 0.0, 4)) == (low, high)
    assert wilson(5, 5).high == 1.0


def test_mean_interval() -> None:
    # Standard deviation 2, so a standard error of 1.
    estimate = mean_interval([1.0, 3.0, 5.0, 3.0])
    error = 1.959964 * math.sqrt(8 / 3) / 2
    assert estimate.value == 3.0
    assert (estimate.low, estimate.high) == (pytest.approx(3 - error), pytest.approx(3 + error))
    assert mean_interval([4.0]) == Estimate(4.0, None, None)


def test_ratio_interval() -> None:
    # 9 nats over 6 tokens; residuals 2 - 1.5 * 2 = -1 and 7 - 1.5 * 4 = 1, so a standard error of 1 / 3.
    estimate = ratio_interval([2.0, 7.0], [2.0, 4.0])
    assert estimate.value == 1.5
    assert (estimate.low, estimate.high) == (pytest.approx(1.5 - 1.959964 / 3), pytest.approx(1.5 + 1.959964 / 3))
    assert ratio_interval([3.0], [2.0]) == Estimate(1.5, None, None)


def test_intervals_hold_about_as_often_as_they_say() -> None:
    rng = random.Random(0)
    held = {"wilson": 0, "mean": 0, "ratio": 0}
    trials = 1000
    for _ in range(trials):
        lengths = [rng.randint(1, 20) for _ in range(60)]
        sums = [0.3 * length + rng.gauss(0, 1) * math.sqrt(length) for length in lengths]
        held["wilson"] += _holds(wilson(sum(rng.random() < 0.8 for _ in range(60)), 60), 0.8)
        held["mean"] += _holds(mean_interval([rng.expovariate(1.0) for _ in range(60)]), 1.0)
        held["ratio"] += _holds(ratio_interval(sums, lengths), 0.3)
    assert all(0.92 <= count / trials <= 0.97 for count in held.values()), held


def _holds(estimate: Estimate, truth: float) -> bool:
    assert estimate.low is not None
    assert estimate.high is not None
    return estimate.low <= truth <= estimate.high


@pytest.mark.parametrize("correct", [0, 30, 40])
def test_guides_below_chance_are_warned_of(correct: int) -> None:
    warning = guide_warning(correct, 100)
    assert warning is not None
    assert "\n" not in warning
    assert f"{correct} of 100 pairs" in warning
    assert "swapped" in warning
    assert guide_doubt(correct, 100) is None


@pytest.mark.parametrize(
    ("correct", "pairs", "ties"), [(6, 16, 0), (10, 16, 0), (50, 100, 0), (55, 100, 0), (3, 100, 90)]
)
def test_guides_that_may_be_at_chance_are_not_accused(correct: int, pairs: int, ties: int) -> None:
    assert guide_warning(correct, pairs, ties=ties) is None
    doubt = guide_doubt(correct, pairs, ties=ties)
    assert doubt is not None
    assert doubt.startswith("Too few pairs to tell")
    assert f"{correct} of {pairs} pairs" in doubt


def test_guides_above_chance_are_not() -> None:
    for correct, pairs, ties in ((61, 100, 0), (0, 0, 0), (9, 100, 91)):
        assert guide_warning(correct, pairs, ties=ties) is None
        assert guide_doubt(correct, pairs, ties=ties) is None
    same = guide_warning(0, 100, ties=100)
    assert same is not None
    assert same.startswith("GUIDE IS THE REFERENCE")
    assert guide_doubt(0, 100, ties=100) is None


def test_a_training_warns_once_after_enough_pairs() -> None:
    watch = GuideWatch()
    assert [watch.count({"guidance/guide_accuracy": 0.25}, 64) for _ in range(3)] == [None] * 3
    warning = watch.count({"guidance/guide_accuracy": 0.25}, 64)
    assert warning is not None
    assert "64 of 256 pairs" in warning
    assert watch.count({"guidance/guide_accuracy": 0.25}, 64) is None
    same = GuideWatch().count({"guidance/guide_accuracy": 0.0, "guidance/guide_ties": 1.0}, 200)
    assert same is not None
    assert "IS THE REFERENCE" in same
    unsure = GuideWatch().count({"guidance/guide_accuracy": 0.5, "guidance/guide_ties": 0.0}, 200)
    assert unsure is not None
    assert "Too few pairs" in unsure
    good = GuideWatch()
    assert good.count({"guidance/guide_accuracy": 0.75}, 400) is None
    assert GuideWatch().count({"loss": 1.0}, 400) is None
