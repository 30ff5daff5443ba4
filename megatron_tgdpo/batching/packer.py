"""Which pack each pair of a step goes into on which data-parallel rank.

A pure function of lengths, seed and step, so every rank computes the same plan and no plan is ever communicated.
"""

from collections.abc import Sequence

import numpy as np

from megatron_tgdpo.batching.bin_packing import pack
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


def plan_packs(
    indices: Sequence[int], tokens: Sequence[int], seq_length: int, num_ranks: int, multiple: int = 1
) -> list[list[list[int]]]:
    """Distributes the pairs of a step over packs and data-parallel ranks, the same number of packs on each.

    As few packs as :func:`megatron_tgdpo.batching.bin_packing.pack` finds, the fullest dealt out first so that ranks
    carry similar token counts; ranks short of a pack get an empty one.

    Args:
        indices: Dataset indices of the step's pairs.
        tokens: That each of them takes in a pack.
        seq_length: Capacity of a pack.
        num_ranks: Data-parallel ranks.
        multiple: Of which the number of packs on a rank must be one; the interleaved schedule takes them in groups.

    Returns:
        ``plan[rank][micro_batch]`` is a list of dataset indices.

    Raises:
        ValueError: A pair fits no pack.
    """
    places, room = pack(tokens, seq_length)
    packs = [[indices[place] for place in each] for each in places]
    plan: list[list[list[int]]] = [[] for _ in range(num_ranks)]
    for turn, slot in enumerate(sorted(range(len(packs)), key=lambda s: (room[s], s))):
        lap, seat = divmod(turn, num_ranks)
        plan[seat if lap % 2 == 0 else num_ranks - 1 - seat].append(packs[slot])
    most = max(1, max(len(packs_of_rank) for packs_of_rank in plan))
    depth = -(-most // multiple) * multiple
    return [packs_of_rank + [[]] * (depth - len(packs_of_rank)) for packs_of_rank in plan]
