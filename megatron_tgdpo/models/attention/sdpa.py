"""Core attention of the local layer spec: causal, one segment of a pack at a time, on PyTorch's SDPA where it can.

Legend: T tokens of the pack that are not padding, K keys of all segments, N local query heads, G local key/value heads,
D head size, s queries and t keys of one segment.
"""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from megatron_tgdpo.batching.packed_sequence import PackedSequence
from megatron_tgdpo.models.attention.base import PackedAttention, Segments

# Query rows done at a time where SDPA's causal kernel does not apply: bounds the memory of the scores.
_QUERY_BLOCK = 1024


class PackedCausalAttention(PackedAttention):
    """Attends to one segment after another; runs on every device."""

    def attend(self, query: Tensor, key: Tensor, value: Tensor, segments: Segments, packing: PackedSequence) -> Tensor:
        """[T, N, D], [K, G, D] twice -> [T, N * D]."""
        del packing
        queries, keys = ([lengths[side] for lengths in segments.lengths] for side in (0, 1))
        parts = zip(query.split(queries), key.split(keys), value.split(keys), strict=True)
        return torch.cat([self._attend(q, k, v) for q, k, v in parts if q.shape[0]])

    def _attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """One segment: [s, N, D], [t, G, D] twice -> [s, N * D]."""
        q, k, v = (tensor.transpose(0, 1)[None] for tensor in (query, key, value))
        queries, keys = q.shape[2], k.shape[2]
        if self.softcap is None and self.softmax_offset is None and (self.window is None or keys <= self.window):
            mask = None if queries == keys else _causal_mask(0, queries, 0, keys, keys - queries, q.device)
            grouped = q.shape[1] != k.shape[1]
            out = F.scaled_dot_product_attention(
                q, k, v, attn_mask=mask, is_causal=mask is None, scale=self.scale, enable_gqa=grouped
            )
        else:
            starts = range(0, queries, _QUERY_BLOCK)
            out = torch.cat([self._attend_block(q, k, v, a, min(a + _QUERY_BLOCK, queries)) for a in starts], dim=2)
        # squeeze, not [0]: see PackedAttention.forward.
        return out.squeeze(0).transpose(0, 1).flatten(1)

    def _attend_block(self, q: Tensor, k: Tensor, v: Tensor, start: int, end: int) -> Tensor:
        """Queries [start, end) of a segment, with the keys that they can see; scores are recomputed in backward."""
        before = k.shape[2] - q.shape[2]
        first = 0 if self.window is None else max(0, before + start - self.window + 1)
        last = before + end
        visible = _causal_mask(start, end, first, last, before, q.device)
        if self.window is not None:
            visible &= ~_causal_mask(start, end, first, last, before - self.window, q.device)
        block = (q[:, :, start:end], k[:, :, first:last], v[:, :, first:last], visible, self.scale)
        how = (self.softcap, self.softmax_offset)
        result: Tensor = checkpoint(_masked_attention, *block, *how, use_reentrant=False, preserve_rng_state=False)
        return result


def _causal_mask(start: int, end: int, first: int, last: int, before: int, device: torch.device) -> Tensor:
    """[end - start, last - first] bool: whether query i, which has ``before`` keys before its own, may see key j."""
    return torch.ones(end - start, last - first, dtype=torch.bool, device=device).tril_(start + before - first)


def _masked_attention(
    q: Tensor, k: Tensor, v: Tensor, visible: Tensor, scale: float, softcap: float | None, sinks: Tensor | None
) -> Tensor:
    """[1, N, rows, D], [1, G, columns, D] twice, [rows, columns] bool, sinks [N] -> [1, N, rows, D]."""
    if softcap is None and sinks is None:
        k, v = (tensor.repeat_interleave(q.shape[1] // tensor.shape[1], dim=1) for tensor in (k, v))
        return F.scaled_dot_product_attention(q, k, v, attn_mask=visible, scale=scale)
    # The query heads of a group as rows of one product, so that keys and values are not copied for each.
    grouped = q.reshape(k.shape[1], -1, q.shape[-1])
    scores = (grouped @ k[0].transpose(1, 2)).to(torch.promote_types(q.dtype, torch.float32)) * (scale / (softcap or 1))
    if softcap is not None:
        scores = torch.tanh(scores) * softcap
    scores = scores.view(q.shape[1], *visible.shape).masked_fill(~visible, float("-inf"))
    if sinks is not None:
        scores = torch.cat((scores, sinks.to(scores.dtype)[:, None, None].expand(-1, visible.shape[0], 1)), dim=-1)
    weights = scores.softmax(dim=-1)[..., : k.shape[2]].to(q.dtype).reshape(k.shape[1], -1, k.shape[2])
    return (weights @ v[0]).view(q.shape)
