"""Computes the golden values of the losses in float64 with the standard library alone, from the paper's equations.

    python tests/golden/make_golden.py        rewrites tests/golden/losses.json

Source of the equations: TGDPO, arXiv 2506.14574, in the form of the reference code (dvlab-research/TGDPO,
src/llamafactory/train/tgdpo/trainer.py, dpo_loss, sigmoid branch); gradients are derived by hand below.
"""

import json
import math
import random
from pathlib import Path


def example(seed: int, lengths: list[tuple[int, int]], beta: float, alpha: float, guided: bool) -> dict:
    """One pack with made-up log-probs, its losses, and d(sum of losses)/d(policy log-probs)."""
    rng = random.Random(seed)
    record: dict = {"beta": beta, "alpha": alpha, "lengths": [], "policy": [], "reference": [], "guide": []}
    losses, gradient = [], []
    for pair in lengths:
        scores, weights = [], []
        for length, sign in zip(pair, (1.0, -1.0), strict=True):
            policy, reference, guide = ([-6.0 * rng.random() for _ in range(length)] for _ in range(3))
            rewards = [beta * (g - r) for g, r in zip(guide, reference, strict=True)]
            weight = [1.0 + sign * alpha * reward if guided else 1.0 for reward in rewards]
            scores.append(beta * math.fsum(w * (p - r) for w, p, r in zip(weight, policy, reference, strict=True)))
            weights.append(weight)
            record["lengths"].append(length)
            record["policy"] += policy
            record["reference"] += reference
            record["guide"] += guide
        margin = scores[0] - scores[1]
        losses.append(math.log1p(math.exp(-margin)))
        # d(-log sigmoid(m))/dm = -sigmoid(-m); dm/dlogp = +-beta * weight
        slope = -1.0 / (1.0 + math.exp(margin))
        gradient += [slope * beta * w for w in weights[0]] + [-slope * beta * w for w in weights[1]]
    if not guided:
        record["guide"] = None
    return {**record, "losses": losses, "gradient": gradient}


def main() -> None:
    cases = {
        "tgdpo": example(1, [(3, 5), (7, 1), (2, 2)], 0.1, 0.5, True),
        "tgdpo_strong": example(2, [(40, 31), (5, 60)], 0.7, 2.0, True),
        "dpo": example(3, [(4, 6), (1, 9)], 0.1, 0.5, False),
    }
    Path(__file__).with_name("losses.json").write_text(json.dumps(cases, indent=1) + "\n")


if __name__ == "__main__":
    main()
