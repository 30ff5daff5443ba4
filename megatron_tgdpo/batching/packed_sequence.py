"""How pairs lie in a pack, how the pack attends, and which part of it a context-parallel rank holds.

Legend: S tokens of the whole pack, C context-parallel ranks, B query segments, K keys of all segments.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, pairwise
from typing import Any

import numpy as np
import torch
from megatron.core.packed_seq_params import PackedSeqParams
from torch import Tensor


@dataclass(frozen=True)
class PackFormat:
    """What every pack of a run has in common.

    Attributes:
        tokens: S, of the whole pack over all context-parallel ranks.
        shared_prompts: A pair is prompt, chosen, rejected, the prompt computed once; else prompt, chosen, prompt,
            rejected.
        context: C. Each segment is padded to a multiple of 2C and cut into 2C chunks, of which every rank holds two.
        context_rank: This rank's place among them.
        chosen_only: Rejected responses are left out.
        multiple: Packs are cut after the last token that is needed, to a multiple of so many tokens; None for packs
            that are all of the same length, as pipeline stages exchange them.
    """

    tokens: int
    shared_prompts: bool = False
    context: int = 1
    context_rank: int = 0
    chosen_only: bool = False
    multiple: int | None = None

    def cut(self, used: int) -> int:
        """Tokens of a pack of which the first ``used`` are needed."""
        if self.multiple is None:
            return self.tokens
        return min(self.tokens, max(1, -(-used // self.multiple)) * self.multiple)

    def padded(self, length: Any) -> Any:
        """Tokens of a pack that a segment of ``length`` tokens takes; of one or of an array of them."""
        return length if self.context == 1 else -(-length // (2 * self.context)) * 2 * self.context

    def pair_tokens(self, lengths: np.ndarray) -> np.ndarray:
        """Tokens that each pair takes. ``lengths`` is [N, 3] prompt, chosen, rejected tokens; returns [N] int64."""
        prompt, chosen, rejected = lengths.T
        segments = [prompt + chosen]
        if not self.chosen_only:
            segments.append(rejected if self.shared_prompts else prompt + rejected)
        result: np.ndarray = np.sum([self.padded(tokens) for tokens in segments], axis=0)
        return result

    def real_tokens(self, lengths: np.ndarray) -> int:
        """Tokens of pairs, as far as they are computed: a shared prompt counts once, padding never."""
        return int(replace(self, context=1).pair_tokens(lengths).sum())


@dataclass(frozen=True)
class SequenceMembers:
    """Which tokens make up the sequences of a pack, each a prompt and its response, however they are computed.

    Attributes:
        of_token: [S, 2] int64 (on a context-parallel rank its part), the sequence that a token belongs to, counted
            chosen_0, rejected_0, chosen_1, ...; a shared prompt's tokens belong to two; -1 for none, as padding.
        weights: [2P] float32, what each of the sequences counts in a sum over the global batch that is divided by the
            loss's ``count``: half of a pair, or where that counts tokens, those that it trains on.
    """

    of_token: Tensor
    weights: Tensor

    def with_tensors(self, change: Callable[[Tensor], Tensor]) -> "SequenceMembers":
        return SequenceMembers(change(self.of_token), change(self.weights))


@dataclass
class PackedSequence(PackedSeqParams):
    """How the tokens of a pack, or of a context-parallel rank's part of it, attend.

    Queries of a segment are neighbours in the pack. Their keys are a list of pack positions of which the segment's own
    come last: query i of a segment with q queries and k keys sees its first k - q + i + 1 keys (causal, aligned bottom
    right). What follows the last segment is padding.

    Attributes:
        qkv_format: ``sbhd``: rotary angles are given per token, so megatron-core need not know of sequences.
        cu_seqlens_q: [B + 1] int32 on the CPU, bounds of the queries of each segment.
        cu_seqlens_kv: [B + 1] int32 on the CPU, bounds of the keys of each segment.
        max_seqlen_q: Most queries of a segment.
        max_seqlen_kv: Most keys of a segment.
        kv_index: [K] int64, the keys' positions in the pack that all context-parallel ranks hold together, rank after
            rank; None where queries and keys are the same tokens.
        sequences: Which tokens belong together, for losses of routers; None where there is no loss.
    """

    kv_index: Tensor | None = None
    sequences: SequenceMembers | None = None


@dataclass(frozen=True)
class Segment:
    """Pack positions [start, end) that query; their keys are [prefix_start, prefix_end) and then themselves."""

    start: int
    end: int
    prefix_start: int = 0
    prefix_end: int = 0


def pack_segments(segments: Sequence[Segment]) -> PackedSequence:
    """The packing of a whole pack from its segments, which lie back to back."""
    queries = [segment.end - segment.start for segment in segments]
    keys = [size + s.prefix_end - s.prefix_start for size, s in zip(queries, segments, strict=True)]
    index = None
    if keys != queries:
        index = _concatenate([np.arange(*bounds) for s in segments for bounds in _key_ranges(s)])
    return _packing(queries, keys, index)


def _key_ranges(segment: Segment) -> tuple[tuple[int, int], tuple[int, int]]:
    return (segment.prefix_start, segment.prefix_end), (segment.start, segment.end)


class ContextSplit:
    """Which pack positions each context-parallel rank holds.

    Every segment, and the pack's tail, is cut into 2C chunks; rank i holds chunks i and 2C - 1 - i, so that all ranks
    have the same number of tokens and of query-key pairs (the zigzag split of ring attention, as in megatron-core).
    Behind a shared prompt the rejected response is a segment of its own, whose chunks all see the whole prompt.

    Args:
        bounds: [N + 1] pack positions where segments begin, the pack's end last; multiples of 2C.
        pack_format: The format; its ``context_rank`` is the rank whose packing is made.

    Attributes:
        local_tokens: S / C.
        held: [C, S / C] int64, the pack positions of every rank in the order in which it holds them.
        place: [S] int64, inverse of ``held`` laid out rank after rank.
    """

    def __init__(self, bounds: Sequence[int], pack_format: PackFormat) -> None:
        self.pack_format = pack_format
        ranks, seq_length = pack_format.context, bounds[-1]
        self.local_tokens = seq_length // ranks
        self._chunks = []
        for start, end in pairwise(bounds):
            self._chunks.append(np.arange(start, end).reshape(2 * ranks, -1))
        self.held = np.stack(
            [
                np.concatenate(
                    [part for chunks in self._chunks for part in (chunks[rank], chunks[2 * ranks - 1 - rank])]
                )
                for rank in range(ranks)
            ]
        )
        self.place = np.empty(seq_length, dtype=np.int64)
        self.place[self.held.ravel()] = np.arange(seq_length)

    @property
    def mine(self) -> np.ndarray:
        """[S / C] int64 pack positions that this rank holds."""
        result: np.ndarray = self.held[self.pack_format.context_rank]
        return result

    def local(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Which of some pack positions this rank holds, and where in its part.

        Args:
            positions: [R] int64 positions in the whole pack.

        Returns:
            The indices into ``positions`` of those held here, ascending, and their places in this rank's part.
        """
        owner, offset = np.divmod(self.place[positions], self.local_tokens)
        kept = np.flatnonzero(owner == self.pack_format.context_rank)
        return kept, offset[kept]

    def packing(self, segments: Sequence[Segment]) -> PackedSequence:
        """This rank's packing of the pack's segments: each of its chunks sees what is before them, and them up to its
        own end.

        Keys are positions in the gathered pack, all ranks' parts one after another.
        """
        rank, last = self.pack_format.context_rank, 2 * self.pack_format.context - 1
        queries, keys, index = [], [], []
        for segment, chunks in zip(segments, self._chunks, strict=False):
            prefix = np.arange(segment.prefix_start, segment.prefix_end)
            for number in (rank, last - rank):
                seen = np.concatenate([prefix, chunks[: number + 1].ravel()])
                queries.append(chunks.shape[1])
                keys.append(len(seen))
                index.append(self.place[seen])
        return _packing(queries, keys, _concatenate(index))


def _packing(queries: list[int], keys: list[int], index: Tensor | None) -> PackedSequence:
    return PackedSequence(
        qkv_format="sbhd",
        cu_seqlens_q=torch.tensor([0, *accumulate(queries)], dtype=torch.int32),
        cu_seqlens_kv=torch.tensor([0, *accumulate(keys)], dtype=torch.int32),
        max_seqlen_q=max(queries, default=0),
        max_seqlen_kv=max(keys, default=0),
        kv_index=index,
    )


def _concatenate(arrays: list[np.ndarray]) -> Tensor:
    return torch.from_numpy(np.concatenate(arrays).astype(np.int64)) if arrays else torch.zeros(0, dtype=torch.int64)
