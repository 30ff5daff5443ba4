"""Core attention on PyTorch's own variable-length flash attention, for GPUs without Transformer Engine.

``torch.nn.attention.varlen`` came with torch 2.10, windows and scale with 2.11; ``gpu/capabilities.py`` looks for them.
Its kernels are flash attention 2, whose causal mask is aligned to the bottom right.
"""

import functools
import inspect
from collections.abc import Callable
from typing import Any

from torch import Tensor

from megatron_tgdpo.batching.packed_sequence import PackedSequence
from megatron_tgdpo.models.attention.base import PackedAttention, Segments


class VarlenAttention(PackedAttention):
    """One flash-attention call a pack; bf16, windows, no softcap."""

    def attend(self, query: Tensor, key: Tensor, value: Tensor, segments: Segments, packing: PackedSequence) -> Tensor:
        """[T, N, D], [K, G, D] twice -> [T, N, D]."""
        from torch.nn.attention.varlen import varlen_attn

        del packing
        grouped: dict[str, Any] = {"enable_gqa": query.shape[1] != key.shape[1]} if _takes_groups(varlen_attn) else {}
        if self.softcap is not None:
            raise ValueError("VarlenAttention cannot cap scores")
        if self.softmax_offset is not None:
            raise ValueError("VarlenAttention has no sinks")
        out = varlen_attn(
            query,
            key,
            value,
            segments.cu_seqlens_q,
            segments.cu_seqlens_kv,
            segments.longest_q,
            segments.longest_kv,
            scale=self.scale,
            window_size=self.window_size,
            **grouped,
        )
        assert isinstance(out, Tensor)
        return out


@functools.cache
def _takes_groups(varlen_attn: Callable[..., Any]) -> bool:
    """Whether grouped heads must be asked for: torch 2.11 takes them as they are."""
    return "enable_gqa" in inspect.signature(varlen_attn).parameters
