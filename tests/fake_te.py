"""Stand-ins for Transformer Engine's modules on the CPU: the same constructors, parameter names and results.

Signatures: megatron-core 0.16.1 ``extensions/transformer_engine.py`` and TransformerEngine 2.9 to 2.20
``DotProductAttention``. Enough of them to build, load, save and run the Transformer Engine layer spec without it.
"""

import sys
import types
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.dist_checkpointing.mapping import ShardedObject
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint
from torch import Tensor

from megatron_tgdpo.models.layer_spec_te import TransformerEngineParts


class _ExtraState:
    """Every Transformer Engine module saves one, and unpickles what it is given."""

    def get_extra_state(self) -> Tensor:
        return torch.tensor([1, 2, 3], dtype=torch.uint8)

    def set_extra_state(self, state: Any) -> None:
        raise AssertionError("Transformer Engine would unpickle this")


class Norm(_ExtraState, torch.nn.Module):
    def __init__(self, config: Any, hidden_size: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.eps, self.zero_centered = eps, config.layernorm_zero_centered_gamma
        self.weight = torch.nn.Parameter(torch.empty(hidden_size, dtype=config.params_dtype))
        self.weight.sequence_parallel = config.sequence_parallel

    def forward(self, x: Tensor) -> Tensor:
        return _normalised(x, self.weight, self.eps, self.zero_centered)


class LayerNormColumnParallelLinear(_ExtraState, ColumnParallelLinear):
    def __init__(self, input_size: int, output_size: int, *, config: Any, tp_comm_buffer_name: str, **kwargs: Any):
        super().__init__(input_size, output_size, config=config, tp_comm_buffer_name=tp_comm_buffer_name, **kwargs)
        self.zero_centered, self.eps = config.layernorm_zero_centered_gamma, config.layernorm_epsilon
        self.layer_norm_weight = torch.nn.Parameter(torch.empty(input_size, dtype=config.params_dtype))
        self.layer_norm_weight.sequence_parallel = config.sequence_parallel
        self.return_layernorm_output = False

    def forward(self, x: Tensor) -> tuple[Tensor | tuple[Tensor, Tensor], None]:
        normalised = _normalised(x, self.layer_norm_weight, self.eps, self.zero_centered)
        output, bias = super().forward(normalised)
        return (output, normalised) if self.return_layernorm_output else output, bias

    def sharded_state_dict(self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None) -> dict:
        return _sharded(self, prefix, {"weight": 0, "bias": 0}, sharded_offsets, metadata)


class PlainColumnParallelLinear(_ExtraState, ColumnParallelLinear):
    def __init__(self, input_size: int, output_size: int, *, config: Any, tp_comm_buffer_name: str, **kwargs: Any):
        super().__init__(input_size, output_size, config=config, tp_comm_buffer_name=tp_comm_buffer_name, **kwargs)

    def sharded_state_dict(self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None) -> dict:
        return _sharded(self, prefix, {"weight": 0, "bias": 0}, sharded_offsets, metadata)


class RowLinear(_ExtraState, RowParallelLinear):
    def __init__(self, input_size: int, output_size: int, *, config: Any, tp_comm_buffer_name: str, **kwargs: Any):
        super().__init__(input_size, output_size, config=config, tp_comm_buffer_name=tp_comm_buffer_name, **kwargs)

    def sharded_state_dict(self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None) -> dict:
        return _sharded(self, prefix, {"weight": 1}, sharded_offsets, metadata)


class _Grouped(torch.nn.Module):
    """Products of the experts of this rank, each with its own tokens, which follow one another."""

    axis: int

    def __init__(
        self, num_gemms: int, input_size: int, output_size: int, *, config: Any, init_method: Any, bias: bool,
        skip_bias_add: bool, is_expert: bool, tp_comm_buffer_name: str, pg_collection: Any, name: Any = None,
    ) -> None:  # fmt: skip
        super().__init__()
        del name  # of megatron-core since 0.19
        assert is_expert
        self.with_bias, self.skip_bias_add = bias, skip_bias_add
        self.num_gemms, self.pg = num_gemms, pg_collection
        shape = [output_size, input_size]
        shape[self.axis] //= pg_collection.expt_tp.size()
        for number in range(num_gemms):
            self.register_parameter(
                f"weight{number}", torch.nn.Parameter(torch.empty(shape, dtype=config.params_dtype))
            )
            if bias:
                self.register_parameter(
                    f"bias{number}", torch.nn.Parameter(torch.empty(shape[:1], dtype=config.params_dtype))
                )

    def forward(self, x: Tensor, m_splits: list[int]) -> tuple[Tensor, list[Tensor] | None]:
        parts = x.split(m_splits)
        biases = [getattr(self, f"bias{n}") for n in range(self.num_gemms)] if self.with_bias else None
        added = biases or [None] * self.num_gemms if not self.skip_bias_add else [None] * self.num_gemms
        products = [F.linear(part, getattr(self, f"weight{n}"), added[n]) for n, part in enumerate(parts)]
        return torch.cat(products), biases if self.skip_bias_add else None

    def sharded_state_dict(self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None) -> dict:
        assert metadata is not None
        sharded: dict[str, Any] = {}
        for number in range(self.num_gemms):
            expert = self.pg.ep.rank() * self.num_gemms + number
            place = (len(sharded_offsets), expert, self.pg.ep.size() * self.num_gemms)
            parts = {name: getattr(self, f"{name}{number}") for name in ("weight", "bias")[: 1 + self.with_bias]}
            made = make_sharded_tensors_for_checkpoint(
                parts, prefix, {"weight": self.axis, "bias": 0}, (*sharded_offsets, place),
                tp_group=self.pg.expt_tp, dp_cp_group=metadata["dp_cp_group"],
            )  # fmt: skip
            for name in parts:
                entry = made[f"{prefix}{name}"]
                entry.replica_id = (*entry.replica_id[:2], self.pg.expt_dp.rank())
                sharded[f"{prefix}{name}{number}"] = entry
            state = ShardedObject(f"{prefix}_extra_state", torch.zeros(1), (1,), (0,))
            sharded[f"{prefix}_extra_state{number or ''}"] = state
        return sharded


class ColumnGrouped(_Grouped):
    axis = 0


class RowGrouped(_Grouped):
    axis = 1


class DotProductAttention(torch.nn.Module):
    """Packed attention with bottom-right causal masks and windows, segment by segment."""

    def __init__(
        self, num_attention_heads: int, kv_channels: int, num_gqa_groups: int, attention_dropout: float,
        qkv_format: str, attn_mask_type: str, window_size: tuple[int, int], layer_number: int, softmax_scale: float,
    ) -> None:  # fmt: skip
        super().__init__()
        assert (qkv_format, attn_mask_type, attention_dropout) == ("thd", "padding_causal_bottom_right", 0.0)
        self.heads, self.size, self.groups, self.scale = num_attention_heads, kv_channels, num_gqa_groups, softmax_scale

    def forward(
        self, query_layer: Tensor, key_layer: Tensor, value_layer: Tensor, *, attention_mask: None, qkv_format: str,
        cu_seqlens_q: Tensor, cu_seqlens_kv: Tensor, max_seqlen_q: int, max_seqlen_kv: int, attn_mask_type: str,
        window_size: tuple[int, int], pad_between_seqs: bool,
    ) -> Tensor:  # fmt: skip
        assert not pad_between_seqs
        assert (qkv_format, attn_mask_type) == ("thd", "padding_causal_bottom_right")
        assert query_layer.shape[1:] == (self.heads, self.size)
        assert key_layer.shape == value_layer.shape == (int(cu_seqlens_kv[-1]), self.groups, self.size)
        assert cu_seqlens_q.dtype == cu_seqlens_kv.dtype == torch.int32
        assert cu_seqlens_q.diff().max() <= max_seqlen_q <= max_seqlen_kv
        out = varlen(query_layer, key_layer, value_layer, cu_seqlens_q, cu_seqlens_kv, self.scale, window_size)
        return out.flatten(1)


def varlen(
    q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_kv: Tensor, scale: float, window: tuple[int, int]
) -> Tensor:
    """What flash attention's variable-length call gives: [T, N, D]."""
    outputs = []
    bounds = zip(cu_q[:-1].tolist(), cu_q[1:].tolist(), cu_kv[:-1].tolist(), cu_kv[1:].tolist(), strict=True)
    for q_start, q_end, kv_start, kv_end in bounds:
        queries, keys, values = (t.transpose(0, 1) for t in (q[q_start:q_end], k[kv_start:kv_end], v[kv_start:kv_end]))
        keys, values = (t.repeat_interleave(q.shape[1] // k.shape[1], dim=0) for t in (keys, values))
        count, total = queries.shape[1], keys.shape[1]
        distance = torch.arange(total - count, total)[:, None] - torch.arange(total)
        visible = (distance >= 0) & ((distance <= window[0]) | (window[0] < 0))
        out = F.scaled_dot_product_attention(queries, keys, values, attn_mask=visible, scale=scale)
        outputs.append(out.transpose(0, 1))
    return torch.cat(outputs)


PARTS = TransformerEngineParts(
    norm=Norm,
    column_linear=LayerNormColumnParallelLinear,
    row_linear=RowLinear,
    plain_column_linear=PlainColumnParallelLinear,
    column_grouped=ColumnGrouped,
    row_grouped=RowGrouped,
)


@contextmanager
def importable() -> Iterator[None]:
    """``transformer_engine.pytorch.DotProductAttention`` can be imported inside, as this module's."""
    package, pytorch = types.ModuleType("transformer_engine"), types.ModuleType("transformer_engine.pytorch")
    pytorch.DotProductAttention = DotProductAttention  # type: ignore[attr-defined]
    pytorch.autocast = lambda *, enabled: nullcontext(enabled)  # type: ignore[attr-defined]
    package.pytorch = pytorch  # type: ignore[attr-defined]
    modules = {"transformer_engine": package, "transformer_engine.pytorch": pytorch}
    assert not modules.keys() & sys.modules.keys()
    sys.modules.update(modules)
    try:
        yield
    finally:
        for name in modules:
            del sys.modules[name]


def _normalised(x: Tensor, weight: Tensor, eps: float, zero_centered: bool) -> Tensor:
    scale = weight.float() + (1 if zero_centered else 0)
    return (x.float() * torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + eps) * scale).type_as(x)


def _sharded(module: Any, prefix: str, axes: dict[str, int], offsets: tuple, metadata: dict | None) -> dict:
    assert metadata is not None
    state = module.state_dict(prefix="", keep_vars=True)
    return make_sharded_tensors_for_checkpoint(
        state, prefix, axes, offsets, tp_group=module.tp_group, dp_cp_group=metadata["dp_cp_group"]
    )
