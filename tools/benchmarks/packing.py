"""How many packs planning makes of pairs, beside first fit alone and beside lower bounds, and the time that it takes.

    python -m tools.benchmarks.packing [--tokens 4096] [--pairs 64 1024 8192]
    python -m tools.benchmarks.packing --pairs 512 --programme            # beside a bound by linear programming, too
    python -m tools.benchmarks.packing --pairs 300 --pairs-from pairs.jsonl --tokenizer DIRECTORY

Bounds: all tokens by those of a pack; dual feasible functions (`batching/bin_packing.py: lower_bound`); and, with
``--programme`` (it needs scipy, and seconds), Gilmore and Gomory's programme over patterns of packs. No packer can be
below any of them, so a column above the largest says how much there can be left to gain at most.
"""

import argparse
import math
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np

from megatron_tgdpo.batching.bin_packing import Bins, first_fit_decreasing, lower_bound, pack
from megatron_tgdpo.batching.packed_sequence import PackFormat
from tools.benchmarks.training_step.preference_pairs import find_source, tokenise
from tools.benchmarks.training_step.table import aligned

# Beyond so many pairs, the linear search takes minutes.
_LINEAR = 20_000
# Parts of a pack in which the programme counts: the bound loses what pairs take beyond a whole one.
_GRID = 256
_ROUNDS = 400


def linear_search(tokens: Sequence[int], capacity: int) -> Bins:
    """First fit decreasing, each pack found by looking at one after another."""
    bins: Bins = []
    room: list[int] = []
    for place in sorted(range(len(tokens)), key=lambda place: (-tokens[place], place)):
        slot = next((slot for slot, free in enumerate(room) if free >= tokens[place]), len(bins))
        if slot == len(bins):
            bins.append([])
            room.append(capacity)
        bins[slot].append(place)
        room[slot] -= tokens[place]
    return bins


def drawn_lengths(count: int, capacity: int) -> Iterator[tuple[str, np.ndarray]]:
    """Tokens of pairs, by the name of how they are distributed; parts of a pack."""
    rng = np.random.default_rng(0)
    for mean, spread, most in ((1 / 6, 0.6, 0.5), (1 / 3, 0.5, 1.0), (0.43, 0.4, 1.0)):
        drawn = rng.lognormal(math.log(mean * capacity) - spread**2 / 2, spread, count)
        yield f"log-normal, mean {mean:.2f}", np.clip(drawn, 16, most * capacity).astype(int)
    for low, high in ((0, 1), (0, 0.5), (0.15, 0.5), (0.2, 0.5), (0.25, 0.5), (1 / 3, 0.5), (0.15, 0.67)):
        least = max(16, math.ceil(low * capacity))
        yield f"even, {low:.2f} to {high:.2f}", rng.integers(least, int(high * capacity), count, endpoint=True)
    for mean in (0.3, 0.4):
        yield f"normal, {mean} +- 0.05", np.clip(rng.normal(mean, 0.05, count), 0.01, 1).dot(capacity).astype(int)


def programme_bound(tokens: np.ndarray, capacity: int) -> int:
    """Packs by the linear programme over patterns, of lengths that are rounded down.

    Any prices of lengths under which no pattern costs more than one pack bound the packs from below (Farley 1990), so
    it need not be solved to its end.
    """
    from scipy.optimize import linprog

    sizes, counts = np.unique(tokens * _GRID // capacity, return_counts=True)
    sizes, counts = sizes[sizes > 0], counts[sizes > 0]
    patterns = [np.eye(len(sizes))[number] * (_GRID // size) for number, size in enumerate(sizes)]
    best = 0.0
    for _ in range(_ROUNDS):
        solved = linprog(np.ones(len(patterns)), A_ub=-np.array(patterns).T, b_ub=-counts, method="highs")
        prices = -solved.ineqlin.marginals
        value, last = _dearest(sizes, prices)
        best = max(best, prices @ counts / max(1.0, value[_GRID]))
        if value[_GRID] <= 1.001:
            break
        for room in (_GRID, _GRID - 1, _GRID - 2):
            pattern, left = np.zeros(len(sizes)), room
            while last[left] >= 0:
                pattern[last[left]] += 1
                left -= sizes[last[left]]
            patterns.append(pattern)
    return math.ceil(best - 1e-6)


def _dearest(sizes: np.ndarray, prices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """What the dearest pattern of each room costs, and a size in it, or -1."""
    value, last = np.zeros(_GRID + 1), np.full(_GRID + 1, -1)
    for room in range(1, _GRID + 1):
        fitting = int(np.searchsorted(sizes, room, side="right"))
        if fitting:
            costs = value[room - sizes[:fitting]] + prices[:fitting]
            if costs.max() > 0:
                value[room], last[room] = costs.max(), costs.argmax()
    return value, last


def measured(plan: Callable[[Sequence[int], int], Bins], tokens: Sequence[int], capacity: int) -> tuple[float, int]:
    """Milliseconds, the best of three, and packs."""
    seconds = []
    for _ in range(3):
        started = time.perf_counter()
        packs = len(plan(tokens, capacity))
        seconds.append(time.perf_counter() - started)
    return 1000 * min(seconds), packs


def _row(name: str, tokens: np.ndarray, capacity: int, programme: bool) -> list[str]:
    sizes = tokens.tolist()
    plain, first = measured(first_fit_decreasing, sizes, capacity)
    whole, packs = measured(lambda *given: pack(*given)[0], sizes, capacity)
    linear = f"{measured(linear_search, sizes, capacity)[0]:.1f}" if len(sizes) <= _LINEAR else "-"
    everything, few = -(-int(tokens.sum()) // capacity), lower_bound(sizes, capacity)
    if programme:
        few = max(few, programme_bound(tokens, capacity))
    cells = [f"{packs}", f"{packs / everything - 1:.2%}", f"{first / few - 1:.2%}", f"{packs / few - 1:.2%}"]
    return [f"{len(sizes)}", name, *cells, linear, f"{plain:.1f}", f"{whole:.1f}"]


def _real_lengths(options: argparse.Namespace) -> Iterator[tuple[str, np.ndarray]]:
    """Tokens in packs of the pairs of a file, with their prompts shared and not."""
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory)
        count = max(options.pairs)
        source = find_source(path, count, options.pairs_from, options.tokenizer)
        lengths = np.array(tokenise(path, source, options.tokens // 2).dataset.lengths)
    for shared in (True, False):
        name = f"given, {'shared' if shared else 'repeated'} prompts"
        yield name, PackFormat(options.tokens, shared_prompts=shared).pair_tokens(lengths)


def main() -> None:
    """Prints a line for each number of pairs and distribution."""
    parser = argparse.ArgumentParser(prog="python -m tools.benchmarks.packing")
    parser.add_argument("--tokens", type=int, default=4096, help="of a pack")
    parser.add_argument("--pairs", type=int, nargs="+", default=[64, 1024, 8192])
    parser.add_argument("--programme", action="store_true", help="with the bound of linear programming")
    parser.add_argument("--pairs-from", type=Path, metavar="FILE", help="real pairs; their responses are cut to fit")
    parser.add_argument("--tokenizer", type=Path, metavar="PATH", help="of the pairs of a file")
    options = parser.parse_args()
    head = ["pairs", "tokens of a pair, by a pack", "packs", "above all tokens", "above bound: first fit", "packs"]
    rows = []
    if options.pairs_from is not None:
        rows += [_row(name, drawn, options.tokens, options.programme) for name, drawn in _real_lengths(options)]
    else:
        for count in options.pairs:
            for name, drawn in drawn_lengths(count, options.tokens):
                rows.append(_row(name, drawn, options.tokens, options.programme))
    print(aligned([*head, "ms: linear search", "first fit", "packs"], rows))


if __name__ == "__main__":
    main()
