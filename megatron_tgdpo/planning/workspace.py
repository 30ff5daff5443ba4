"""Bytes that come and go within a step: the gradients of one layer, the log-probs' chunk, hidden states in flight."""

from collections.abc import Sequence

from transformers import PretrainedConfig

from megatron_tgdpo.config.constraints import recomputed_modules
from megatron_tgdpo.distributed.layout import ParallelLayout
from megatron_tgdpo.loss.vocab_chunks import chunk_rows
from megatron_tgdpo.models.families import settings_of
from megatron_tgdpo.models.hf_config import padded_vocab_size
from megatron_tgdpo.models.hf_weights.adapter_layout import Lora
from megatron_tgdpo.models.hf_weights.mapping import Experts, kinds_of_layers
from megatron_tgdpo.planning.activations import QUERY_BLOCK, LayerWidths, Pack, layer_activations

_FP32 = 4


def layer_workspace(
    hf_config: PretrainedConfig, layout: ParallelLayout, pack: Pack, recompute: str, lora: Lora | None = None
) -> float:
    """Peak of one layer's backward pass on top of what was kept: activations made again, gradients, one weight's.

    A frozen weight beside an adapter (``lora``) has no gradient.
    """
    kinds = kinds_of_layers(hf_config)
    return max(_layer_workspace(hf_config, layout, pack, recompute, lora, layer) for layer in kinds)


def _layer_workspace(
    hf_config: PretrainedConfig, layout: ParallelLayout, pack: Pack, recompute: str, lora: Lora | None, layer: int
) -> float:
    width, size = LayerWidths.of(hf_config, layout, layer), pack.dtype_bytes
    whole, modules = layer_activations(hf_config, layout, pack, "none", layer, lora), recomputed_modules(recompute)
    # One part after another comes back; of attention, which is small beside its gradients, nothing is counted.
    parts = [whole - layer_activations(hf_config, layout, pack, part, layer, lora) for part in modules - {"core_attn"}]
    again = whole if recompute == "full" else max(parts, default=0.0)
    # At the gate: gradients of the joint gate and up three times (each half padded with zeros, then their sum), when
    # three of the MLP's kept tensors are gone already.
    gradients = pack.tokens * (3 * width.mlp + 2 * (width.routed + hf_config.hidden_size)) * size
    experts = Experts.of_layer(hf_config, layer)
    columns = width.mlp if experts is None else experts.size / layout.expert_shards
    weight = 2 * columns * hf_config.hidden_size * size if lora is None else 0.0
    # Attention's backward follows that of the MLP, whose kept tensors it finds gone, if they were kept.
    gone = 0.0 if ("mlp" if experts is None else "moe") in modules else pack.tokens * 5 * width.mlp * size
    scores = _scores(hf_config, width, pack) + (again if recompute == "full" else 0.0) - gone
    result: float = max(again + gradients + weight, scores)
    return result


def _scores(hf_config: PretrainedConfig, width: LayerWidths, pack: Pack) -> float:
    """Peak of attention with caps or sinks: five fp32 tensors of a block's scores (``models/attention/sdpa.py``)."""
    settings = settings_of(hf_config)
    if settings.get("attn_logit_softcapping") is None and settings.get("softmax_type") != "learnable":
        return 0.0
    return 5 * width.heads * min(QUERY_BLOCK, pack.sequence_tokens) * pack.sequence_tokens * _FP32


def frozen_workspace(frozen: Sequence[PretrainedConfig], layout: ParallelLayout, pack: Pack) -> float:
    """Peak of a frozen model's layer, which keeps nothing: the MLP's tensors between its two linears."""
    widths = [LayerWidths.of(config, layout, layer) for config in frozen for layer in kinds_of_layers(config)]
    mlp, routed = (
        max((width.mlp for width in widths), default=0.0),
        max((width.routed for width in widths), default=0.0),
    )
    hidden = max((hf_config.hidden_size for hf_config in frozen), default=0)
    return pack.tokens * (5 * mlp + 2 * (routed + hidden)) * pack.dtype_bytes


def kept_logits(hf_config: PretrainedConfig, layout: ParallelLayout, pack: Pack) -> float:
    """Logits of the policy that wait for backward, if every token of the pack is a response token."""
    if getattr(hf_config, "final_logit_softcapping", None):
        return 0.0
    rows = padded_vocab_size(hf_config, layout.tensor) // layout.tensor
    return min(pack.keep_logits_bytes, pack.tokens * rows * _FP32)


def logprob_workspace(
    hf_config: PretrainedConfig, layout: ParallelLayout, pack: Pack, *, weight_trains: bool = True
) -> float:
    """Peak of the log-probs' backward pass on the last stage, if every token of the pack is a response token.

    One chunk of fp32 logits (with a softcap also its slope and what makes it) and, below fp32, its gradient in the
    weights' dtype and the fp32 gradient of the chunk's rows; what backward returns in the place of the weight's
    gradient, which went to the gradient buffer; the hidden states, and their gradient in fp32 and in their dtype. A
    weight that does not train has no gradient.
    """
    rows = padded_vocab_size(hf_config, layout.tensor) // layout.tensor
    chunk, hidden = chunk_rows(pack.tokens, rows, "cuda"), hf_config.hidden_size
    below_fp32 = pack.dtype_bytes < _FP32
    buffers = 3 if getattr(hf_config, "final_logit_softcapping", None) else 1
    logits = pack.tokens * chunk * (buffers * _FP32 + (pack.dtype_bytes if below_fp32 else 0))
    gradient = 0
    if weight_trains:
        gradient = rows * hidden * pack.dtype_bytes + (chunk * hidden * _FP32 if below_fp32 else 0)
    states = pack.tokens * hidden * (_FP32 + 3 * pack.dtype_bytes)
    result: float = logits + gradient + states
    return result


def carried_states(
    policy: PretrainedConfig, frozen: Sequence[PretrainedConfig], layout: ParallelLayout, pack: Pack
) -> float:
    """Hidden states of one pack on their way: the frozen models' into and out of a stage, the policy's out of it.

    Under sequence parallelism also megatron-core's one buffer for gathered inputs of linears, whole on every rank.
    """
    elements: float = policy.hidden_size + 2 * sum(config.hidden_size for config in frozen)
    gathered = 0
    if layout.sequence_parallel:
        gathered = max(config.hidden_size for config in (policy, *frozen))
        elements /= layout.tensor
    return pack.tokens * (elements + gathered) * pack.dtype_bytes
