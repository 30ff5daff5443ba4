"""Metrics of a study, with 95% intervals over its seeds."""

import math
import statistics
from collections.abc import Sequence

from scipy import stats

from megatron_tgdpo.intervals import Estimate


def seed_interval(values: Sequence[float]) -> Estimate:
    """Mean over seeds with Student's interval: the seeds are few, and they differ in everything that is random.

    Args:
        values: One a seed; two or more for an interval.
    """
    mean = statistics.fmean(values)
    if len(values) < 2:
        return Estimate(mean, None, None)
    half = stats.t.ppf(0.975, len(values) - 1) * statistics.stdev(values) / math.sqrt(len(values))
    return Estimate(mean, mean - half, mean + half)


def win_rate(ours: Sequence[float], theirs: Sequence[float]) -> float:
    """Share of prompts whose first score is higher; equal scores count half."""
    wins = [0.5 if a == b else float(a > b) for a, b in zip(ours, theirs, strict=True)]
    return statistics.fmean(wins)
