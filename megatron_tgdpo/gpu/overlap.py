"""Traffic hidden behind computation: gradients and weights of data ranks, and tensor parallel traffic.

None of it changes a result. Source: megatron-core 0.16.1 ``distributed_data_parallel.py``,
``param_and_grad_buffer.py`` and ``pipeline_parallel/schedules.py``; Megatron-LM 0.16.1 ``training/initialize.py``;
TransformerEngine 2.9 ``module/base.py: initialize_ub``.
"""

import copy
from collections.abc import Sequence
from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig

from megatron_tgdpo.config.schema import Config, OffloadConfig, OverlapConfig, PrecisionConfig
from megatron_tgdpo.distributed.layout import ParallelLayout
from megatron_tgdpo.errors import UserError
from megatron_tgdpo.gpu.capabilities import Capabilities
from megatron_tgdpo.gpu.fp8 import asked_by
from megatron_tgdpo.models.fp8_tensors import finish_gather, is_fp8
from megatron_tgdpo.models.language_model import LanguageModel


def check_overlap(config: Config, layout: ParallelLayout, found: Capabilities, spec: str) -> None:
    """Refuses what has nothing to work with here.

    Raises:
        UserError: ``overlap.tensor`` without Transformer Engine layers, or ``offload`` options off a GPU.
    """
    if config.overlap.tensor and spec != "transformer_engine":
        raise UserError("overlap.tensor is done by Transformer Engine's layers: it needs a GPU and that layer spec")
    if config.overlap.tensor and layout.tensor == 1:
        raise UserError("overlap.tensor with parallel.tensor=1 has no traffic to hide: set it to false")
    recipe = config.precision.policy_recipe
    if config.overlap.tensor and recipe in ("blockwise", "nvfp4"):
        raise UserError(f"overlap.tensor does not go with {asked_by(recipe)}, whose tensors user buffers do not hold")
    if found.device != "cuda":
        check_offload_without_gpu(config)
    if config.offload.optimizer and found.transformer_engine is None:
        raise UserError(
            "offload.optimizer needs Transformer Engine: megatron-core 0.16 asks for its version there; set it to 0"
        )


def check_offload_without_gpu(config: Config) -> None:
    """Refuses what only moves tensors off a GPU.

    Raises:
        UserError: With the key.
    """
    if config.offload.optimizer:
        raise UserError("offload.optimizer moves state from a GPU to the CPU: set it to 0 without a GPU")
    if config.offload.activations:
        raise UserError("offload.activations moves tensors from a GPU to host memory: set it to false without a GPU")


def ddp_config(overlap: OverlapConfig, precision: PrecisionConfig) -> DistributedDataParallelConfig:
    """The data-parallel wrapper's settings."""
    return DistributedDataParallelConfig(
        use_distributed_optimizer=True,
        grad_reduce_in_fp32=True,
        overlap_grad_reduce=overlap.grad_reduce,
        overlap_param_gather=overlap.param_gather,
        fp8_param_gather=precision.fp8_params,
    )


def optimizer_kwargs(precision: PrecisionConfig, overlap: OverlapConfig, offload: OffloadConfig) -> dict[str, Any]:
    """What FP8, overlap and offload add to megatron-core's OptimizerConfig.

    The CPU part of the optimizer goes through the precision-aware code path, in fp32 (Megatron-LM 0.16.1
    ``arguments.py``: one is not to be had without the other).
    """
    kwargs: dict[str, Any] = {
        "fp8_recipe": None if precision.fp8 == "none" else precision.fp8,
        "overlap_param_gather": overlap.param_gather,
    }
    if offload.optimizer:
        kwargs |= {
            "optimizer_cpu_offload": True,
            "optimizer_offload_fraction": offload.optimizer,
            "overlap_cpu_optimizer_d2h_h2d": True,
            "use_precision_aware_optimizer": True,
        }
    return kwargs


def transformer_kwargs(overlap: OverlapConfig) -> dict[str, Any]:
    """What tensor parallel overlap adds to a LanguageModelConfig."""
    return {"tp_comm_overlap": True} if overlap.tensor else {}


def wire_overlap(chunks: Sequence[DistributedDataParallel], policy: Sequence[LanguageModel]) -> None:
    """Tells megatron-core's schedule when gradients are final, and gathers the output weight before it is read.

    The schedule reduces gradients once, after the last micro batch, through ``no_sync_func``. It reads that from the
    first chunk's config, for all chunks: a chunk that is left out takes every micro batch for the last one. Neither
    ``grad_sync_func`` nor ``param_sync_func`` is set: they align traffic over stages, and without them each bucket goes
    out as soon as its gradients are there, or its weights wanted. Weights are gathered when the module that owns them
    is called, but the output weight is read without calling its module.

    Args:
        chunks: All chunks of this stage.
        policy: What they wrap.
    """
    first = chunks[0]
    if first.ddp_config.overlap_grad_reduce:
        no_sync = [chunk.no_sync for chunk in chunks]
        schedule_config = copy.copy(first.config)
        # The schedules without chunks take no list.
        schedule_config.no_sync_func = no_sync if len(chunks) > 1 else no_sync[0]
        first.config = schedule_config
    for chunk, part in zip(chunks, policy, strict=True):
        # A frozen output weight, as under LoRA, is not gathered.
        if chunk.ddp_config.overlap_param_gather and part.post_process and part.output_weight().requires_grad:
            group = chunk.param_to_bucket_group[part.output_weight()]
            part.decoder.register_forward_hook(lambda *_, group=group: group.finish_param_sync())


def finish_param_gather(model: DistributedDataParallel) -> None:
    """Brings this rank's weights up to date outside of a forward (before saving). Collective over data ranks."""
    if not model.ddp_config.overlap_param_gather:
        return
    model.start_param_sync(force_sync=True)
    # What a forward would have done after its own gather.
    finish_gather([parameter for parameter in model.parameters() if parameter.requires_grad and is_fp8(parameter)])


def start_user_buffers(config: Config, hidden_size: int, layout: ParallelLayout) -> None:
    """Allocates Transformer Engine's communication buffers for ``overlap.tensor``. Collective over all ranks.

    One set serves all models, so those must have the policy's hidden size. Not yet run on a GPU (docs/gpu.md).
    """
    from transformer_engine.pytorch.module import base

    modes = base.UserBufferQuantizationMode
    quantization = [modes.NONE if config.precision.policy_recipe is None else modes.FP8]
    if quantization == [modes.FP8] and (config.precision.first_last_layers_bf16 or config.precision.frozen == "bf16"):
        quantization.append(modes.NONE)
    base.initialize_ub(
        shape=[config.seq_length // layout.context, hidden_size],
        tp_size=layout.tensor,
        quantization_modes=quantization,
        dtype=torch.bfloat16,
        bootstrap_backend="nccl",
    )
