"""Steps whose packs are planned and collated before them, and steps whose packs are made while the one before computes.

    python -m tools.benchmarks.ahead [--pairs 8192] [--ranks 64] [--step-ms 300] [--steps 8]

The packs are those of one of so many data ranks, which plans the pairs of all; the step waits without Python, as for a
GPU.
"""

import argparse
import time
from statistics import median

import numpy as np
import torch

from megatron_tgdpo.batching.collate import PreferenceBatch, collate
from megatron_tgdpo.batching.packed_sequence import PackFormat
from megatron_tgdpo.batching.packer import plan_packs
from megatron_tgdpo.data.dataset import PreferencePair
from megatron_tgdpo.training.ahead import Ahead

FORMAT = PackFormat(tokens=4096, shared_prompts=True)


class Steps:
    """Makes the packs of steps of random pairs.

    Attributes:
        lengths: [P, 3] int64, prompt, chosen and rejected tokens.
    """

    def __init__(self, pairs: int, ranks: int) -> None:
        drawn = np.random.default_rng(0).lognormal(5.2, 0.6, (pairs, 3))
        self.lengths, self._ranks = np.clip(drawn, 8, 1300).astype(np.int64), ranks

    def make(self, number: int) -> list[PreferenceBatch]:
        """The first data rank's packs of a step."""
        order = np.random.default_rng(number).permutation(len(self.lengths))
        tokens = FORMAT.pair_tokens(self.lengths[order]).tolist()
        plan = plan_packs(order.tolist(), tokens, FORMAT.tokens, self._ranks)[0]
        return [collate([self._pair(index) for index in pack], FORMAT) for pack in plan]

    def _pair(self, index: int) -> PreferencePair:
        prompt, chosen, rejected = (np.full(size, index % 997, dtype=np.int64) for size in self.lengths[index])
        return PreferencePair(index=index, prompt=prompt, chosen=chosen, rejected=rejected)


def main() -> None:
    """Runs both kinds of steps by turns, and prints what they take beyond computing."""
    parser = argparse.ArgumentParser(prog="python -m tools.benchmarks.ahead")
    parser.add_argument("--pairs", type=int, default=8192, help="of a step, over all ranks")
    parser.add_argument("--ranks", type=int, default=64, help="data ranks")
    parser.add_argument("--step-ms", type=float, default=300.0, help="that a step computes")
    parser.add_argument("--steps", type=int, default=8)
    options = parser.parse_args()
    torch.set_num_threads(1)
    steps, seconds = Steps(options.pairs, options.ranks), options.step_ms / 1000
    taken: dict[str, list[float]] = {"before": [], "ahead": []}
    with Ahead(steps.make) as ahead:
        for number in range(options.steps):
            began = time.perf_counter()
            steps.make(number)
            time.sleep(seconds)
            taken["before"].append(time.perf_counter() - began - seconds)
            began = time.perf_counter()
            ahead.start(number)
            time.sleep(seconds)
            ahead.take()
            taken["ahead"].append(time.perf_counter() - began - seconds)
    for name, extra in taken.items():
        print(f"{name:<7} {1000 * median(extra):8.1f} ms a step beyond its {options.step_ms:g} ms")


if __name__ == "__main__":
    main()
