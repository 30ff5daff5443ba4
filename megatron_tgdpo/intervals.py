"""95% confidence intervals of the metrics that models are judged by. Standard library only.

Observations (pairs, answers) are taken as independent draws; the intervals say nothing about another training seed.
"""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

_Z = statistics.NormalDist().inv_cdf(0.975)


@dataclass(frozen=True)
class Estimate:
    """A metric and the ends of its 95% interval; the ends are None where there are too few observations for one."""

    value: float
    low: float | None
    high: float | None


def wilson(successes: int, trials: int) -> Estimate:
    """A proportion with Wilson's score interval, which stays within [0, 1] and is sound for few trials.

    Source: Wilson (1927); the form without continuity correction.

    Args:
        successes: At most ``trials``.
        trials: At least 1.
    """
    share = successes / trials
    spread = _Z * math.sqrt(share * (1 - share) / trials + _Z**2 / (4 * trials**2))
    centre, scale = share + _Z**2 / (2 * trials), 1 + _Z**2 / trials
    return Estimate(share, max((centre - spread) / scale, 0.0), min((centre + spread) / scale, 1.0))


def mean_interval(values: Sequence[float]) -> Estimate:
    """A mean with the normal interval: 1.96 standard errors to each side.

    Args:
        values: At least one; two for an interval.
    """
    mean = statistics.fmean(values)
    if len(values) < 2:
        return Estimate(mean, None, None)
    return _normal(mean, statistics.stdev(values, mean) / math.sqrt(len(values)))


def ratio_interval(numerators: Sequence[float], denominators: Sequence[float]) -> Estimate:
    """sum(numerators) / sum(denominators), such as nats per token over answers, with the delta method's interval.

    Its standard error is that of the mean of ``numerator - ratio * denominator``, over the mean denominator.

    Args:
        numerators: One an observation.
        denominators: Positive, one an observation.
    """
    ratio = math.fsum(numerators) / math.fsum(denominators)
    if len(numerators) < 2:
        return Estimate(ratio, None, None)
    residuals = [over - ratio * under for over, under in zip(numerators, denominators, strict=True)]
    error = statistics.stdev(residuals, 0.0) / math.sqrt(len(residuals))
    return _normal(ratio, error / statistics.fmean(denominators))


def correlation_interval(x: Sequence[float], y: Sequence[float]) -> Estimate | None:
    """Pearson's correlation with Fisher's interval, normal in atanh(r); None where either has one value alone.

    Args:
        x: One an observation; four for an interval.
        y: As many.
    """
    try:
        correlation = statistics.correlation(x, y)
    except statistics.StatisticsError:
        return None
    if len(x) < 4:
        return Estimate(correlation, None, None)
    # Rounding may take it to 1 or beyond.
    middle = math.atanh(max(min(correlation, 1 - 1e-15), -1 + 1e-15))
    spread = _Z / math.sqrt(len(x) - 3)
    return Estimate(correlation, math.tanh(middle - spread), math.tanh(middle + spread))


def _normal(mean: float, error: float) -> Estimate:
    return Estimate(mean, mean - _Z * error, mean + _Z * error)
