"""Computes the golden values of the losses in float64 with the standard library alone, from the papers' equations.

    python tests/golden/make_golden.py        rewrites tests/golden/losses.json

Sources of the equations: TGDPO, arXiv 2506.14574, in the form of the reference code (dvlab-research/TGDPO,
src/llamafactory/train/tgdpo/trainer.py, dpo_loss, sigmoid branch); DPO, arXiv 2305.18290; conservative DPO,
https://ericmitchell.ai/cdpo.pdf, with LLaMA-Factory's pref_ftx term; SimPO, arXiv 2405.14734, equation 6. Gradients are
derived by hand below.
"""

import json
import math
import random
from pathlib import Path

Pair = tuple[int, int]


def example(seed: int, lengths: list[Pair], method: str, **options: float) -> dict:
    """One pack with made-up log-probs, its losses, and d(sum of losses)/d(policy log-probs)."""
    rng = random.Random(seed)
    record: dict = {"method": method, "options": options, "lengths": [], "policy": [], "reference": [], "guide": []}
    losses, gradient = [], []
    for pair in lengths:
        sides = []
        for length in pair:
            side = tuple([-6.0 * rng.random() for _ in range(length)] for _ in range(3))
            sides.append(side)
            record["lengths"].append(length)
            for name, values in zip(("policy", "reference", "guide"), side, strict=True):
                record[name] += values
        loss, slopes = METHODS[method](*sides, **options)
        losses.append(loss)
        gradient += slopes
    if method != "tgdpo":
        record["guide"] = None
    if method in ("simpo", "sft"):
        record["reference"] = None
    return {**record, "losses": losses, "gradient": gradient}


def tgdpo(chosen: tuple, rejected: tuple, beta: float, alpha: float) -> tuple[float, list[float]]:
    scores, weights = [], []
    for (policy, reference, guide), sign in ((chosen, 1.0), (rejected, -1.0)):
        rewards = [beta * (g - r) for g, r in zip(guide, reference, strict=True)]
        weight = [1.0 + sign * alpha * reward for reward in rewards]
        scores.append(beta * math.fsum(w * (p - r) for w, p, r in zip(weight, policy, reference, strict=True)))
        weights.append(weight)
    loss, slope = logistic(scores[0] - scores[1])
    # dm/dlogp = +-beta * weight
    return loss, [slope * beta * w for w in weights[0]] + [-slope * beta * w for w in weights[1]]


def dpo(
    chosen: tuple, rejected: tuple, beta: float, label_smoothing: float = 0.0, sft_weight: float = 0.0
) -> tuple[float, list[float]]:
    scores = [beta * math.fsum(p - r for p, r in zip(*side[:2], strict=True)) for side in (chosen, rejected)]
    right, right_slope = logistic(scores[0] - scores[1])
    wrong, wrong_slope = logistic(scores[1] - scores[0])
    slope = beta * ((1.0 - label_smoothing) * right_slope - label_smoothing * wrong_slope)
    lengths = len(chosen[0]), len(rejected[0])
    loss = (1.0 - label_smoothing) * right + label_smoothing * wrong
    loss -= sft_weight * math.fsum(chosen[0]) / lengths[0]
    return loss, [slope - sft_weight / lengths[0]] * lengths[0] + [-slope] * lengths[1]


def simpo(chosen: tuple, rejected: tuple, beta: float, gamma: float) -> tuple[float, list[float]]:
    lengths = len(chosen[0]), len(rejected[0])
    loss, slope = logistic(
        beta * math.fsum(chosen[0]) / lengths[0] - beta * math.fsum(rejected[0]) / lengths[1] - gamma
    )
    return loss, [slope * beta / lengths[0]] * lengths[0] + [-slope * beta / lengths[1]] * lengths[1]


def sft(chosen: tuple, rejected: tuple) -> tuple[float, list[float]]:
    return -math.fsum(chosen[0]), [-1.0] * len(chosen[0]) + [0.0] * len(rejected[0])


def logistic(margin: float) -> tuple[float, float]:
    """-log sigmoid(m), and its derivative -sigmoid(-m)."""
    return math.log1p(math.exp(-margin)), -1.0 / (1.0 + math.exp(margin))


METHODS = {"tgdpo": tgdpo, "dpo": dpo, "simpo": simpo, "sft": sft}


def main() -> None:
    cases = {
        "tgdpo": example(1, [(3, 5), (7, 1), (2, 2)], "tgdpo", beta=0.1, alpha=0.5),
        "tgdpo_strong": example(2, [(40, 31), (5, 60)], "tgdpo", beta=0.7, alpha=2.0),
        "dpo": example(3, [(4, 6), (1, 9)], "dpo", beta=0.1),
        "dpo_smoothed": example(4, [(4, 6), (8, 2)], "dpo", beta=0.3, label_smoothing=0.2),
        "dpo_sft": example(5, [(4, 6), (1, 9)], "dpo", beta=0.1, label_smoothing=0.1, sft_weight=0.4),
        "simpo": example(6, [(3, 5), (7, 1)], "simpo", beta=2.5, gamma=1.4),
        "sft": example(7, [(3, 5), (7, 1)], "sft"),
    }
    Path(__file__).with_name("losses.json").write_text(json.dumps(cases, indent=1) + "\n")


if __name__ == "__main__":
    main()
