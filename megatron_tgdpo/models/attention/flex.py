"""Core attention on PyTorch's FlexAttention: a fused kernel that can cap scores, which Transformer Engine cannot.

Source: ``torch.nn.attention.flex_attention`` (torch >= 2.6). Forward runs on the CPU too, for tests; its backward is
for GPUs only.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import flex_attention as flex
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

from megatron_tgdpo.batching.packed_sequence import PackedSequence
from megatron_tgdpo.models.attention.base import PackedAttention, Segments

# The kernel's block.
_BLOCK = 128
# Versions of one function that torch may compile.
_MOST_VERSIONS = 64
# Asks for the logarithm of each softmax's sum: torch 2.9's way, and the one before.
_WITH_SUMS = {"return_aux": flex.AuxRequest(lse=True)} if hasattr(flex, "AuxRequest") else {"return_lse": True}
# Wider than any pack: the window of a layer without one.
_NO_WINDOW = 2**30


@functools.cache
def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """Compiled once a process: the layers of a model share it.

    After a few versions (torch's recompile limit) torch would go on without a fused kernel. So what changes with the
    pack or the layer is no constant to it: lengths are powers of two times the block, windows are tensors. There are
    still versions for each length, with and without gradients, and for each model, more than torch's default allows.
    """
    compiled = torch.compile(function, dynamic=False)

    @functools.wraps(function)
    def run(*args: Any, **kwargs: Any) -> Any:
        with torch._dynamo.config.patch(recompile_limit=_MOST_VERSIONS):
            return compiled(*args, **kwargs)

    return run


class FlexPackedAttention(PackedAttention):
    """One FlexAttention call a pack; windows, softcaps and sinks."""

    def attend(self, query: Tensor, key: Tensor, value: Tensor, segments: Segments, packing: PackedSequence) -> Tensor:
        """[T, N, D], [K, G, D] twice -> [T, N, D]."""
        mask: BlockMask = self._cache.get(packing, ("mask", self.window), lambda: self._mask(segments, query.device))
        run: Any = _compiled(flex_attention) if query.is_cuda else flex_attention
        sinks = self.softmax_offset
        out: Any = run(
            _heads_first(query, mask.seq_lengths[0]),
            _heads_first(key, mask.seq_lengths[1]),
            _heads_first(value, mask.seq_lengths[1]),
            score_mod=None if self.softcap is None else _cap(self.softcap),
            block_mask=mask,
            scale=self.scale,
            enable_gqa=query.shape[1] != key.shape[1],
            **({} if sinks is None else _WITH_SUMS),
        )
        if sinks is not None:
            # What a sink takes away: the softmax's sum has its term, too.
            out, sums = out[0], getattr(out[1], "lse", out[1])
            out = (out * torch.sigmoid(sums - sinks[:, None])[..., None]).to(query.dtype)
        result: Tensor = out[0, :, : query.shape[0]].transpose(0, 1)
        return result

    def _mask(self, segments: Segments, device: torch.device) -> BlockMask:
        """Which blocks of keys the blocks of queries see."""
        lengths_q, lengths_kv = ([pair[side] for pair in segments.lengths] for side in (0, 1))
        # Padding belongs to segments that nothing else is in.
        padded_q, padded_kv = _padded(segments.seq_length), _padded(max(segments.seq_length, sum(lengths_kv)))
        segment_q, place_q = _places(lengths_q, [kv - q for q, kv in segments.lengths], -1, padded_q)
        segment_kv, place_kv = _places(lengths_kv, [0] * len(lengths_kv), -2, padded_kv)
        segment_q, place_q, segment_kv, place_kv = (t.to(device) for t in (segment_q, place_q, segment_kv, place_kv))
        window = torch.tensor(_NO_WINDOW if self.window is None else self.window, dtype=torch.int32, device=device)

        def visible(batch: Tensor, head: Tensor, q: Tensor, kv: Tensor) -> Tensor:
            del batch, head
            distance = place_q[q] - place_kv[kv]
            return (segment_q[q] == segment_kv[kv]) & (distance >= 0) & (distance < window)

        # Compiled for one grad mode: a mask has no gradient in any.
        make = torch.no_grad()(_compiled(create_block_mask)) if device.type == "cuda" else create_block_mask
        return make(visible, None, None, len(segment_q), len(segment_kv), device=device)


def _padded(tokens: int) -> int:
    length = _BLOCK
    while length < tokens:
        length *= 2
    return length


@functools.cache
def _cap(softcap: float) -> Callable[..., Tensor]:
    def score_mod(score: Tensor, batch: Tensor, head: Tensor, q: Tensor, kv: Tensor) -> Tensor:
        del batch, head, q, kv
        return softcap * torch.tanh(score / softcap)

    return score_mod


def _places(lengths: list[int], starts: list[int], padding: int, length: int) -> tuple[Tensor, Tensor]:
    """Segment number and place in the segment, counted from its start, of every token, padded to a length."""
    total = sum(lengths)
    counts = torch.tensor(lengths, dtype=torch.int32)
    numbers = torch.arange(len(lengths), dtype=torch.int32).repeat_interleave(counts)
    offsets = (torch.tensor(starts, dtype=torch.int32) - counts.cumsum(0).int() + counts).repeat_interleave(counts)
    places = torch.arange(total, dtype=torch.int32) + offsets
    fill = length - total
    return torch.nn.functional.pad(numbers, (0, fill), value=padding), torch.nn.functional.pad(places, (0, fill))


def _heads_first(tensor: Tensor, length: int) -> Tensor:
    """[T, N, D] -> [1, N, length, D], zeros after the T."""
    padded = torch.nn.functional.pad(tensor, (0, 0, 0, 0, 0, length - tensor.shape[0]))
    return padded.transpose(0, 1)[None]
