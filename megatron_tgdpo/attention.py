"""Core attention of the local layer spec: causal, one packed sequence at a time, on PyTorch's SDPA.

Legend: S tokens of the row (whole, also under sequence parallelism), N local query heads, G local key/value heads,
D head size, B packed sequences.
"""

import itertools
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor


class PackedCausalAttention(torch.nn.Module):
    """Causal self-attention inside each packed sequence; tokens of different sequences never see each other.

    Has no parameters. The arguments are those that megatron-core gives to every core attention.
    """

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: AttnMaskType,
        attention_type: str,
        attention_dropout: float | None = None,
        softmax_scale: float | None = None,
        cp_comm_type: str | None = None,
        pg_collection: ProcessGroupCollection | None = None,
    ) -> None:
        super().__init__()
        del layer_number, attention_type, cp_comm_type, pg_collection
        dropout = config.attention_dropout if attention_dropout is None else attention_dropout
        if attn_mask_type != AttnMaskType.causal or dropout or config.context_parallel_size > 1:
            raise ValueError("PackedCausalAttention is causal, without dropout and without context parallelism")
        self.softmax_scale = softmax_scale

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
        packed_seq_params: PackedSeqParams | None = None,
    ) -> Tensor:
        """Attends within each sequence of the row.

        Args:
            query: [S, 1, N, D].
            key: [S, 1, G, D], N a multiple of G.
            value: [S, 1, G, D].
            attention_mask: Must be None: the mask follows from ``packed_seq_params``.
            attn_mask_type: Ignored, always causal.
            attention_bias: Must be None.
            packed_seq_params: ``cu_seqlens_q`` is an int32 CPU tensor [B + 1]; what follows its last entry is padding.

        Returns:
            [S, 1, N * D], zero on the padding.

        Raises:
            ValueError: No sequence lengths, lengths beyond the row, or a mask or bias was given.
        """
        del attn_mask_type
        if packed_seq_params is None or packed_seq_params.cu_seqlens_q is None:
            raise ValueError("packed_seq_params.cu_seqlens_q is missing: every pipeline stage needs it")
        if attention_mask is not None or attention_bias is not None:
            raise ValueError("PackedCausalAttention takes neither attention_mask nor attention_bias")
        lengths = _lengths(packed_seq_params.cu_seqlens_q, query.shape[0])
        rows = zip(query.split(lengths), key.split(lengths), value.split(lengths), strict=True)
        *sequences, (padding, _, _) = rows
        outputs = [_attend(q, k, v, self.softmax_scale) for q, k, v in sequences if q.shape[0]]
        # Times zero, not new zeros: a row that is all padding must still reach every parameter in backward,
        # or data-parallel ranks would wait for its gradient hooks.
        outputs.append(padding.flatten(2) * 0)
        return torch.cat(outputs)


def _lengths(cu_seqlens: Tensor, row: int) -> list[int]:
    """Sequence lengths, and the padding's length last."""
    ends = cu_seqlens.tolist()
    lengths = [end - start for start, end in itertools.pairwise(ends)]
    lengths.append(row - ends[-1])
    if ends[0] != 0 or min(lengths) < 0:
        raise ValueError(f"cu_seqlens_q {ends} does not fit in a row of {row} tokens")
    return lengths


def _attend(query: Tensor, key: Tensor, value: Tensor, scale: float | None) -> Tensor:
    """One sequence: [s, 1, N, D], [s, 1, G, D] twice -> [s, 1, N * D]."""
    q, k, v = (tensor.permute(1, 2, 0, 3) for tensor in (query, key, value))
    out = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=q.shape[1] != k.shape[1])
    return out.permute(2, 0, 1, 3).flatten(2)
