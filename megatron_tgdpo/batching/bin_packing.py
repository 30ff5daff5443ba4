"""Items of whole sizes into as few bins of one capacity as can be found, and how few there must be.

In whole numbers alone, so that every rank finds the same bins.
"""

from bisect import bisect_right
from collections.abc import Iterable, Sequence
from functools import partial

import numpy as np

# Nothing better is looked for where first fit is as near to the bound.
_NEAR = 0.01
# A bin is tight that lacks no more of its capacity.
_TIGHT = 1 / 50
# Items that are tried as a bin's second.
_TRIED = 8
# Shares of the items, the largest of which are left to first fit.
_CUTS = 12
# Items of a bin, where it is the same for many of them.
_COUNTS = (3, 4, 5)
# Of so many items it is found which way is best for all.
_SAMPLE = 512

Bins = list[list[int]]


def pack(sizes: Sequence[int], capacity: int) -> tuple[Bins, list[int]]:
    """Packs items: by first fit decreasing where that is within 1 % of :func:`lower_bound`, else in the way that does
    best on a sample, if that needs fewer bins.

    Args:
        sizes: Of the items, at most ``capacity``.
        capacity: Of a bin.

    Returns:
        The bins, of places in ``sizes``, and the room that each has left.

    Raises:
        ValueError: An item fits no bin.
    """
    bins = first_fit_decreasing(sizes, capacity)
    near = len(bins) <= (1 + _NEAR) * -(-sum(sizes) // capacity)
    if not near and len(bins) > (1 + _NEAR) * lower_bound(sizes, capacity):
        ways = [partial(tight_fits, cut=cut) for cut in range(_CUTS)]
        ways += [partial(even_fits, most=most) for most in _COUNTS]
        order = _decreasing(sizes)
        sample = [sizes[place] for place in order[:: -(-len(order) // _SAMPLE)]]
        way = min(ways, key=lambda way: len(way(sample, capacity)))
        bins = min(bins, way(sizes, capacity), key=len)
    return bins, [capacity - sum(sizes[place] for place in each) for each in bins]


def first_fit_decreasing(sizes: Sequence[int], capacity: int) -> Bins:
    """Packs items, the largest first, each into the first bin that has room; in O(n log n).

    A binary tree over the bins, those that are still to be opened among them, has at every node the most room below it
    (Johnson 1973, Near-optimal bin packing algorithms). Arguments and errors are those of :func:`pack`.
    """
    if max(sizes, default=0) > capacity:
        raise ValueError(f"an item of {max(sizes)} in bins of {capacity}")
    # All but one bin are more than half full, for what is in the next one did not fit.
    leaves = 1 << (min(len(sizes), 2 * sum(sizes) // capacity + 1)).bit_length()
    tree = [capacity] * (2 * leaves)
    bins: Bins = []
    for place in _decreasing(sizes):
        size, node = sizes[place], 1
        while node < leaves:
            node *= 2
            if tree[node] < size:
                node += 1
        if node - leaves == len(bins):
            bins.append([])
        bins[node - leaves].append(place)
        tree[node] -= size
        while node > 1:
            most = max(tree[node], tree[node ^ 1])
            node //= 2
            if tree[node] == most:
                break
            tree[node] = most
    return bins


def tight_fits(sizes: Sequence[int], capacity: int, cut: int) -> Bins:
    """Packs items into bins that they fill to 2 %, as far as that goes, and the others by first fit decreasing.

    First fit pairs what is a little below a half, which wastes most where no small items are left to fill the rest:
    three items of a third are better. Here a bin gets the largest item that is left and then, of a few ways to go on,
    the one that leaves the least room (after the minimum bin slack heuristic of Gupta and Ho 1999). The very largest
    may do better by twos among themselves. O(n log n), but for a bit mask of the distinct sizes at each look-up.

    Args:
        sizes: Of the items.
        capacity: Of a bin.
        cut: So many twelfths of the items, the largest, are left to first fit.
    """
    order = _decreasing(sizes)
    first = len(order) * cut // _CUTS
    rest = order[:first]
    left = _Items(sizes, order[first:])
    bins: Bins = []
    while (largest := left.largest_up_to(capacity)) is not None:
        room = capacity - left.take(largest)
        fill, lacking = _best_fill(left, room)
        if lacking <= capacity * _TIGHT:
            bins.append([left.place(size) for size in (largest, *fill)])
            for size in fill:
                left.take(size)
        else:
            rest.append(left.place(largest))
    return bins + _first_fit_of(rest, sizes, capacity)


def even_fits(sizes: Sequence[int], capacity: int, most: int) -> Bins:
    """Packs the smallest items so many to a bin, evenly, as many as fit; of the others one less to a bin, and so on,
    and what is left by first fit decreasing. For items that are much alike.

    O(n log n) for each of log n numbers of bins that are tried.

    Args:
        sizes: Of the items.
        capacity: Of a bin.
        most: Items of a bin.
    """
    rest = _decreasing(sizes)
    bins: Bins = []
    for count in range(most, 1, -1):
        fitting: Bins = []
        low, high = 0, len(rest) // count
        while low < high:
            number = (low + high + 1) // 2
            tried = _dealt(rest[len(rest) - number * count :], number, sizes)
            if max(sum(sizes[place] for place in each) for each in tried) <= capacity:
                low, fitting = number, tried
            else:
                high = number - 1
        bins += fitting
        rest = rest[: len(rest) - low * count]
    return bins + _first_fit_of(rest, sizes, capacity)


def _dealt(order: Sequence[int], number: int, sizes: Sequence[int]) -> Bins:
    """Deals items out, the largest first, in rounds of one to each bin, the larger to the emptier."""
    bins: Bins = [[] for _ in range(number)]
    filled = [0] * number
    for start in range(0, len(order), number):
        for each, place in zip(
            sorted(range(number), key=lambda each: (filled[each], each)), order[start:], strict=False
        ):
            bins[each].append(place)
            filled[each] += sizes[place]
    return bins


def _first_fit_of(places: Sequence[int], sizes: Sequence[int], capacity: int) -> Bins:
    """First fit decreasing of some of the items."""
    bins = first_fit_decreasing([sizes[place] for place in places], capacity)
    return [[places[number] for number in each] for each in bins]


class _Items:
    """Items that are still to be packed, by size. Sizes are known by their rank among the distinct ones."""

    def __init__(self, sizes: Sequence[int], places: Iterable[int]) -> None:
        by_size: dict[int, list[int]] = {}
        for place in places:
            by_size.setdefault(sizes[place], []).append(place)
        self.sizes = sorted(by_size)
        self._places = [by_size[size][::-1] for size in self.sizes]
        self._left = [len(places) for places in self._places]
        self._mask = (1 << len(self.sizes)) - 1

    def largest_up_to(self, most: int) -> int | None:
        """The rank of the largest size of at most ``most`` that is left."""
        below = self._mask & ((1 << bisect_right(self.sizes, most)) - 1)
        return below.bit_length() - 1 if below else None

    def take(self, rank: int) -> int:
        """Takes an item away; returns its size."""
        self._left[rank] -= 1
        if not self._left[rank]:
            self._mask ^= 1 << rank
        return self.sizes[rank]

    def put_back(self, rank: int) -> None:
        """Undoes a :meth:`take`."""
        if not self._left[rank]:
            self._mask ^= 1 << rank
        self._left[rank] += 1

    def place(self, rank: int) -> int:
        """Which item it is: one for each call, of those that were taken for good."""
        return self._places[rank].pop()


def _best_fill(left: _Items, room: int) -> tuple[list[int], int]:
    """Ranks of sizes that fill some room best of a few ways, and what is lacking then; nothing is taken."""
    best: list[int] = []
    lacking, second = room, left.largest_up_to(room)
    step = max(1, room // _TRIED)
    for _ in range(_TRIED):
        if second is None or not lacking:
            break
        fill: list[int] = []
        rest, following = room, left.largest_up_to(left.sizes[second])
        while following is not None:
            fill.append(following)
            rest -= left.take(following)
            following = left.largest_up_to(rest)
        for rank in fill:
            left.put_back(rank)
        if rest < lacking:
            best, lacking = fill, rest
        second = left.largest_up_to(left.sizes[second] - step)
    return best, lacking


def lower_bound(sizes: Sequence[int], capacity: int) -> int:
    """Bins that any packing needs; never below the sum of the sizes by the capacity.

    The largest of sums over dual feasible functions: that of the items of at least e, with those above ``capacity - e``
    counted as whole bins, under u_k, which rounds a part of a bin to k-ths (Fekete and Schepers 2001, New classes of
    fast lower bounds for bin packing problems, u(k) after U(e)). In O(n) numbers for each e and k.
    """
    if not len(sizes):
        return 0
    counted = np.sort(np.asarray(sizes, dtype=np.int64))
    small = counted[2 * counted <= capacity]
    parts = small[np.linspace(0, len(small) - 1, min(len(small), 16)).astype(int)].tolist()
    best = 0
    for least in {0, capacity // 3 + 1, *parts}:
        if 2 * least > capacity:
            continue
        kept = np.where(counted > capacity - least, capacity, np.where(counted < least, 0, counted))
        best = max(best, -(-int(kept.sum()) // capacity))
        for k in range(1, 8):
            whole, part = np.divmod((k + 1) * kept, capacity)
            # In units of 1 / (k (k + 1)): a size of so many (k + 1)-ths stays what it is, others are k-ths.
            units = np.where(part == 0, k * whole, (k + 1) * whole)
            best = max(best, -(-int(units.sum()) // (k * (k + 1))))
    return best


def _decreasing(sizes: Sequence[int]) -> list[int]:
    """Places of the sizes, the largest first."""
    return sorted(range(len(sizes)), key=lambda place: (-sizes[place], place))
