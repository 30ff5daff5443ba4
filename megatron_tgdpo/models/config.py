"""megatron-core's configuration of a language model, from its HF config and the parallel layout."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.transformer.transformer_config import TransformerConfig
from transformers import PretrainedConfig

from megatron_tgdpo.distributed.layout import ParallelLayout
from megatron_tgdpo.errors import UserError
from megatron_tgdpo.models.divisibility import check_divides
from megatron_tgdpo.models.families import family_of
from megatron_tgdpo.models.rotary import rope_frequencies, rope_layer_types


@dataclass
class LanguageModelConfig(TransformerConfig):
    """What families need beyond megatron-core's own fields.

    Attributes:
        pre_norms: A norm before attention and before the MLP.
        post_norms: A norm after attention and after the MLP, each before its residual addition.
        qk_projection_norm: A norm over all query heads, and one over all key heads, before rotary positions.
        residual_multiplier: Factor of what attention and MLP add to the residual stream.
        rotary_tables: Which of the angles' tables each layer takes, by 0-based layer; None where there is one for all.
        rotary_factors: By table, what the rotated part of queries and of keys is multiplied by; None for 1.
        attn_logit_softcapping: c: attention scores s become c * tanh(s / c); None for no cap.
        final_logit_softcapping: The same for the logits.
        embedding_scale: Factor of the embeddings.
        embedding_scale_rounded: It is rounded to their dtype first, as transformers does with Gemma's.
        logit_scale: Factor of the logits, applied to the hidden states that they are made of.
        fused_layer_wgrad: Transformer Engine's linears add weight gradients to the fp32 buffer in the product itself.
            ``gradient_accumulation_fusion`` would ask megatron-core's own layers for apex's kernel too.
        router_aux_loss: Coefficient of the routers' load balancing loss (``models/router_losses.py``); megatron-core's
            own key would have it apply another.
        router_z_loss: The same of their z-loss.
        adapters: The layers' linears have room for LoRA adapters (``models/lora.py``).
    """

    pre_norms: bool = True
    post_norms: bool = False
    qk_projection_norm: bool = False
    residual_multiplier: float = 1.0
    rotary_tables: tuple[int, ...] | None = None
    rotary_factors: tuple[float, ...] | None = None
    attn_logit_softcapping: float | None = None
    final_logit_softcapping: float | None = None
    embedding_scale: float = 1.0
    embedding_scale_rounded: bool = True
    logit_scale: float = 1.0
    fused_layer_wgrad: bool = False
    router_aux_loss: float = 0.0
    router_z_loss: float = 0.0
    adapters: bool = False

    def has_experts(self, layer: int) -> bool:
        """Whether a layer has experts in its MLP's place; layers are counted from 0 through the model."""
        of_each = self.moe_layer_freq
        return self.num_moe_experts is not None and (not isinstance(of_each, list) or bool(of_each[layer]))


def transformer_config_kwargs(
    hf_config: PretrainedConfig,
    layout: ParallelLayout,
    *,
    dtype: torch.dtype,
    device: torch.device,
    overrides: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """All arguments of :class:`LanguageModelConfig`; pure.

    Args:
        hf_config: From :func:`~megatron_tgdpo.models.hf_config.read_hf_config`.
        layout: The parallel layout, with this model's layers first (``layout.of_model``).
        dtype: Of parameters and activations, ``torch.float32`` or ``torch.bfloat16``.
        device: Where the parameters will be.
        overrides: Wins over everything else.

    Raises:
        UserError: The model does not divide by the layout.
    """
    family = family_of(hf_config.architectures)
    family.check(hf_config)
    kwargs = family.config_kwargs(hf_config)
    check_divides(kwargs, layout)
    kwargs.update(_rotary_kwargs(hf_config, kwargs))
    return {
        **kwargs,
        "tensor_model_parallel_size": layout.tensor,
        "pipeline_model_parallel_size": layout.pipeline,
        "virtual_pipeline_model_parallel_size": layout.virtual if layout.virtual > 1 else None,
        "pipeline_model_parallel_layout": _unequal_parts(layout, kwargs["num_layers"]),
        "context_parallel_size": layout.context,
        "sequence_parallel": layout.sequence_parallel,
        **(_expert_kwargs(layout) if family.has_experts else {}),
        "params_dtype": dtype,
        "pipeline_dtype": dtype,
        "bf16": dtype == torch.bfloat16,
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
        "use_cpu_initialization": device.type == "cpu",
        # Weights always come from a checkpoint.
        "perform_initialization": False,
        # The token slot of the loss carries the pair count (see training/forward_step.py).
        "calculate_per_token_loss": True,
        "bias_dropout_fusion": False,
        "bias_activation_fusion": False,
        "masked_softmax_fusion": False,
        "persist_layer_norm": False,
        "gradient_accumulation_fusion": False,
        **(overrides or {}),
    }


def _rotary_kwargs(hf_config: PretrainedConfig, kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Which layer takes which table of angles, and where YaRN's factor goes."""
    types = rope_layer_types(hf_config)
    tables = [rope_frequencies(hf_config, kind) for kind in types or (None,)]
    factors = tuple(factor for _, factor in tables)
    found: dict[str, Any] = {}
    if types is not None:
        found["rotary_tables"] = tuple(types.index(kind) for kind in hf_config.layer_types)
    if set(factors) == {1.0}:
        return found
    if types is None and 2 * len(tables[0][0]) == kwargs["kv_channels"] and not kwargs.get("no_rope_freq"):
        # Rotated queries and keys have the factor each, and nothing but their products is used.
        scale = kwargs.get("softmax_scale") or kwargs["kv_channels"] ** -0.5
        return {"softmax_scale": factors[0] ** 2 * scale}
    return {**found, "rotary_factors": factors}


def _expert_kwargs(layout: ParallelLayout) -> dict[str, Any]:
    """How tokens get to their experts: every one to all that it asks for, by an exchange that takes any number."""
    return {
        "expert_model_parallel_size": layout.expert,
        "expert_tensor_parallel_size": layout.expert_shards,
        "moe_token_dispatcher_type": "alltoall",
        # What decides where a token goes is computed in fp32, and not bent towards evenness.
        "moe_router_dtype": "fp32",
        "moe_router_load_balancing_type": "none",
        "moe_aux_loss_coeff": 0.0,
    }


def _unequal_parts(layout: ParallelLayout, layers: int) -> list[list[str]] | None:
    """What each part of the model holds, as megatron-core names it; None for equal parts."""
    try:
        sizes = layout.part_layers(layers)
    except ValueError as error:
        chunks = f" x {layout.virtual} chunks" if layout.virtual > 1 else ""
        raise UserError(
            f"{layers} layers are not divisible by parallel.pipeline = {layout.pipeline}{chunks}, and their stages are "
            "not given"
        ) from error
    if len(set(sizes)) == 1:
        return None
    parts = [["decoder"] * size for size in sizes]
    return [["embedding", *parts[0]], *parts[1:-1], [*parts[-1], "loss"]]
