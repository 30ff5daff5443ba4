"""In which order a run takes its pairs: a pure function of the dataset's size, seed and step."""

import math
from dataclasses import dataclass
from functools import lru_cache

import numpy as np


@dataclass(frozen=True)
class DataOrder:
    """The endless stream of pairs that steps consume: epoch after epoch, each in its own order.

    Attributes:
        num_pairs: Pairs in the dataset.
        global_pairs: Pairs per step.
        total_pairs: Pairs of the whole run; the last step may be smaller.
        shuffle: A new permutation per epoch, else file order.
        seed: Of the permutations.
        done_steps: Steps that were made before, with perhaps other numbers of pairs; only later ones can be asked for.
        done_pairs: Pairs that they consumed.
    """

    num_pairs: int
    global_pairs: int
    total_pairs: int
    shuffle: bool
    seed: int
    done_steps: int = 0
    done_pairs: int = 0

    @property
    def steps(self) -> int:
        """Of the whole run; fewer than ``done_steps`` if more pairs were consumed than it has."""
        return self.done_steps + math.ceil((self.total_pairs - self.done_pairs) / self.global_pairs)

    def consumed_pairs(self, steps: int) -> int:
        """Pairs consumed after ``steps`` steps, of which the last ``steps - done_steps`` are of this size."""
        return min(self.done_pairs + (steps - self.done_steps) * self.global_pairs, self.total_pairs)

    def step_indices(self, step: int) -> list[int]:
        """Dataset indices of the pairs of ``step``, counted from 1."""
        stream = range(self.consumed_pairs(step - 1), self.consumed_pairs(step))
        return [self._index(position) for position in stream]

    def _index(self, position: int) -> int:
        epoch, offset = divmod(position, self.num_pairs)
        return int(_permutation(self.num_pairs, self.seed, epoch)[offset]) if self.shuffle else offset


@lru_cache(maxsize=2)
def _permutation(size: int, seed: int, epoch: int) -> np.ndarray:
    return np.random.Generator(np.random.PCG64([seed, epoch])).permutation(size)


def make_data_order(
    num_pairs: int,
    global_pairs: int,
    steps: int | None,
    epochs: float | None,
    shuffle: bool,
    seed: int,
    done_steps: int = 0,
    done_pairs: int = 0,
) -> DataOrder:
    """The data order of a run of ``steps`` steps, or of ``epochs`` passes (then the last step may be smaller).

    Steps that were made before are counted by ``steps``; the pairs that they consumed, by ``epochs``.
    """
    if steps is not None:
        total = done_pairs + (steps - done_steps) * global_pairs
    else:
        total = max(1, round((epochs or 0.0) * num_pairs))
    return DataOrder(num_pairs, global_pairs, total, shuffle, seed, done_steps, done_pairs)
