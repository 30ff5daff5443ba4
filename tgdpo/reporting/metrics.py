"""Metrics of what the guide rewards over a whole set of pairs.

Everything follows from one number a token, the guide's log-ratio x = log pi_g - log pi_ref (nats): its reward is
beta * x, its weight 1 + alpha * beta * x on chosen and 1 - alpha * beta * x on rejected responses. So the metrics are
kept in units of x, and alpha and beta only scale them.
"""

import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from megatron_tgdpo.intervals import Estimate, correlation_interval, wilson

# Shares of tokens for which the alpha is given beyond which more of them have negative weights.
NEGATIVE_SHARES = (0.0, 0.001, 0.01, 0.05, 0.1)
QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)
_BINS = 41
_HISTOGRAM_SHARE = 0.995
_COLOUR_SHARE = 0.97
_TOKENS_SHOWN = 10
_TOKEN_COUNT = 3

ResponseLogratios = tuple[np.ndarray, np.ndarray]


@dataclass(frozen=True)
class PositionBin:
    """Tokens of one kind of response at positions ``first`` to ``last`` of it (from 1); ``quantiles`` of x there."""

    first: int
    last: int
    count: int
    quantiles: list[float]


@dataclass(frozen=True)
class TokenMean:
    """The mean x of all tokens with one text, and how many there are."""

    text: str
    count: int
    mean: float


@dataclass(frozen=True)
class Metrics:
    """Metrics of a set of pairs; x is a token's guide log-ratio, chosen and rejected are the two responses of a pair.

    Attributes:
        pairs: Number of pairs.
        correct: Pairs where x summed over chosen is above x summed over rejected.
        ties: Pairs where the two sums are equal.
        margins: [pairs] difference of these sums.
        by_length: Correlation of the margins with the difference in length, chosen less rejected tokens; None where
            either is the same in all pairs.
        toward: [tokens] x on chosen and -x on rejected tokens, ascending: what alpha * beta multiplies in the weights.
        scale: |x| that gets the full colour.
        edges: Of the histograms of x; what lies outside is counted in the first and last bin.
        counts: [2, bins] tokens of chosen and of rejected.
        positions: Of chosen and of rejected, position bins that double in width.
    """

    pairs: int
    correct: int
    ties: int
    margins: np.ndarray
    by_length: Estimate | None
    toward: np.ndarray
    scale: float
    edges: np.ndarray
    counts: np.ndarray
    positions: tuple[list[PositionBin], list[PositionBin]]

    @property
    def accuracy(self) -> float:
        """Share of pairs where the guide prefers chosen; a tie is not a preference."""
        return self.correct / self.pairs

    @property
    def interval(self) -> tuple[float | None, float | None]:
        """95 % confidence interval of the accuracy (Wilson)."""
        share = wilson(self.correct, self.pairs)
        return share.low, share.high

    def negative_fraction(self, alpha: float, beta: float) -> float:
        """Share of tokens whose weight is negative."""
        return float(np.mean(1 + alpha * beta * self.toward < 0))

    def tail(self, share: float) -> float:
        """The smallest value of ``toward`` when ``share`` of the tokens, rounded down, is left out below."""
        return float(self.toward[min(math.floor(share * len(self.toward) + 1e-9), len(self.toward) - 1)])

    def alpha_limit(self, share: float, beta: float) -> float:
        """The largest alpha at which at most ``share`` of the tokens have a negative weight; infinite if any has."""
        tail = self.tail(share)
        return -1 / (beta * tail) if tail < 0 else math.inf


def histogram_reach(pairs: Sequence[ResponseLogratios]) -> float:
    """|x| up to which :func:`make_metrics` draws histograms of pairs; the rest is in their outermost bins."""
    return float(np.quantile(np.abs(np.concatenate([x for pair in pairs for x in pair])), _HISTOGRAM_SHARE)) or 1.0


def make_metrics(pairs: Sequence[ResponseLogratios], reach: float | None = None) -> Metrics:
    """Computes the metrics.

    Args:
        pairs: x of each pair's chosen and rejected tokens, at least one pair, no response empty.
        reach: From :func:`histogram_reach`, the default; of several guides the largest, for equal bins.
    """
    responses = [[np.asarray(pair[response], dtype=np.float64) for pair in pairs] for response in range(2)]
    chosen, rejected = (np.concatenate(response) for response in responses)
    margins = np.array([c.sum() - r.sum() for c, r in zip(*responses, strict=True)])
    longer = [float(len(c) - len(r)) for c, r in zip(*responses, strict=True)]
    magnitudes = np.abs(np.concatenate([chosen, rejected]))
    reach = reach or histogram_reach(pairs)
    edges = np.linspace(-reach, reach, _BINS + 1)
    return Metrics(
        pairs=len(pairs),
        correct=int((margins > 0).sum()),
        ties=int((margins == 0).sum()),
        margins=margins,
        by_length=correlation_interval(longer, margins.tolist()),
        toward=np.sort(np.concatenate([chosen, -rejected])),
        scale=float(np.quantile(magnitudes, _COLOUR_SHARE)) or 1.0,
        edges=edges,
        counts=np.stack([np.histogram(x.clip(-reach, reach), edges)[0] for x in (chosen, rejected)]),
        positions=(_by_position(responses[0]), _by_position(responses[1])),
    )


def extreme_tokens(texts: Iterable[str], x: np.ndarray) -> tuple[int, list[TokenMean], list[TokenMean]]:
    """The tokens that the guide likes most and least better than the reference, by their mean x.

    Args:
        texts: Of the tokens; those without one, the first tokens of a character, are left out.
        x: [tokens].

    Returns:
        How often a token must occur to be among them (once, where few occur more often), and the extreme means: the
        largest first, the smallest first.
    """
    found: dict[str, list[float]] = defaultdict(list)
    for text, value in zip(texts, x.tolist(), strict=True):
        if text:
            found[text].append(value)
    often = {text: values for text, values in found.items() if len(values) >= _TOKEN_COUNT}
    least_count, chosen = (_TOKEN_COUNT, often) if len(often) >= 2 * _TOKENS_SHOWN else (1, found)
    means = [TokenMean(text, len(values), math.fsum(values) / len(values)) for text, values in chosen.items()]
    means.sort(key=lambda token: -token.mean)
    shown = min(_TOKENS_SHOWN, len(means) // 2)
    return least_count, means[:shown], means[::-1][:shown]


def _by_position(responses: Sequence[np.ndarray]) -> list[PositionBin]:
    bins: list[PositionBin] = []
    first = 1
    while True:
        last = 2 * first - 1
        values = np.concatenate([x[first - 1 : last] for x in responses])
        if not len(values):
            return bins
        bins.append(PositionBin(first, last, len(values), np.quantile(values, QUANTILES).tolist()))
        first = last + 1
