"""Metrics against ones worked out by hand."""

import math

import numpy as np
import pytest

from tgdpo.reporting.build import remarks, summary
from tgdpo.reporting.metrics import TokenMean, extreme_tokens, make_metrics
from tgdpo.reporting.numbers import decimals_of

# x of chosen and rejected tokens: margins 1 - (-3) = 4, and -3 - (-3) = 0, which is no preference.
PAIRS = [(np.array([2.0, -1.0]), np.array([-4.0, 1.0])), (np.array([-3.0]), np.array([-3.0]))]
# So alpha * beta multiplies, in order: -3, -1, -1, 2, 3, 4.


def test_guide_accuracy_and_margins() -> None:
    metrics = make_metrics(PAIRS)
    assert metrics.margins.tolist() == [4.0, 0.0]
    assert (metrics.pairs, metrics.correct, metrics.ties, metrics.accuracy) == (2, 1, 1, 0.5)
    # Wilson's interval of 1 in 2, from a table.
    assert metrics.interval == pytest.approx((0.0945, 0.9055), abs=5e-5)


def test_negative_weights_and_the_alpha_where_they_begin() -> None:
    metrics = make_metrics(PAIRS)
    assert metrics.toward.tolist() == [-3.0, -1.0, -1.0, 2.0, 3.0, 4.0]
    assert metrics.negative_fraction(alpha=1.0, beta=0.5) == pytest.approx(1 / 6)
    assert metrics.negative_fraction(alpha=3.0, beta=0.5) == pytest.approx(3 / 6)
    # 1 - alpha * 0.5 * 3 = 0 at 2/3; without that token 1 - alpha * 0.5 * 1 = 0 at 2; the rest has no limit.
    assert metrics.alpha_limit(0.0, beta=0.5) == pytest.approx(2 / 3)
    assert metrics.alpha_limit(1 / 6, beta=0.5) == pytest.approx(2.0)
    assert metrics.alpha_limit(3 / 6, beta=0.5) == math.inf
    # At a limit the share is not exceeded, just above it is.
    limit = metrics.alpha_limit(1 / 6, beta=0.5)
    assert metrics.negative_fraction(limit * 0.999, 0.5) <= 1 / 6 < metrics.negative_fraction(limit * 1.001, 0.5)


def test_distributions() -> None:
    metrics = make_metrics(PAIRS)
    chosen, rejected = metrics.counts
    assert (chosen.sum(), rejected.sum()) == (3, 3)
    middles = (metrics.edges[:-1] + metrics.edges[1:]) / 2
    half_bin = (metrics.edges[1] - metrics.edges[0]) / 2
    assert np.repeat(middles, chosen) == pytest.approx([-3, -1, 2], abs=half_bin)
    # What lies outside is in the outermost bin.
    assert np.repeat(middles, rejected) == pytest.approx([metrics.edges[0] + half_bin, -3, 1], abs=half_bin)
    first, second = metrics.positions[0]
    assert (first.first, first.last, first.count) == (1, 1, 2)
    assert first.quantiles == pytest.approx([-2.75, -1.75, -0.5, 0.75, 1.75])
    assert (second.first, second.last, second.count, second.quantiles) == (2, 3, 1, [-1.0] * 5)


def test_margins_by_length() -> None:
    # Chosen is longer by 1, 0, -1, -2 tokens; the margins are 4 times that.
    pairs = [(np.full(k, 4.0), np.full(2, 4.0)) for k in (3, 2, 1)] + [(np.full(1, 4.0), np.full(3, 4.0))]
    by_length = make_metrics(pairs).by_length
    assert by_length is not None
    assert by_length.value == pytest.approx(1.0)
    assert make_metrics(PAIRS[:1]).by_length is None
    assert make_metrics([PAIRS[0], PAIRS[0]]).by_length is None


def test_extreme_tokens() -> None:
    texts = ["a", "b", "a", "", "c", "d"]
    assert extreme_tokens(texts, np.array([1.0, 0.5, 3.0, 99.0, -1.0, 0.0])) == (
        1,
        [TokenMean("a", 2, 2.0), TokenMean("b", 1, 0.5)],
        [TokenMean("c", 1, -1.0), TokenMean("d", 1, 0.0)],
    )
    # With enough texts that occur often, a single token's chance extreme is left out.
    often = [f"w{k}" for k in range(20)] * 3
    count, most, least = extreme_tokens([*often, "rare"], np.array([*(float(k) for k in range(20))] * 3 + [99.0]))
    assert (count, most[0], least[0], len(most), len(least)) == (
        3,
        TokenMean("w19", 3, 19.0),
        TokenMean("w0", 3, 0.0),
        10,
        10,
    )


@pytest.mark.parametrize(
    ("values", "least", "decimals"),
    [
        ([1, 0.995, 0.99], 0, 3),
        ([-0.01, -0.005, 0, 0.005, 0.01], 0, 3),
        ([0, 5, 10], 0, 0),
        ([0.5, 1.5], 0, 1),
        ([0, 0], 2, 2),
        ([0.00012], 3, 5),
        ([0.3, 0.1 + 0.2], 0, 1),
        ([math.inf, 2.0], 1, 1),
    ],
)
def test_numbers_that_differ_are_written_differently(values: list[float], least: int, decimals: int) -> None:
    assert decimals_of(values, least) == decimals


def test_what_the_interval_of_the_accuracy_allows_is_said() -> None:
    right, wrong, tie = (
        (np.array([1.0]), np.array([0.0])),
        (np.array([0.0]), np.array([1.0])),
        (np.zeros(1), np.zeros(1)),
    )
    noise = {"guide": make_metrics([right] * 6 + [wrong] * 10)}
    (warnings, notes) = remarks(noise)
    assert warnings == []
    assert "Too few pairs" in notes[0]
    assert "6 of 16 pairs" in notes[0]
    assert remarks({"guide": make_metrics([right] * 16)}) == ([], [])
    assert remarks({"guide": make_metrics([right] * 8 + [tie] * 8)}) == ([], [])
    warnings, notes = remarks({"guide 1": make_metrics([wrong] * 16), "guide 2": make_metrics([tie] * 16)})
    assert notes == []
    assert warnings[0].startswith("guide 1: GUIDE BELOW CHANCE")
    assert warnings[1].startswith("guide 2: GUIDE IS THE REFERENCE")
    assert make_metrics([tie]).alpha_limit(0.0, 0.5) == math.inf


def test_summary_says_the_metrics() -> None:
    text = summary({"guide": make_metrics(PAIRS)}, {"guide": "runs/dpo"}, alpha=1.0, beta=0.5)
    assert "2 pairs, 6 response tokens, alpha 1, beta 0.5" in text
    assert "runs/dpo" in text
    assert "50.0% (95% interval 9.5% to 90.5%), 1 tie, mean margin +1.000" in text
    assert "16.67% of the weights" in text
    assert "0.0% 0.67" in text
    small = summary({"guide": make_metrics(PAIRS)}, {"guide": "runs/dpo"}, alpha=1.0, beta=5e-6)
    assert "mean 1.0000033, deviation 0.0000125, 0.9999850 to 1.0000200" in small
    assert "mean margin +0.00001" in small
    # The rewards' scale is the guide's own, if it has one.
    own = summary({"guide": make_metrics(PAIRS)}, {"guide": "runs/dpo"}, alpha=1.0, beta=0.1, guide_beta=0.5)
    assert own.splitlines()[0] == "2 pairs, 6 response tokens, alpha 1, beta 0.1, guide_beta 0.5"
    assert own.splitlines()[1:] == text.splitlines()[1:]
