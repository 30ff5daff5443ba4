"""Which pack (pack) each pair of a step goes into on which data-parallel rank.

A pure function of lengths, seed and step, so every rank computes the same plan and no plan is ever communicated.
"""

from collections.abc import Sequence

import numpy as np

from megatron_tgdpo.batching.packed_sequence import PackFormat
from megatron_tgdpo.data.dataset import PreferenceDataset
from megatron_tgdpo.errors import UserError


def check_pairs_fit(dataset: PreferenceDataset, pack_format: PackFormat, multiple: int) -> None:
    """Checks that every pair of a dataset fits a pack.

    Args:
        dataset: The pairs; only their lengths are read.
        pack_format: The format of the packs.
        multiple: Of which the tokens of a pack must be one.

    Raises:
        UserError: One does not; names the first, and the least pack that holds them all.
    """
    tokens = pack_format.pair_tokens(dataset.lengths)
    too_long = np.flatnonzero(tokens > pack_format.tokens)
    if len(too_long):
        needed = -(-int(tokens.max()) // multiple) * multiple
        raise UserError(
            f"{dataset.source(int(too_long[0]))}: the pair takes {tokens[too_long[0]]} tokens but a pack holds "
            f"{pack_format.tokens} ({len(too_long)} such pairs): set batch.tokens_per_micro_batch to at least {needed} "
            "or preprocess with a smaller data.max_length"
        )


def first_fit_decreasing(
    indices: Sequence[int], tokens: Sequence[int], seq_length: int
) -> tuple[list[list[int]], list[int]]:
    """Packs pairs, the longest first, each into the first pack that has room; in O(n log n).

    A binary tree over the packs, those that are still to be opened among them, has at every node the most room below it
    (Johnson 1973, Near-optimal bin packing algorithms).

    Args:
        indices: Dataset indices of the pairs.
        tokens: That each of them takes in a pack, at most ``seq_length``.
        seq_length: Capacity of a pack.

    Returns:
        The packs, and the room that each has left.

    Raises:
        ValueError: A pair fits no pack.
    """
    if max(tokens, default=0) > seq_length:
        raise ValueError(f"a pair of {max(tokens)} tokens in packs of {seq_length}")
    # All but one pack are more than half full, for what is in the next one did not fit.
    leaves = 1 << (min(len(tokens), 2 * sum(tokens) // seq_length + 1)).bit_length()
    tree = [seq_length] * (2 * leaves)
    packs: list[list[int]] = []
    for i in sorted(range(len(indices)), key=lambda i: (-tokens[i], i)):
        size, node = tokens[i], 1
        while node < leaves:
            node *= 2
            if tree[node] < size:
                node += 1
        if node - leaves == len(packs):
            packs.append([])
        packs[node - leaves].append(indices[i])
        tree[node] -= size
        while node > 1:
            most = max(tree[node], tree[node ^ 1])
            node //= 2
            if tree[node] == most:
                break
            tree[node] = most
    return packs, tree[leaves : leaves + len(packs)]


def plan_packs(
    indices: Sequence[int], tokens: Sequence[int], seq_length: int, num_ranks: int, multiple: int = 1
) -> list[list[list[int]]]:
    """Distributes the pairs of a step over packs and data-parallel ranks, the same number of packs on each.

    First-fit decreasing into packs, then the fullest are dealt out so that ranks carry similar token counts; ranks
    short of a pack get an empty one.

    Args:
        indices: Dataset indices of the step's pairs.
        tokens: That each of them takes in a pack.
        seq_length: Capacity of a pack.
        num_ranks: Data-parallel ranks.
        multiple: Of which the number of packs on a rank must be one; the interleaved schedule takes them in groups.

    Returns:
        ``plan[rank][micro_batch]`` is a list of dataset indices.
    """
    packs, room = first_fit_decreasing(indices, tokens, seq_length)
    plan: list[list[list[int]]] = [[] for _ in range(num_ranks)]
    for turn, slot in enumerate(sorted(range(len(packs)), key=lambda s: (room[s], s))):
        lap, seat = divmod(turn, num_ranks)
        plan[seat if lap % 2 == 0 else num_ranks - 1 - seat].append(packs[slot])
    most = max(1, max(len(packs_of_rank) for packs_of_rank in plan))
    depth = -(-most // multiple) * multiple
    return [packs_of_rank + [[]] * (depth - len(packs_of_rank)) for packs_of_rank in plan]
