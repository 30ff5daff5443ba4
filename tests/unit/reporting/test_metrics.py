"""Metrics against ones worked out by hand."""

import math

import numpy as np
import pytest

from tgdpo.reporting.build import chance_warning, summary
from tgdpo.reporting.metrics import make_metrics

# x of chosen and rejected tokens: margins 1 - (-3) = 4, and -3 - (-3) = 0, which is no preference.
PAIRS = [(np.array([2.0, -1.0]), np.array([-4.0, 1.0])), (np.array([-3.0]), np.array([-3.0]))]
# So alpha * beta multiplies, in order: -3, -1, -1, 2, 3, 4.


def test_guide_accuracy_and_margins() -> None:
    metrics = make_metrics(PAIRS)
    assert metrics.margins.tolist() == [4.0, 0.0]
    assert (metrics.pairs, metrics.correct, metrics.accuracy) == (2, 1, 0.5)
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


def test_a_guide_that_knows_nothing_is_warned_of() -> None:
    assert "only 1 of 2 pairs" in chance_warning(make_metrics(PAIRS))
    assert chance_warning(make_metrics(PAIRS[:1])) == ""
    same = [(np.zeros(2), np.zeros(1))]
    assert "swapped" in chance_warning(make_metrics(same))
    assert make_metrics(same).alpha_limit(0.0, 0.5) == math.inf


def test_summary_says_the_metrics() -> None:
    text = summary(make_metrics(PAIRS), alpha=1.0, beta=0.5)
    assert "2 pairs, 6 response tokens, alpha 1, beta 0.5" in text
    assert "50.0% (95% interval 9.5% to 90.5%), mean margin +1.000" in text
    assert "16.67% of the tokens" in text
    assert "0.0% 0.667" in text
