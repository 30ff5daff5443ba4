"""Bytes that a layer of the policy keeps for its backward pass, and that a pipeline stage keeps in total.

The count goes through the layer tensor by tensor, as Korthikanti et al. 2022 (arXiv 2205.05198, section 4.1) do,
for this project's layer: RMSNorm, grouped-query attention by SDPA on packs (no padding, no score matrix), gated
MLP, or experts that get as many tokens each, no dropout, rotary angles. Their sequence parallelism (section 4.2.2)
divides what lies outside the linears, tensor parallelism what lies between them.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch.nn.functional as F
from transformers import PretrainedConfig

from megatron_tgdpo.config.constraints import recomputed_modules
from megatron_tgdpo.distributed.layout import ParallelLayout
from megatron_tgdpo.models.families import settings_of
from megatron_tgdpo.models.families.latent import LatentSizes
from megatron_tgdpo.models.hf_weights.adapter_layout import Lora, adapted_parts, fused_linears, linear_shapes
from megatron_tgdpo.models.hf_weights.mapping import Experts, Heads
from megatron_tgdpo.models.rotary import rope_layer_types

# Query rows that models/attention/sdpa.py masks at a time where SDPA's causal kernel does not apply.
QUERY_BLOCK = 1024
_FP32 = 4


@dataclass(frozen=True)
class Pack:
    """One micro batch.

    Attributes:
        tokens: Of the pack.
        sequence_tokens: Of each sequence in it; only masked attention (windows, softcaps) depends on it.
        dtype_bytes: Of weights and activations: 2 for bf16, 4 for fp32.
        gathered_keys: Keys and values per token that attention gathers before it uses them (shared prompts, context
            parallelism); 0 where it uses them where they are.
        keep_logits_bytes: ``train.keep_logits_mib`` in bytes.
        offloaded: What the policy's layers keep waits in host memory (``offload.activations``).
    """

    tokens: int
    sequence_tokens: int
    dtype_bytes: int
    gathered_keys: float = 0.0
    keep_logits_bytes: int = 0
    offloaded: bool = False


def gathered_keys(context: int, prompts: float) -> float:
    """Keys, per token of a context rank's part of a pack, that attention gathers: :attr:`Pack.gathered_keys`.

    Of a segment of n tokens a rank has chunks i and 2C - 1 - i of 2C, which see i + 1 and 2C - i of them: C + 1/2 keys
    for each of its n / C tokens. Both see a shared prompt whole; without context ranks there is one chunk.

    Args:
        context: C.
        prompts: The part of a pack that shared prompts are; 0 where none are, 1 at most.
    """
    if context == 1:
        return 1 + prompts if prompts else 0.0
    return context + 0.5 + 2 * context * prompts


@dataclass(frozen=True)
class LayerWidths:
    """Elements per token on one rank.

    Attributes:
        hidden: Of the residual stream, under sequence parallelism spread over the tensor ranks.
        heads: Query heads.
        head: Size of a head.
        query: All query heads.
        key: All key heads.
        value: All value heads: of latent attention smaller ones, which kernels take padded to the size of keys.
        projected: What the joint query, key and value projection, or that of keys and values, leaves in memory.
        latent: Of latent attention what its norms take, under sequence parallelism spread as the residual stream; 0
            without.
        ranks: The same of what its column-parallel linears take: for queries, and for keys and values.
        mlp: Of gate, and of up; of all experts that a token goes to.
        routed: Of the residual stream, as often as the token goes to experts; 0 without.
    """

    hidden: float
    heads: float
    head: int
    query: float
    key: float
    value: float
    projected: float
    mlp: float
    routed: float
    latent: float = 0.0
    ranks: tuple[float, float] = (0.0, 0.0)

    @classmethod
    def of(cls, hf_config: PretrainedConfig, layout: ParallelLayout, layer: int = 0) -> "LayerWidths":
        """Of a model's layer, counted from 0, under a layout."""
        heads, tp = Heads.of(hf_config), layout.tensor
        number = heads.groups * heads.queries_per_group
        # With more tensor ranks than key/value heads, megatron-core gathers the projection and keeps it whole.
        shared = 1 if tp > heads.groups else tp
        experts = Experts.of_layer(hf_config, layer)
        mlp = hf_config.intermediate_size if experts is None else experts.top_k * experts.size + experts.shared
        # Each of the ranks that share an expert has the whole rows of all their tokens.
        routed = 0 if experts is None else experts.top_k * hf_config.hidden_size * layout.expert_shards
        spread = tp if layout.sequence_parallel else 1
        common = {
            "hidden": hf_config.hidden_size / spread,
            "heads": number / tp,
            "head": heads.size,
            "mlp": mlp / tp,
            "routed": routed / tp,
        }
        latent: LatentSizes | None = settings_of(hf_config).get("latent")
        if latent is not None:
            query_rank = latent.query_rank or 0
            return cls(
                **common,
                query=number * latent.query / tp,
                key=number * latent.query / tp,
                value=number * latent.value / tp,
                projected=number * (latent.plain + latent.value) / tp,
                latent=(query_rank + latent.rank + latent.rotated) / spread,
                ranks=(query_rank / spread, latent.rank / spread),
            )
        key = max(heads.groups / tp, 1) * heads.size
        return cls(
            **common,
            query=number * heads.size / tp,
            key=key,
            value=key,
            projected=(number + 2 * heads.groups) * heads.size / shared,
        )


def stage_layers(hf_config: PretrainedConfig, layout: ParallelLayout, stage: int) -> list[int]:
    """The layers of a stage, counted from 0 through the model: those of its chunks, one after another."""
    sizes = layout.part_layers(hf_config.num_hidden_layers)
    starts = [0, *accumulate(sizes)]
    parts = (chunk * layout.pipeline + stage for chunk in range(layout.virtual))
    return [layer for part in parts for layer in range(starts[part], starts[part] + sizes[part])]


def layer_activations(
    hf_config: PretrainedConfig,
    layout: ParallelLayout,
    pack: Pack,
    recompute: str,
    layer: int,
    lora: Lora | None = None,
) -> float:
    """Bytes that one layer keeps of one pack until its backward pass.

    Args:
        hf_config: Of the policy.
        layout: The parallel layout.
        pack: The micro batch.
        recompute: ``TrainConfig.recomputation``.
        layer: Counted from 0; layers may differ in their attention windows, and in having experts.
        lora: The adapter that trains; None where all weights do. A frozen linear keeps no input, an adapter does.
    """
    width, size = LayerWidths.of(hf_config, layout, layer), pack.dtype_bytes
    if recompute == "full":
        return pack.tokens * width.hidden * size
    settings = settings_of(hf_config)
    modules, experts = recomputed_modules(recompute), Experts.of_layer(hf_config, layer)
    if experts is None and Experts.of(hf_config) is not None and not width.latent:
        # Transformer Engine has a dense layer's norms inside its linears; of latent attention the first stands alone.
        modules = modules - {"layernorm"}
    # What the MLP, or all experts, would keep beside their input is computed again.
    no_mlp = ("mlp" if experts is None else "moe") in modules
    pre, post = 2 * settings.get("pre_norms", True), 2 * settings.get("post_norms", False)
    norms = (pre + post - (post / 2 if no_mlp else 0)) * width.hidden * _norm_bytes(settings, size)
    if "layernorm" in modules:
        norms -= pre * width.hidden * (_norm_bytes(settings, size) - size)
    if settings.get("qk_layernorm"):
        norms += width.query * size
    if settings.get("qk_projection_norm"):
        norms += 2 * (width.query + width.key) * _FP32
    norms += width.latent * size
    joint = "self_attention.linear_kv_down" if width.latent else "self_attention.linear_qkv"
    inputs = {
        joint: width.hidden,
        # Of the hidden state, which the one above keeps.
        "self_attention.linear_q": 0.0,
        "self_attention.linear_q_down": 0.0,
        "self_attention.linear_q_up": width.ranks[0],
        "self_attention.linear_kv_up": width.ranks[1],
        "self_attention.linear_proj": width.value if width.latent else width.query,
        "mlp.linear_fc1": width.hidden + width.routed,
        "mlp.linear_fc2": width.mlp,
    }
    shared = experts.shared / layout.tensor if experts is not None and "shared_experts" in modules else 0.0
    inputs["mlp.linear_fc2"] -= shared
    adapters = 0.0
    if lora is not None:
        inputs = {
            fused.name: inputs[fused.name.replace(".experts.", ".")]
            for fused in fused_linears(hf_config, layer)
            if any(adapted_parts(fused, lora))
        }
        if joint not in inputs and width.latent:
            # Then the query's adapter alone keeps the hidden state.
            inputs |= {name: width.hidden for name in inputs if name.endswith((".linear_q", ".linear_q_down"))}
        adapters = _adapters(hf_config, layout, pack, lora, layer, without="mlp." if no_mlp else None)
        if layer == 0 and recompute == "none":
            norms -= width.hidden * _norm_bytes(settings, size)  # the embedding has no gradient
    if no_mlp:
        inputs |= {"mlp.linear_fc1": width.hidden, "mlp.linear_fc2": 0.0}
    if "layernorm" in modules:
        # Transformer Engine has a norm inside its linear but before experts and before latent attention.
        before = {"mlp.linear_fc1": experts, joint: width.latent}
        for name in [name for name, alone in before.items() if alone] or before:
            inputs[name] = max(inputs.get(name, 0.0) - width.hidden, 0.0)
    linear_inputs = sum(inputs.values()) * size
    # Rotated queries and keys; cosines and sines for both. Values stay inside the projection, unless they are gathered.
    keys, projected = (width.key + width.value) * pack.gathered_keys or width.key, width.projected
    if width.latent and (pack.gathered_keys or width.value < width.key):
        # Keys are made of a copy of their part; so are values that are gathered, or padded to the size of keys.
        keys, projected = 2 * width.key * (pack.gathered_keys or 1), 0.0
    attention = (projected + width.query + keys + 4 * width.head) * size
    if "core_attn" not in modules:
        attention += _core_attention(settings, width, pack, layer)
    # Gate and up in one tensor, which is all that SwiGLU keeps, fused or in models/swiglu.py. Other gates keep the
    # activated gate, and up once more (megatron-core adds its offset of 0).
    gated = 2 if settings["activation_func"] is F.silu else 4
    mlp = 0.0 if no_mlp else gated * (width.mlp - shared) * size
    result: float = pack.tokens * (norms + linear_inputs + attention + mlp) + adapters
    return result


def _adapters(
    hf_config: PretrainedConfig, layout: ParallelLayout, pack: Pack, lora: Lora, layer: int, without: str | None
) -> float:
    """Bytes that the adapters of a layer keep beside their inputs: see ``models/lora.py: LoraAdapter.forward``.

    What A made, of the whole pack before a column-parallel B; and the B as one product takes it, with all parts. Of
    experts, what the As made of all tokens that a rank's experts get. ``without`` begins the names of linears that are
    left out.
    """
    experts, elements = Experts.of(hf_config), 0.0
    for fused in fused_linears(hf_config, layer):
        if not any(adapted_parts(fused, lora)) or (without is not None and fused.name.startswith(without)):
            continue
        if fused.experts and experts is not None:
            elements += pack.tokens * experts.top_k * layout.expert_shards / layout.tensor * lora.rank
            continue
        outputs = sum(rows for rows, _ in linear_shapes(fused, hf_config))
        whole = fused.row_parallel or fused.replicated
        tokens = pack.tokens / (layout.tensor if whole and layout.sequence_parallel else 1)
        rows = outputs / (1 if whole else layout.tensor)
        elements += (tokens + rows) * len(fused.parts) * lora.rank
    return elements * pack.dtype_bytes


def _norm_bytes(settings: Mapping[str, Any], size: int) -> int:
    """Of an element that a norm keeps: Gemma's works on an fp32 copy, the others keep the residual stream itself."""
    return _FP32 if settings.get("layernorm_zero_centered_gamma") else size


def _core_attention(settings: Mapping[str, Any], width: LayerWidths, pack: Pack, layer: int) -> float:
    """Bytes per token: output and log-sum-exp of SDPA, or the mask of attention that recomputes its scores."""
    window = None
    if settings.get("window_size") is not None and settings["window_attn_skip_freq"][layer]:
        window = settings["window_size"][0] + 1
    masked_window = window is not None and window < pack.sequence_tokens
    explicit = settings.get("attn_logit_softcapping") is not None or settings.get("softmax_type") == "learnable"
    if not masked_window and not explicit:
        return width.query * pack.dtype_bytes + width.heads * _FP32
    reach = pack.sequence_tokens if window is None else window
    starts = range(0, pack.sequence_tokens, QUERY_BLOCK)
    blocks = [(start, min(start + QUERY_BLOCK, pack.sequence_tokens)) for start in starts]
    return sum((b - a) * (b - max(0, a - reach + 1)) for a, b in blocks) / pack.sequence_tokens


def stage_activations(
    hf_config: PretrainedConfig,
    layout: ParallelLayout,
    pack: Pack,
    recompute: str,
    stage: int,
    lora: Lora | None = None,
) -> float:
    """Bytes that a stage keeps at the fullest moment of 1F1B: all its layers, for all micro batches in flight.

    Stage i of p holds p - i micro batches (Korthikanti et al. 2022, section 4.2.3); so many per step are assumed. With
    v chunks a stage it begins with 2 (p - i - 1) + (v - 1) p forwards of a chunk, and holds one more. The last stage
    also keeps input and output of the final norm.
    """
    sizes = [
        layer_activations(hf_config, layout, pack, recompute, layer, lora)
        for layer in stage_layers(hf_config, layout, stage)
    ]
    held = sum(sizes)
    width = LayerWidths.of(hf_config, layout)
    on_device = 0.0
    if pack.offloaded:
        # One layer's are used or copied while those of the next are under way; of one micro batch at a time.
        on_device, held = sum(sorted(sizes)[-2:]), 0.0
    if recompute == "full":
        held += pack.tokens * width.head * _FP32 * len(rope_layer_types(hf_config) or (None,))  # rotary angles
    if stage == layout.pipeline - 1:
        norm = _norm_bytes(settings_of(hf_config), pack.dtype_bytes)
        held += pack.tokens * (width.hidden * norm + hf_config.hidden_size * pack.dtype_bytes)
    return held * _in_flight(layout, stage) + on_device


def host_activations(
    hf_config: PretrainedConfig, layout: ParallelLayout, pack: Pack, recompute: str, lora: Lora | None = None
) -> float:
    """Bytes of host memory for what the layers of the fullest stage keep, for all micro batches in flight, where that
    is offloaded."""
    return max(
        _in_flight(layout, stage)
        * sum(
            layer_activations(hf_config, layout, pack, recompute, layer, lora)
            for layer in stage_layers(hf_config, layout, stage)
        )
        for stage in range(layout.pipeline)
    )


def _in_flight(layout: ParallelLayout, stage: int) -> float:
    """Micro batches whose forward passes a stage has made, and not their backward passes, at the fullest moment."""
    following = layout.pipeline - stage - 1
    if layout.virtual == 1:
        return following + 1
    return (2 * following + (layout.virtual - 1) * layout.pipeline + 1) / layout.virtual
