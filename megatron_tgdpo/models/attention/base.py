"""What all core attentions share: gather the keys of each segment, call one kernel for the pack, keep padding.

Legend: S tokens of the pack on this rank, T of them that are not padding, K keys of all segments, N local query heads,
G local key/value heads, D head size, E that of values (smaller in latent attention, else the same), B segments.
"""

import abc
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.utils import is_layer_window_attention, make_sharded_tensors_for_checkpoint
from torch import Tensor

from megatron_tgdpo.batching.packed_sequence import PackedSequence
from megatron_tgdpo.models.config import LanguageModelConfig

# cuDNN before 9.7 wants the longest sequences in multiples of this (TransformerEngine 2.9, fused_attn.cpp); for every
# kernel they are upper bounds only, and rounding keeps the number of different ones small.
_LENGTH_STEP = 64


@dataclass(frozen=True)
class Segments:
    """How the queries and the keys of a pack belong together, where the kernels want it.

    Attributes:
        cu_seqlens_q: [B + 1] int32 on the device, bounds of the query segments.
        cu_seqlens_kv: [B + 1] int32 on the device, bounds of their keys.
        kv_index: [K] int64 on the device, pack positions of the keys; None where the keys are the queries' own.
        seq_length: S.
        queries: T.
        longest_q: Upper bound of a segment's queries.
        longest_kv: Upper bound of its keys, not smaller.
        lengths: Queries and keys of each segment.
    """

    cu_seqlens_q: Tensor
    cu_seqlens_kv: Tensor
    kv_index: Tensor | None
    seq_length: int
    queries: int
    longest_q: int
    longest_kv: int
    lengths: tuple[tuple[int, int], ...]

    @classmethod
    def of(cls, packing: PackedSequence, seq_length: int, device: torch.device) -> "Segments":
        """Reads a pack's packing.

        Raises:
            ValueError: No bounds, or bounds that do not fit the pack or each other.
        """
        if packing.cu_seqlens_q is None:
            raise ValueError("packed_seq_params.cu_seqlens_q is missing: every pipeline stage needs it")
        kv_index, bounds_q, bounds_kv = packing.kv_index, packing.cu_seqlens_q, packing.cu_seqlens_kv
        if bounds_kv is None or len(bounds_kv) != len(bounds_q):
            raise ValueError("packed_seq_params.cu_seqlens_kv must bound as many segments as cu_seqlens_q")
        lengths = tuple(zip(bounds_q.diff().tolist(), bounds_kv.diff().tolist(), strict=True))
        if bounds_q[0] != 0 or bounds_kv[0] != 0 or any(not 0 <= q <= kv for q, kv in lengths):
            raise ValueError("packed_seq_params: every segment needs at least as many keys as queries, from 0 on")
        queries = int(bounds_q[-1])
        if queries > seq_length or (kv_index is not None and int(bounds_kv[-1]) != len(kv_index)):
            raise ValueError(
                f"packed_seq_params: {queries} queries do not fit a pack of {seq_length} tokens, or keys are amiss"
            )
        longest_q = _rounded(max((q for q, _ in lengths), default=0))
        return cls(
            bounds_q.to(device, non_blocking=True),
            bounds_kv.to(device, non_blocking=True),
            None if kv_index is None else kv_index.to(device, non_blocking=True),
            seq_length,
            queries,
            longest_q,
            _rounded(max((kv for _, kv in lengths), default=0)),
            lengths,
        )


def _rounded(length: int) -> int:
    return -(-length // _LENGTH_STEP) * _LENGTH_STEP


class PackCache:
    """What the layers of one model make of a packing, once for all of them: the latest pack's only."""

    def __init__(self) -> None:
        self._packing: PackedSequence | None = None
        self._made: dict[Any, Any] = {}

    def get(self, packing: PackedSequence, key: Any, make: Any) -> Any:
        """``make()``, or what it gave the last time for this packing (the object) and key."""
        if self._packing is not packing:
            self._packing, self._made = packing, {}
        if key not in self._made:
            self._made[key] = make()
        return self._made[key]


class PackedAttention(torch.nn.Module, abc.ABC):
    """Causal attention inside each segment of a pack, by a kernel that subclasses bring.

    Every segment is causal with bottom-right alignment: its last query sees all its keys. With ``config.window_size``
    (W - 1, 0), on the layers that ``window_attn_skip_freq`` marks, a token sees itself and the W - 1 before it. With
    ``config.attn_logit_softcapping`` the scaled scores are capped. With ``config.softmax_type`` ``learnable`` each head
    has a sink: a score of its own beside those of the keys, whose weight goes to nothing. Under context parallelism the
    keys and values of all ranks of ``pg_collection.cp`` are gathered along the pack in rank order, and ``kv_index``
    counts positions there. The constructor's other arguments are those that megatron-core gives to every core
    attention; ``layer_number`` is global, from 1.

    Attributes:
        softmax_offset: The sinks of this rank's heads [N], by megatron-core's name; the only parameter, None without.

    Args:
        cache: Shared by the layers of one model; one of its own if None.
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
        *,
        cache: PackCache | None = None,
    ) -> None:
        super().__init__()
        del attention_type, cp_comm_type
        dropout = config.attention_dropout if attention_dropout is None else attention_dropout
        if attn_mask_type != AttnMaskType.causal or dropout:
            raise ValueError(f"{type(self).__name__} is causal and without dropout")
        self.scale = config.kv_channels**-0.5 if softmax_scale is None else softmax_scale
        windowed = is_layer_window_attention(config.window_size, config.window_attn_skip_freq, layer_number)
        self.window: int | None = config.window_size[0] + 1 if windowed else None
        self.softcap = config.attn_logit_softcapping
        self.layer_number = layer_number
        self.softmax_offset: torch.nn.Parameter | None = None
        self._tp_group = None if pg_collection is None else pg_collection.tp
        if config.softmax_type == "learnable":
            heads = config.num_attention_heads // config.tensor_model_parallel_size
            device = torch.device("cpu") if config.use_cpu_initialization else torch.cuda.current_device()
            self.softmax_offset = torch.nn.Parameter(torch.zeros(heads, dtype=config.params_dtype, device=device))
            set_tensor_model_parallel_attributes(self.softmax_offset, True, 0, 1)
        self._cp_group = None
        if config.context_parallel_size > 1:
            if pg_collection is None:
                raise ValueError("context parallelism needs pg_collection.cp")
            self._cp_group = pg_collection.cp
        self._cache = cache or PackCache()

    @property
    def window_size(self) -> tuple[int, int]:
        """The window as the kernels write it: keys to the left and right of a query; -1 for all."""
        return (-1 if self.window is None else self.window - 1, 0)

    @abc.abstractmethod
    def attend(self, query: Tensor, key: Tensor, value: Tensor, segments: Segments, packing: PackedSequence) -> Tensor:
        """[T, N, D], [K, G, D] twice -> [T, N, D] or [T, N * D]; T > 0."""

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple[Any, ...] = (), metadata: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        """The sinks, if there are any."""
        if self.softmax_offset is None:
            return {}
        groups = {"dp_cp_group": metadata["dp_cp_group"]} if metadata else {}
        result: dict[str, Any] = make_sharded_tensors_for_checkpoint(
            {"softmax_offset": self.softmax_offset},
            prefix,
            {"softmax_offset": 0},
            sharded_offsets,
            tp_group=self._tp_group,
            **groups,
        )
        return result

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None = None,
        attn_mask_type: AttnMaskType | None = None,
        attention_bias: Tensor | None = None,
        packed_seq_params: PackedSequence | None = None,
    ) -> Tensor:
        """Attends within each segment of the pack.

        Args:
            query: [S, 1, N, D].
            key: [S, 1, G, D], N a multiple of G.
            value: [S, 1, G, E].
            attention_mask: Must be None.
            attn_mask_type: Ignored, always causal.
            attention_bias: Must be None.
            packed_seq_params: The pack's segments and their keys.

        Returns:
            [S, 1, N * E], zero on the padding. All-gathers keys and values over the context-parallel group.

        Raises:
            ValueError: A mask or bias was given, or the packing is missing or does not fit.
        """
        del attn_mask_type
        if packed_seq_params is None or attention_mask is not None or attention_bias is not None:
            raise ValueError(f"{type(self).__name__} takes packed_seq_params, and neither a mask nor a bias")
        seq_length = query.shape[0]
        segments: Segments = self._cache.get(
            packed_seq_params, "segments", lambda: Segments.of(packed_seq_params, seq_length, query.device)
        )
        if self._cp_group is not None:
            both = torch.cat((key, value), dim=-1)
            sizes = (key.shape[-1], value.shape[-1])
            key, value = gather_from_sequence_parallel_region(both, group=self._cp_group).split(sizes, dim=-1)
        used = segments.queries
        if used == 0:
            # Times zero, not new zeros: a pack that is all padding must still reach every parameter in backward, or
            # data-parallel ranks would wait for its gradient hooks.
            nothing = (key[:1].sum() + value[:1].sum()) * 0
            if self.softmax_offset is not None:
                nothing = nothing + self.softmax_offset.sum() * 0
            return query[..., :1].expand(*query.shape[:-1], value.shape[-1]).flatten(2) * 0 + nothing.to(query.dtype)
        # squeeze, not [:, 0], whose backward fills a tensor of the whole pack with zeros and copies into it.
        query, key, value = query.squeeze(1), key.squeeze(1), value.squeeze(1)
        if segments.kv_index is None:
            key, value = _first(key, used), _first(value, used)
        else:
            key, value = key.index_select(0, segments.kv_index), value.index_select(0, segments.kv_index)
        size, wanted = value.shape[-1], query.shape[-1]
        if size < wanted:
            # Most kernels want one size of heads: with zeros their output has zeros, which are cut.
            value = torch.nn.functional.pad(value, (0, wanted - size))
        out = self.attend(_first(query, used), key, value, segments, packed_seq_params)
        if size < wanted:
            out = out.reshape(used, -1, wanted)[..., :size]
        out = out.reshape(used, 1, -1)
        return torch.cat((out, out.new_zeros(seq_length - used, 1, out.shape[2]))) if used < seq_length else out


def _first(tensor: Tensor, count: int) -> Tensor:
    """The first rows of a tensor, by split: its backward is one concatenation, a slice's a fill and a copy."""
    rows = tensor.shape[0]
    return tensor if rows == count else tensor.split((count, rows - count))[0]
