"""Figures against ones worked out by hand."""

import math

import numpy as np
import pytest

from tgdpo.reporting.build import chance_warning, summary
from tgdpo.reporting.figures import make_figures

# x of chosen and rejected tokens: margins 1 - (-3) = 4, and -3 - (-3) = 0, which is no preference.
PAIRS = [(np.array([2.0, -1.0]), np.array([-4.0, 1.0])), (np.array([-3.0]), np.array([-3.0]))]
# So alpha * beta multiplies, in order: -3, -1, -1, 2, 3, 4.


def test_guide_accuracy_and_margins() -> None:
    figures = make_figures(PAIRS)
    assert figures.margins.tolist() == [4.0, 0.0]
    assert (figures.pairs, figures.correct, figures.accuracy) == (2, 1, 0.5)
    # Wilson's interval of 1 in 2, from a table.
    assert figures.interval == pytest.approx((0.0945, 0.9055), abs=5e-5)


def test_negative_weights_and_the_alpha_where_they_begin() -> None:
    figures = make_figures(PAIRS)
    assert figures.toward.tolist() == [-3.0, -1.0, -1.0, 2.0, 3.0, 4.0]
    assert figures.negative_fraction(alpha=1.0, beta=0.5) == pytest.approx(1 / 6)
    assert figures.negative_fraction(alpha=3.0, beta=0.5) == pytest.approx(3 / 6)
    # 1 - alpha * 0.5 * 3 = 0 at 2/3; without that token 1 - alpha * 0.5 * 1 = 0 at 2; the rest has no limit.
    assert figures.alpha_limit(0.0, beta=0.5) == pytest.approx(2 / 3)
    assert figures.alpha_limit(1 / 6, beta=0.5) == pytest.approx(2.0)
    assert figures.alpha_limit(3 / 6, beta=0.5) == math.inf
    # At a limit the share is not exceeded, just above it is.
    limit = figures.alpha_limit(1 / 6, beta=0.5)
    assert figures.negative_fraction(limit * 0.999, 0.5) <= 1 / 6 < figures.negative_fraction(limit * 1.001, 0.5)


def test_distributions() -> None:
    figures = make_figures(PAIRS)
    chosen, rejected = figures.counts
    assert (chosen.sum(), rejected.sum()) == (3, 3)
    middles = (figures.edges[:-1] + figures.edges[1:]) / 2
    half_bin = (figures.edges[1] - figures.edges[0]) / 2
    assert np.repeat(middles, chosen) == pytest.approx([-3, -1, 2], abs=half_bin)
    # What lies outside is in the outermost bin.
    assert np.repeat(middles, rejected) == pytest.approx([figures.edges[0] + half_bin, -3, 1], abs=half_bin)
    first, second = figures.positions[0]
    assert (first.first, first.last, first.count) == (1, 1, 2)
    assert first.quantiles == pytest.approx([-2.75, -1.75, -0.5, 0.75, 1.75])
    assert (second.first, second.last, second.count, second.quantiles) == (2, 3, 1, [-1.0] * 5)


def test_a_guide_that_knows_nothing_is_warned_of() -> None:
    assert "only 1 of 2 pairs" in chance_warning(make_figures(PAIRS))
    assert chance_warning(make_figures(PAIRS[:1])) == ""
    same = [(np.zeros(2), np.zeros(1))]
    assert "swapped" in chance_warning(make_figures(same))
    assert make_figures(same).alpha_limit(0.0, 0.5) == math.inf


def test_summary_says_the_figures() -> None:
    text = summary(make_figures(PAIRS), alpha=1.0, beta=0.5)
    assert "2 pairs, 6 response tokens, alpha 1, beta 0.5" in text
    assert "50.0% (95% interval 9.5% to 90.5%), mean margin +1.000" in text
    assert "16.67% of the tokens" in text
    assert "0.0% 0.667" in text
