"""Bytes that come and go within a step: the gradients of one layer, the log-probs' chunk, hidden states in flight."""

from collections.abc import Sequence

from transformers import PretrainedConfig

from megatron_tgdpo.distributed.layout import ParallelLayout
from megatron_tgdpo.loss.token_logps import chunk_rows
from megatron_tgdpo.models.hf_config import padded_vocab_size
from megatron_tgdpo.planning.activations import QUERY_BLOCK, LayerWidths, Row, layer_activations

_FP32 = 4


def layer_workspace(hf_config: PretrainedConfig, layout: ParallelLayout, row: Row, recompute: str) -> float:
    """Peak of one layer's backward pass on top of what was kept: activations made again, gradients, one weight's."""
    width, size = LayerWidths.of(hf_config, layout), row.dtype_bytes
    again = layer_activations(hf_config, layout, row, "none", 0) if recompute == "full" else 0.0
    # At the gate: gradients of the joint gate and up three times (each half padded with zeros, then their sum), when
    # three of the MLP's kept tensors are gone already.
    gradients = row.tokens * (3 * width.mlp + 2 * hf_config.hidden_size) * size
    weight = 2 * width.mlp * hf_config.hidden_size * size
    # Attention's backward follows that of the MLP, whose kept tensors it finds gone.
    scores = _scores(hf_config, width, row) - row.tokens * 5 * width.mlp * size
    return again + max(gradients + weight, scores)


def _scores(hf_config: PretrainedConfig, width: LayerWidths, row: Row) -> float:
    """Peak of softcapped attention: five fp32 tensors of a block's scores (``models/attention/sdpa.py``)."""
    if getattr(hf_config, "attn_logit_softcapping", None) is None:
        return 0.0
    return 5 * width.heads * min(QUERY_BLOCK, row.sequence_tokens) * row.sequence_tokens * _FP32


def frozen_workspace(frozen: Sequence[PretrainedConfig], layout: ParallelLayout, row: Row) -> float:
    """Peak of a frozen model's layer, which keeps nothing: the MLP's tensors between its two linears."""
    mlp = max((LayerWidths.of(hf_config, layout).mlp for hf_config in frozen), default=0.0)
    hidden = max((hf_config.hidden_size for hf_config in frozen), default=0)
    return row.tokens * (5 * mlp + 2 * hidden) * row.dtype_bytes


def kept_logits(hf_config: PretrainedConfig, layout: ParallelLayout, row: Row) -> float:
    """Logits of the policy that wait for backward, if every token of the row is a response token."""
    if getattr(hf_config, "final_logit_softcapping", None):
        return 0.0
    rows = padded_vocab_size(hf_config, layout.tensor) // layout.tensor
    return min(row.keep_logits_bytes, row.tokens * rows * _FP32)


def logprob_workspace(hf_config: PretrainedConfig, layout: ParallelLayout, row: Row) -> float:
    """Peak of the log-probs' backward pass on the last stage, if every token of the row is a response token.

    One chunk of fp32 logits (with a softcap also its slope and what makes it) and, below fp32, its gradient in the
    weights' dtype and the fp32 gradient of the chunk's rows; what backward returns in the place of the weight's
    gradient, which went to the gradient buffer; the hidden states, and their gradient in fp32 and in their dtype.
    """
    rows = padded_vocab_size(hf_config, layout.tensor) // layout.tensor
    chunk, hidden = chunk_rows(row.tokens, rows, "cuda"), hf_config.hidden_size
    below_fp32 = row.dtype_bytes < _FP32
    buffers = 3 if getattr(hf_config, "final_logit_softcapping", None) else 1
    logits = row.tokens * chunk * (buffers * _FP32 + (row.dtype_bytes if below_fp32 else 0))
    gradient = chunk * hidden * _FP32 if below_fp32 else 0
    states = row.tokens * hidden * (_FP32 + 3 * row.dtype_bytes)
    return logits + gradient + rows * hidden * row.dtype_bytes + states


def carried_states(
    policy: PretrainedConfig, frozen: Sequence[PretrainedConfig], layout: ParallelLayout, row: Row
) -> float:
    """Hidden states of one row on their way: the frozen models' into and out of a stage, the policy's out of it.

    Under sequence parallelism also megatron-core's one buffer for gathered inputs of linears, whole on every rank.
    """
    elements: float = policy.hidden_size + 2 * sum(config.hidden_size for config in frozen)
    gathered = 0
    if layout.sequence_parallel:
        gathered = max(config.hidden_size for config in (policy, *frozen))
        elements /= layout.tensor
    return row.tokens * (elements + gathered) * row.dtype_bytes
