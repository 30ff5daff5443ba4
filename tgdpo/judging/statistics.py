"""Win rates, also without the effect of length, and their intervals."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from megatron_tgdpo.intervals import Estimate

RESAMPLES, SEED = 1000, 0
_INVERSE_PENALTY = 100.0  # C of alpaca_eval's fit without cross-validation


def length_controlled(outcomes: np.ndarray, differences: np.ndarray) -> float | None:
    """The win rate that the judge would give to answers of equal length, in [0, 1].

    The outcome y of a comparison is modelled as sigmoid(theta + phi * tanh(d / std(d))), with d the difference of
    the answers' lengths; the result is sigmoid(theta). This is AlpacaEval 2's regression (Dubois et al., 2024, arXiv
    2404.04475; ``length_controlled_minimal`` of alpaca_eval's ``glm_winrate.py``), without its term for each
    instruction's difficulty, which is known for its own questions only. The penalty is (theta^2 + phi^2) / (2 * 100);
    there it is L1, of a strength found by cross-validation.

    Args:
        outcomes: [n], 1 won, 0.5 tied, 0 lost.
        differences: [n], own length less that of the other's.

    Returns:
        None where lengths do not vary but differ, so that their effect cannot be told from the model's.
    """
    spread = float(np.std(differences, ddof=1)) if len(differences) > 1 else 0.0
    if spread == 0:
        if np.any(differences):
            return None
        spread = 1.0
    features = np.stack([np.ones(len(outcomes)), np.tanh(differences / spread)], axis=1)
    weights = np.zeros(2)
    loss = _loss(weights, features, outcomes)
    for _ in range(100):
        chances = _sigmoid(features @ weights)
        gradient = features.T @ (chances - outcomes) + weights / _INVERSE_PENALTY
        curvature = (features.T * (chances * (1 - chances))) @ features + np.eye(2) / _INVERSE_PENALTY
        step = np.linalg.solve(curvature, gradient)
        # Newton's step, halved until it helps: far from the optimum it may be too long.
        while (after := _loss(weights - step, features, outcomes)) > loss and np.abs(step).max() > 1e-10:
            step /= 2
        weights, loss = weights - step, after
        if np.abs(step).max() < 1e-8:
            break
    return float(_sigmoid(weights[0]))


def bootstrap(statistic: Callable[..., float | None], *columns: np.ndarray) -> Estimate | None:
    """A statistic of questions with its 95% percentile interval over resampled questions.

    Args:
        statistic: Takes the columns.
        columns: [n] each; all are resampled alike.

    Returns:
        None where the statistic is; without an interval for fewer than two questions.
    """
    value = statistic(*columns)
    if value is None:
        return None
    count = len(columns[0])
    if count < 2:
        return Estimate(value, None, None)
    random = np.random.default_rng(SEED)
    drawn = (random.integers(count, size=count) for _ in range(RESAMPLES))
    values = [made for rows in drawn if (made := statistic(*(column[rows] for column in columns))) is not None]
    low, high = np.percentile(values, [2.5, 97.5]) if values else (value, value)
    return Estimate(value, float(low), float(high))


def mean(values: np.ndarray) -> float:
    """The mean, as a Python number."""
    return float(np.mean(values))


def tie_rate(outcomes: np.ndarray) -> float:
    """The share of ties."""
    return float(np.mean(outcomes == 0.5))


def first_place_rate(games: Sequence[Sequence[float | None]]) -> float | None:
    """The share of A among the verdicts for A or B: one half for a judge that does not care about the order."""
    decided = [
        game if first else 1 - game
        for pair in games
        for first, game in zip((True, False), pair, strict=True)
        if game is not None and game != 0.5
    ]
    return sum(decided) / len(decided) if decided else None


def _sigmoid(x: Any) -> Any:
    return np.exp(-np.logaddexp(0, -x))


def _loss(weights: np.ndarray, features: np.ndarray, outcomes: np.ndarray) -> float:
    scores = features @ weights
    return float(np.sum(np.logaddexp(0, scores) - outcomes * scores) + weights @ weights / (2 * _INVERSE_PENALTY))
