"""Time to plan packs, and how many packs, beside the linear search and the parts that they replace.

    python -m tools.benchmarks.packing [--tokens 4096] [--pairs 1024 8192 100000]

Pairs have log-normal lengths, of a sixth of a pack on average and at most half of one. The lower bound is all tokens by
those of a pack.
"""

import argparse
import math
import time
from collections.abc import Callable, Sequence

import numpy as np

from megatron_tgdpo.batching.packer import first_fit_decreasing

_PART = 1024
# Beyond so many pairs, the linear search takes minutes.
_LINEAR = 20_000


def linear_search(tokens: Sequence[int], capacity: int) -> int:
    """Packs of the same rule, each found by looking at one pack after another."""
    room: list[int] = []
    for size in sorted(tokens, reverse=True):
        slot = next((slot for slot, free in enumerate(room) if free >= size), None)
        if slot is None:
            room.append(capacity - size)
        else:
            room[slot] -= size
    return len(room)


def in_parts(tokens: Sequence[int], capacity: int) -> int:
    """Packs where each part of the pairs is planned by itself."""
    return sum(linear_search(tokens[start : start + _PART], capacity) for start in range(0, len(tokens), _PART))


def by_tree(tokens: Sequence[int], capacity: int) -> int:
    """Packs as runs have them."""
    return len(first_fit_decreasing(range(len(tokens)), tokens, capacity)[0])


def measure(plan: Callable[[Sequence[int], int], int], tokens: Sequence[int], capacity: int) -> tuple[float, int]:
    """Seconds, the best of three, and packs."""
    seconds = []
    for _ in range(3):
        started = time.perf_counter()
        packs = plan(tokens, capacity)
        seconds.append(time.perf_counter() - started)
    return min(seconds), packs


def main() -> None:
    """Prints a line for each number of pairs and way to plan."""
    parser = argparse.ArgumentParser(prog="python -m tools.benchmarks.packing")
    parser.add_argument("--tokens", type=int, default=4096, help="of a pack")
    parser.add_argument("--pairs", type=int, nargs="+", default=[1024, 8192, 100_000])
    options = parser.parse_args()
    print(f"{'pairs':>7} {'way':<14} {'ms':>8} {'packs':>6} {'above bound':>11}")
    for count in options.pairs:
        drawn = np.random.default_rng(0).lognormal(math.log(options.tokens / 7.5), 0.6, count)
        tokens = np.clip(drawn, 16, options.tokens // 2).astype(int).tolist()
        bound = math.ceil(sum(tokens) / options.tokens)
        ways = {"tree": by_tree, "parts of 1,024": in_parts}
        if count <= _LINEAR:
            ways["linear search"] = linear_search
        for name, plan in ways.items():
            seconds, packs = measure(plan, tokens, options.tokens)
            print(f"{count:>7} {name:<14} {1000 * seconds:>8.1f} {packs:>6} {packs / bound - 1:>11.2%}")


if __name__ == "__main__":
    main()
