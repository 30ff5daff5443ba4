"""What the machine and the GPU options of a config come to: checked once at start-up, then handed to the builders."""

import contextlib
import functools
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from transformers import PretrainedConfig

from megatron_tgdpo.config.constraints import WITH_EXPERTS
from megatron_tgdpo.config.schema import Config, ModelConfig, PrecisionConfig, TrainConfig
from megatron_tgdpo.distributed.layout import ROLES, ParallelLayout
from megatron_tgdpo.errors import UserError
from megatron_tgdpo.gpu.capabilities import Capabilities, detect
from megatron_tgdpo.gpu.fp8 import (
    asked_by,
    check_fp8_sizes,
    frozen_transformer_kwargs,
    policy_transformer_kwargs,
)
from megatron_tgdpo.gpu.fp8_checks import check_precision
from megatron_tgdpo.gpu.kernel_choice import LayerSpec, build_block_spec, choose_attention, choose_layer_spec
from megatron_tgdpo.gpu.optimizer_state import check_optimizer_state
from megatron_tgdpo.gpu.overlap import check_overlap
from megatron_tgdpo.gpu.overlap import transformer_kwargs as overlap_kwargs
from megatron_tgdpo.models.config import LanguageModelConfig, transformer_config_kwargs
from megatron_tgdpo.models.families import family_of, settings_of
from megatron_tgdpo.planning.recomputation import check_recompute


@functools.cache
def capabilities(device: torch.device) -> Capabilities:
    """What :func:`~megatron_tgdpo.gpu.capabilities.detect` finds, looked for once a process."""
    return detect(device)


def check_gpu_options(
    config: Config, configs: Mapping[str, PretrainedConfig], layout: ParallelLayout, found: Capabilities
) -> None:
    """Refuses layer specs, precisions, overlaps and offloads that this machine, these models or this layout lack.

    Args:
        config: The run.
        configs: HF configs by role.
        layout: The parallel layout.
        found: The machine.

    Raises:
        UserError: With the key, the reason and the way out.
    """
    spec = choose_layer_spec(config.model.layer_spec, found, config.precision.dtype)
    check_precision(config, found, spec)
    check_overlap(config, layout, found, spec)
    check_optimizer_state(config, found)
    check_experts(config, configs)
    for role, hf_config in configs.items():
        if role == "policy":
            can_discard = found.device == "cpu" or found.transformer_engine is not None
            check_recompute(config.train.recomputation, hf_config, spec, can_discard=can_discard)
        recipe = config.precision.policy_recipe if role == "policy" else config.frozen_recipe
        if recipe is not None:
            own = layout.of_model(ROLES.index(role))
            kwargs = transformer_config_kwargs(hf_config, own, dtype=torch.bfloat16, device=torch.device("cpu"))
            try:
                check_fp8_sizes(kwargs, recipe, config.seq_length, layout)
            except UserError as error:
                raise UserError(f"model.{role}: {error}") from error
        if config.overlap.tensor and hf_config.hidden_size != configs["policy"].hidden_size:
            raise UserError(
                f"overlap.tensor has buffers for one hidden size, model.{role} has {hf_config.hidden_size} and the "
                f"policy {configs['policy'].hidden_size}: set it to false"
            )


def check_experts(config: Config, configs: Mapping[str, PretrainedConfig]) -> None:
    """Refuses what has no kernels for experts, on whatever machine.

    Args:
        config: The run.
        configs: HF configs of the models that run, by role.

    Raises:
        UserError: With the key, the reason and the way out.
    """
    if config.moe.has_losses and not family_of(configs["policy"].architectures).has_experts:
        raise UserError("section moe has losses of routers, but model.policy has no experts: remove it")
    for role, hf_config in configs.items():
        family = family_of(hf_config.architectures)
        recipe = config.precision.policy_recipe if role == "policy" else config.frozen_recipe
        if family.has_latent_attention and (config.overlap.tensor or recipe is not None):
            fp8 = "precision.fp8=none and precision.fp4=none (for a frozen model alone precision.frozen=bf16)"
            which = "overlap.tensor=false" if config.overlap.tensor else fp8
            raise UserError(
                f"model.{role} has latent attention (MLA), whose products are made in bf16 or fp32, by plain linears, "
                f"until others have been measured: set {which}"
            )
        if not family.has_experts:
            continue
        if config.overlap.tensor:
            raise UserError(
                f"overlap.tensor has no buffers for the products of experts, which model.{role} has: set it to false"
            )
        if recipe == "delayed":
            raise UserError(
                f"model.{role} has experts, whose scales with precision.fp8=delayed would follow from experts of other "
                "ranks, too: set precision.fp8 to tensorwise or blockwise"
            )
        if recipe not in WITH_EXPERTS:
            raise UserError(
                f"model.{role} has experts, whose products are made in FP8 with tensorwise or blockwise scales alone, "
                f"not with {asked_by(recipe)}: set precision.fp8 to one of these or to none, and precision.fp4=none"
            )
        if recipe is not None and family.config_kwargs(hf_config)["add_bias_linear"]:
            raise UserError(
                f"model.{role} has experts with biases, which have not been tried in FP8: set precision.fp8=none (for "
                "a frozen model alone precision.frozen=bf16)"
            )


def model_options(
    config: Config, hf_config: PretrainedConfig, device: torch.device, *, frozen: bool
) -> tuple[dict[str, Any], Any]:
    """How one model is built on this machine.

    Args:
        config: The run.
        hf_config: The model's.
        device: Where it will be.
        frozen: Reference or guide.

    Returns:
        Arguments of LanguageModelConfig, and the function that makes a stage's layers.
    """
    found = capabilities(device)
    overrides = frozen_transformer_kwargs(config) if frozen else policy_transformer_kwargs(config.precision)
    spec = choose_layer_spec(config.model.layer_spec, found, config.precision.dtype)
    overrides |= overlap_kwargs(config.overlap) | _fused_kwargs(config.train, hf_config, found, spec, frozen=frozen)
    return overrides, partial(_block_spec, spec=spec, found=found)


def building(frozen: bool) -> contextlib.AbstractContextManager[Any]:
    """The context to build a model in: without gradients, FP8 weights hold no second copy for backward.

    Source: TransformerEngine 2.9 ``module/base.py: reset_parameters``.
    """
    return torch.no_grad() if frozen else contextlib.nullcontext()


def describe_model(
    model: ModelConfig, precision: PrecisionConfig, built: LanguageModelConfig, device: torch.device
) -> str:
    """Layer spec, core attention and precision of a built model, for the log."""
    found = capabilities(device)
    spec = choose_layer_spec(model.layer_spec, found, precision.dtype)
    computed = str(built.params_dtype).removeprefix("torch.")
    if built.fp8:
        held = " with FP8 weights" if built.fp8_param else ""
        computed = f"FP8 {built.fp8_recipe} ({built.fp8}){held}"
    if built.fp4:
        computed = f"FP4 {built.fp4_recipe}"
    return f"layer spec {spec}, core attention {choose_attention(built, spec, found)}, {computed}"


def _block_spec(
    config: LanguageModelConfig, layers: Sequence[int], *, spec: LayerSpec, found: Capabilities
) -> TransformerBlockSubmodules:
    return build_block_spec(config, layers, spec, choose_attention(config, spec, found))


def _fused_kwargs(
    train: TrainConfig, hf_config: PretrainedConfig, found: Capabilities, spec: LayerSpec, *, frozen: bool
) -> dict[str, Any]:
    # By the function itself: GPT-OSS's config names SiLU too, and its experts have another.
    swiglu = settings_of(hf_config)["activation_func"] is F.silu
    if train.fused == "off" or found.device != "cuda":
        # The local layer spec brings models/swiglu.py, which needs no compiler.
        return {"use_te_activation_func": swiglu and spec == "local"}
    return {
        # megatron-core's output layer asks for apex's kernel wherever the flag is set, whatever the layer spec.
        "gradient_accumulation_fusion": found.wgrad_accumulation and not frozen,
        "fused_layer_wgrad": not frozen,
        "bias_activation_fusion": swiglu,
        # Transformer Engine's kernel; it takes an angle of each token, as megatron-core's own arithmetic does.
        "apply_rope_fusion": spec == "transformer_engine",
    }
