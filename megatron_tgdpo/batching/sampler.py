"""In which order a run takes its pairs: a pure function of the datasets' sizes and weights, seed and step."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np


@dataclass(frozen=True)
class DatasetPart:
    """One of the datasets that lie one after another in ``data.train``.

    Attributes:
        pairs: How many it has.
        weight: How often an epoch takes each of them.
    """

    pairs: int
    weight: float = 1.0

    @property
    def draws(self) -> int:
        """Pairs that an epoch takes of it: ``weight * pairs``, rounded."""
        return round(self.weight * self.pairs)


@dataclass(frozen=True)
class Sampler:
    """The endless stream of pairs that steps consume: epoch after epoch, each in its own order.

    A dataset is a stream of its own, pass after pass; an epoch takes the next ``weight * pairs`` of it, so that over
    the epochs each of its pairs comes as often as any other. With a weight of 1 that is each pair once, and with such
    weights alone the order is that of one dataset with all the pairs.

    Attributes:
        parts: The datasets, as they lie one after another.
        global_pairs: Pairs per step.
        total_pairs: Pairs of the whole run; the last step may be smaller.
        shuffle: A new permutation per epoch, else file order.
        seed: Of the permutations.
        done_steps: Steps that were made before, with perhaps other numbers of pairs; only later ones can be asked for.
        done_pairs: Pairs that they consumed.
    """

    parts: tuple[DatasetPart, ...]
    global_pairs: int
    total_pairs: int
    shuffle: bool
    seed: int
    done_steps: int = 0
    done_pairs: int = 0

    @property
    def epoch_pairs(self) -> int:
        """Pairs that an epoch takes, counted as often as it takes them."""
        return sum(part.draws for part in self.parts)

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
        epoch, offset = divmod(position, self.epoch_pairs)
        return int(_epoch(self.parts, self.shuffle, self.seed, epoch)[offset])


@lru_cache(maxsize=2)
def _epoch(parts: tuple[DatasetPart, ...], shuffle: bool, seed: int, epoch: int) -> np.ndarray:
    """[epoch_pairs] int64, the indices that an epoch takes, in its order."""
    start, drawn = 0, []
    for number, part in enumerate(parts):
        drawn.append(start + _drawn(part, number, shuffle, seed, epoch))
        start += part.pairs
    order = np.concatenate(drawn)
    return order[_generator(seed, epoch).permutation(len(order))] if shuffle else order


def _drawn(part: DatasetPart, number: int, shuffle: bool, seed: int, epoch: int) -> np.ndarray:
    """[draws] int64, the places in a dataset of the pairs that an epoch takes: a piece of its stream of passes."""
    first, end = epoch * part.draws, (epoch + 1) * part.draws
    pieces = []
    for turn in range(first // part.pairs, -(-end // part.pairs)):
        # A whole pass has every pair, in whatever order: the epoch has one of its own.
        whole = first <= turn * part.pairs and (turn + 1) * part.pairs <= end
        places = np.arange(part.pairs)
        if shuffle and not whole:
            # Not 0 at the end of the seed: that would be the seed without it.
            places = _generator(seed, turn, number + 1).permutation(part.pairs)
        pieces.append(places[max(first - turn * part.pairs, 0) : end - turn * part.pairs])
    return np.concatenate(pieces)


def _generator(*seed: int) -> np.random.Generator:
    return np.random.Generator(np.random.PCG64(list(seed)))


def make_sampler(
    parts: Sequence[DatasetPart],
    global_pairs: int,
    steps: int | None,
    epochs: float | None,
    shuffle: bool,
    seed: int,
    done_steps: int = 0,
    done_pairs: int = 0,
) -> Sampler:
    """The data order of a run of ``steps`` steps, or of ``epochs`` passes (then the last step may be smaller).

    Steps that were made before are counted by ``steps``; the pairs that they consumed, by ``epochs``.
    """
    order = Sampler(tuple(parts), global_pairs, 0, shuffle, seed, done_steps, done_pairs)
    if steps is not None:
        total = done_pairs + (steps - done_steps) * global_pairs
    else:
        total = max(1, round((epochs or 0.0) * order.epoch_pairs))
    return replace(order, total_pairs=total)
