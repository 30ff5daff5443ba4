"""Core attention on Transformer Engine's DotProductAttention, in its packed (thd) format.

Source: ``transformer_engine.pytorch.DotProductAttention`` of versions 2.9 to 2.20. It caps no scores before 2.20, and
there with flash-attn alone (``dot_product_attention/utils.py: get_attention_backend``), so capped scores are out. Its
thd format has no sinks before 2.12, and no unfused path at 2.9, so those and fp32 are out. Nothing here imports
Transformer Engine until a layer is built.
"""

from typing import Any

from torch import Tensor

from megatron_tgdpo.batching.packed_sequence import PackedSequence
from megatron_tgdpo.models.attention.base import PackedAttention, Segments
from megatron_tgdpo.models.config import LanguageModelConfig

MASK = "padding_causal_bottom_right"


class TransformerEngineAttention(PackedAttention):
    """One call of flash attention or cuDNN's fused attention a pack, whichever Transformer Engine takes; windows.

    Raises:
        ValueError: The model caps scores, or has sinks.
    """

    def __init__(self, config: LanguageModelConfig, layer_number: int, *args: Any, **kwargs: Any) -> None:
        import transformer_engine.pytorch as te

        super().__init__(config, layer_number, *args, **kwargs)
        if self.softcap is not None:
            raise ValueError("Transformer Engine cannot cap scores")
        if self.softmax_offset is not None:
            raise ValueError("Transformer Engine before 2.12 has no sinks in its packed format")
        tensor = config.tensor_model_parallel_size
        # Heads of this rank, as if there were no tensor parallelism: the module's group is only for dropout. With more
        # ranks than key/value heads megatron-core gives each rank one of them.
        kernel = te.DotProductAttention(
            num_attention_heads=config.num_attention_heads // tensor,
            kv_channels=config.head_size,
            num_gqa_groups=max(1, config.num_query_groups // tensor),
            attention_dropout=0.0,
            qkv_format="thd",
            attn_mask_type=MASK,
            window_size=self.window_size,
            layer_number=layer_number,
            softmax_scale=self.scale,
        )
        # Not a submodule: it has no parameters, and its FP8 state is not the model's.
        self._kernel = (kernel,)
        # Attention is bf16; in the layers' FP8 context it would join their amax reductions, on ranks with pairs only.
        self._autocast = te.autocast

    def train(self, mode: bool = True) -> "TransformerEngineAttention":
        """The kernel keeps what backward needs only in training."""
        super().train(mode)
        self._kernel[0].train(mode)
        return self

    def attend(self, query: Tensor, key: Tensor, value: Tensor, segments: Segments, packing: PackedSequence) -> Tensor:
        """[T, N, D], [K, G, D] twice -> [T, N * D]."""
        del packing
        with self._autocast(enabled=False):
            result: Tensor = self._kernel[0](
                query.contiguous(),
                key.contiguous(),
                value.contiguous(),
                attention_mask=None,
                qkv_format="thd",
                cu_seqlens_q=segments.cu_seqlens_q,
                cu_seqlens_kv=segments.cu_seqlens_kv,
                max_seqlen_q=segments.longest_q,
                max_seqlen_kv=segments.longest_kv,
                attn_mask_type=MASK,
                window_size=self.window_size,
                # One segment's keys follow the other's without gaps.
                pad_between_seqs=False,
            )
            return result
