"""Which pairs make a step, which pack (row) each goes into on which rank, and the packed tensors.

Everything up to the tensors is a pure function of lengths, seed and step, so every rank computes the same plan and no
plan is ever communicated. Legend: P pairs in the pack, B = 2P sequences, R response tokens, S tokens of a row.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise

import numpy as np
import torch
from megatron.core.packed_seq_params import PackedSeqParams
from torch import Tensor

from megatron_tgdpo.data.dataset import PreferenceDataset, PreferencePair
from megatron_tgdpo.errors import UserError


@dataclass(frozen=True)
class PreferenceBatch:
    """One pack, which is one micro batch: chosen_0, rejected_0, chosen_1, ... back to back, then padding.

    Attributes:
        tokens: [1, S] int64; zeros on the row's tail.
        position_ids: [1, S] int64, from 0 in every sequence; zeros on the tail.
        packing: Sequence bounds for the core attention; ``cu_seqlens_q`` is [B + 1] int32 on the CPU.
        logit_positions: [R] int64, row positions whose hidden state predicts a response token.
        targets: [R] int64, those response tokens.
        response_lengths: [B] int64, response tokens of each sequence.
        pair_indices: [P] int64, each pair's index in the dataset.
    """

    tokens: Tensor
    position_ids: Tensor
    packing: PackedSeqParams
    logit_positions: Tensor
    targets: Tensor
    response_lengths: Tensor
    pair_indices: Tensor

    def to(self, device: torch.device) -> "PreferenceBatch":
        """The same pack on ``device``; the sequence bounds stay on the CPU, where the attention reads them."""
        return PreferenceBatch(
            self.tokens.to(device, non_blocking=True),
            self.position_ids.to(device, non_blocking=True),
            self.packing,
            self.logit_positions.to(device, non_blocking=True),
            self.targets.to(device, non_blocking=True),
            self.response_lengths.to(device, non_blocking=True),
            self.pair_indices.to(device, non_blocking=True),
        )


@dataclass(frozen=True)
class DataOrder:
    """The endless stream of pairs that steps consume: epoch after epoch, each in its own order.

    Attributes:
        num_pairs: Pairs in the dataset.
        global_pairs: Pairs per step.
        total_pairs: Pairs of the whole run; the last step may be smaller.
        shuffle: A new permutation per epoch, else file order.
        seed: Of the permutations.
    """

    num_pairs: int
    global_pairs: int
    total_pairs: int
    shuffle: bool
    seed: int

    @property
    def steps(self) -> int:
        return math.ceil(self.total_pairs / self.global_pairs)

    def consumed_pairs(self, steps: int) -> int:
        """Pairs consumed after ``steps`` steps."""
        return min(steps * self.global_pairs, self.total_pairs)

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
    num_pairs: int, global_pairs: int, steps: int | None, epochs: float | None, shuffle: bool, seed: int
) -> DataOrder:
    """The data order of a run of ``steps`` full steps, or of ``epochs`` passes (then the last step may be smaller)."""
    total = steps * global_pairs if steps is not None else max(1, round((epochs or 0.0) * num_pairs))
    return DataOrder(num_pairs, global_pairs, total, shuffle, seed)


def pair_tokens(lengths: np.ndarray) -> np.ndarray:
    """Row tokens that each pair takes. ``lengths`` is [N, 3] prompt, chosen, rejected tokens; returns [N] int64."""
    return 2 * lengths[:, 0] + lengths[:, 1] + lengths[:, 2]


def check_row_fits(dataset: PreferenceDataset, row_tokens: int) -> None:
    """Raises a UserError if a pair of the dataset does not fit a row."""
    tokens = pair_tokens(dataset.lengths)
    too_long = np.flatnonzero(tokens > row_tokens)
    if len(too_long):
        raise UserError(
            f"{dataset.source(int(too_long[0]))}: the pair takes {tokens[too_long[0]]} tokens but a row holds "
            f"{row_tokens} ({len(too_long)} such pairs): set batch.tokens_per_micro_batch to at least {tokens.max()} "
            "or preprocess with a smaller data.max_length"
        )


def plan_packs(indices: Sequence[int], tokens: Sequence[int], row_tokens: int, num_ranks: int) -> list[list[list[int]]]:
    """Distributes the pairs of a step over packs and data-parallel ranks, the same number of packs on each.

    First-fit decreasing into rows, then the fullest packs are dealt out so that ranks carry similar token counts; ranks
    short of a pack get an empty one.

    Args:
        indices: Dataset indices of the step's pairs.
        tokens: Row tokens of each of them.
        row_tokens: Capacity of a row.
        num_ranks: Data-parallel ranks.

    Returns:
        ``plan[rank][micro_batch]`` is a list of dataset indices.
    """
    packs: list[list[int]] = []
    room: list[int] = []
    for i in sorted(range(len(indices)), key=lambda i: (-tokens[i], i)):
        slot = next((s for s, free in enumerate(room) if free >= tokens[i]), None)
        if slot is None:
            slot = len(packs)
            packs.append([])
            room.append(row_tokens)
        packs[slot].append(indices[i])
        room[slot] -= tokens[i]
    plan: list[list[list[int]]] = [[] for _ in range(num_ranks)]
    for turn, slot in enumerate(sorted(range(len(packs)), key=lambda s: (room[s], s))):
        lap, seat = divmod(turn, num_ranks)
        plan[seat if lap % 2 == 0 else num_ranks - 1 - seat].append(packs[slot])
    depth = max(1, max(len(packs_of_rank) for packs_of_rank in plan))
    return [packs_of_rank + [[]] * (depth - len(packs_of_rank)) for packs_of_rank in plan]


def collate(pairs: Sequence[PreferencePair], row_tokens: int) -> PreferenceBatch:
    """Packs pairs into one row. An empty list gives a pack of padding only, which adds nothing to loss or gradients."""
    tokens = np.zeros(row_tokens, dtype=np.int64)
    positions = np.zeros(row_tokens, dtype=np.int64)
    bounds, logit_positions, targets, response_lengths = [0], [], [], []
    for pair in pairs:
        for response in (pair.chosen, pair.rejected):
            start, prompt_end = bounds[-1], bounds[-1] + len(pair.prompt)
            end = prompt_end + len(response)
            tokens[start:prompt_end] = pair.prompt
            tokens[prompt_end:end] = response
            positions[start:end] = np.arange(end - start)
            # The hidden state at position t predicts token t + 1.
            logit_positions.append(np.arange(prompt_end - 1, end - 1))
            targets.append(response)
            response_lengths.append(len(response))
            bounds.append(end)
    bounds_tensor = torch.tensor(bounds, dtype=torch.int32)
    longest = max((b - a for a, b in pairwise(bounds)), default=0)
    return PreferenceBatch(
        tokens=torch.from_numpy(tokens)[None],
        position_ids=torch.from_numpy(positions)[None],
        packing=PackedSeqParams(
            qkv_format="sbhd",
            cu_seqlens_q=bounds_tensor,
            cu_seqlens_kv=bounds_tensor,
            max_seqlen_q=longest,
            max_seqlen_kv=longest,
        ),
        logit_positions=_concatenate(logit_positions),
        targets=_concatenate(targets),
        response_lengths=torch.tensor(response_lengths, dtype=torch.int64),
        pair_indices=torch.tensor([pair.index for pair in pairs], dtype=torch.int64),
    )


def _concatenate(arrays: list[np.ndarray]) -> Tensor:
    return torch.from_numpy(np.concatenate(arrays).astype(np.int64)) if arrays else torch.zeros(0, dtype=torch.int64)
