"""Core attention of the local layer spec: causal, one segment of a row at a time, on PyTorch's SDPA where it can.

Legend: S tokens of this context-parallel rank's part of the row (all of them under sequence parallelism too), N local
query heads, G local key/value heads, D head size, s queries and t keys of one segment, K keys of all segments.
"""

import itertools
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.utils import is_layer_window_attention
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from megatron_tgdpo.model_config import LanguageModelConfig
from megatron_tgdpo.packing import RowPacking

# Query rows done at a time where SDPA's causal kernel does not apply: bounds the memory of the scores.
_QUERY_BLOCK = 1024


class PackedCausalAttention(torch.nn.Module):
    """Causal self-attention inside each segment of a row (:class:`~megatron_tgdpo.packing.RowPacking`).

    With ``config.window_size`` (W - 1, 0), on the layers that ``window_attn_skip_freq`` marks, a token sees itself and
    the W - 1 before it. With ``config.attn_logit_softcapping`` the scaled scores are capped. Has no parameters. The
    arguments are those that megatron-core gives to every core attention; ``layer_number`` is global, from 1. Under
    context parallelism, keys and values are gathered over ``pg_collection.cp`` in forward, and their gradients
    reduce-scattered in backward.
    """

    def __init__(
        self,
        config: LanguageModelConfig,
        layer_number: int,
        attn_mask_type: AttnMaskType,
        attention_type: str,
        attention_dropout: float | None = None,
        softmax_scale: float | None = None,
        cp_comm_type: str | None = None,
        pg_collection: ProcessGroupCollection | None = None,
    ) -> None:
        super().__init__()
        del attention_type, cp_comm_type
        dropout = config.attention_dropout if attention_dropout is None else attention_dropout
        if attn_mask_type != AttnMaskType.causal or dropout:
            raise ValueError("PackedCausalAttention is causal and without dropout")
        if config.context_parallel_size > 1:
            assert pg_collection is not None, "context parallelism needs its process group"
        self.context_group = None if pg_collection is None else pg_collection.cp
        self.context = config.context_parallel_size
        self.scale = config.kv_channels**-0.5 if softmax_scale is None else softmax_scale
        windowed = is_layer_window_attention(config.window_size, config.window_attn_skip_freq, layer_number)
        self.window = config.window_size[0] + 1 if windowed else None
        self.softcap = config.attn_logit_softcapping

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None
    ) -> dict[str, Any]:
        """Nothing to save."""
        del prefix, sharded_offsets, metadata
        return {}

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None = None,
        attn_mask_type: AttnMaskType | None = None,
        attention_bias: Tensor | None = None,
        packed_seq_params: RowPacking | None = None,
    ) -> Tensor:
        """Attends within each segment of the row.

        Args:
            query: [S, 1, N, D].
            key: [S, 1, G, D], N a multiple of G.
            value: [S, 1, G, D].
            attention_mask: Must be None: the mask follows from ``packed_seq_params``.
            attn_mask_type: Ignored, always causal.
            attention_bias: Must be None.
            packed_seq_params: The row's segments and their keys.

        Returns:
            [S, 1, N * D], zero on the padding.

        Raises:
            ValueError: No segments, segments beyond the row or the keys, or a mask or bias was given.
        """
        del attn_mask_type
        if packed_seq_params is None or packed_seq_params.cu_seqlens_q is None:
            raise ValueError("packed_seq_params.cu_seqlens_q is missing: every pipeline stage needs it")
        if attention_mask is not None or attention_bias is not None:
            raise ValueError("PackedCausalAttention takes neither attention_mask nor attention_bias")
        keys, values = self._keys_and_values(key, value, packed_seq_params)
        queries = query.split(_lengths(packed_seq_params.cu_seqlens_q, query.shape[0]))
        rest = _lengths(packed_seq_params.cu_seqlens_kv, keys.shape[0])
        segments = zip(queries[:-1], keys.split(rest)[:-1], values.split(rest)[:-1], strict=True)
        outputs = [self._attend(q, k, v) for q, k, v in segments if q.shape[0]]
        # Times zero, not new zeros: a row that is all padding must still reach every parameter in backward,
        # or data-parallel ranks would wait for its gradient hooks.
        outputs.append(queries[-1].flatten(2) * 0)
        if len(outputs) == 1:
            outputs[0] = outputs[0] + (key * 0).sum() + (value * 0).sum()
        return torch.cat(outputs)

    def _keys_and_values(self, key: Tensor, value: Tensor, packing: RowPacking) -> tuple[Tensor, Tensor]:
        """[S, 1, G, D] twice -> [K, 1, G, D] twice, and what is padding after them where no index names the keys."""
        if packing.kv_index is None:
            return key, value
        if self.context > 1:
            both = torch.stack((key, value), dim=1)
            key, value = gather_from_sequence_parallel_region(
                both, tensor_parallel_output_grad=True, group=self.context_group
            ).unbind(1)
        return key.index_select(0, packing.kv_index), value.index_select(0, packing.kv_index)

    def _attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """One segment: [s, 1, N, D], [t, 1, G, D] twice -> [s, 1, N * D]."""
        q, k, v = (tensor.permute(1, 2, 0, 3) for tensor in (query, key, value))
        queries, keys = q.shape[2], k.shape[2]
        if self.softcap is None and (self.window is None or keys <= self.window):
            mask = None if queries == keys else _causal_mask(0, queries, 0, keys, keys - queries, q.device)
            grouped = q.shape[1] != k.shape[1]
            out = F.scaled_dot_product_attention(
                q, k, v, attn_mask=mask, is_causal=mask is None, scale=self.scale, enable_gqa=grouped
            )
        else:
            starts = range(0, queries, _QUERY_BLOCK)
            out = torch.cat([self._attend_block(q, k, v, a, min(a + _QUERY_BLOCK, queries)) for a in starts], dim=2)
        return out.permute(2, 0, 1, 3).flatten(2)

    def _attend_block(self, q: Tensor, k: Tensor, v: Tensor, start: int, end: int) -> Tensor:
        """Queries [start, end) of a segment, with the keys that they can see; scores are recomputed in backward."""
        before = k.shape[2] - q.shape[2]
        first = 0 if self.window is None else max(0, before + start - self.window + 1)
        last = before + end
        visible = _causal_mask(start, end, first, last, before, q.device)
        if self.window is not None:
            visible &= ~_causal_mask(start, end, first, last, before - self.window, q.device)
        block = (q[:, :, start:end], k[:, :, first:last], v[:, :, first:last], visible, self.scale, self.softcap)
        return checkpoint(_masked_attention, *block, use_reentrant=False, preserve_rng_state=False)


def _causal_mask(start: int, end: int, first: int, last: int, before: int, device: torch.device) -> Tensor:
    """[end - start, last - first] bool: whether query i, which has ``before`` keys before its own, may see key j."""
    return torch.ones(end - start, last - first, dtype=torch.bool, device=device).tril_(start + before - first)


def _lengths(cu_seqlens: Tensor, row: int) -> list[int]:
    """Lengths between the bounds, and what is left of the row last."""
    ends = cu_seqlens.tolist()
    lengths = [end - start for start, end in itertools.pairwise(ends)]
    lengths.append(row - ends[-1])
    if ends[0] != 0 or min(lengths) < 0:
        raise ValueError(f"segment bounds {ends} do not fit in a row of {row} tokens")
    return lengths


def _masked_attention(q: Tensor, k: Tensor, v: Tensor, visible: Tensor, scale: float, softcap: float | None) -> Tensor:
    """[1, N, rows, D], [1, G, columns, D] twice, [rows, columns] bool -> [1, N, rows, D]."""
    if softcap is None:
        k, v = (tensor.repeat_interleave(q.shape[1] // tensor.shape[1], dim=1) for tensor in (k, v))
        return F.scaled_dot_product_attention(q, k, v, attn_mask=visible, scale=scale)
    # The query heads of a group as rows of one product, so that keys and values are not copied for each.
    grouped = q.reshape(k.shape[1], -1, q.shape[-1])
    scores = (grouped @ k[0].transpose(1, 2)).to(torch.promote_types(q.dtype, torch.float32)) * (scale / softcap)
    scores = (torch.tanh(scores) * softcap).view(q.shape[1], *visible.shape).masked_fill(~visible, float("-inf"))
    weights = scores.softmax(dim=-1).to(q.dtype).view(k.shape[1], -1, k.shape[2])
    return (weights @ v[0]).view(q.shape)
