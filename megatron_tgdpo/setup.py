"""Builds what a run trains with: models, data-parallel wrappers, optimizer, communicators."""

import logging
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.distributed import DistributedDataParallel, finalize_model_grads
from megatron.core.process_groups_config import ProcessGroupCollection
from transformers import PretrainedConfig

from checkpoints_convert.load import load_hf_weights, load_megatron_weights, refuse_non_finite
from megatron_tgdpo.checkpoint_directory import is_megatron_checkpoint
from megatron_tgdpo.colocated import ColocatedCommunicator, ColocatedModel
from megatron_tgdpo.config import Config
from megatron_tgdpo.frozen_offload import LayerStreamer
from megatron_tgdpo.gpu_setup import building, capabilities, describe_model, model_options
from megatron_tgdpo.models import LanguageModel, build_language_model
from megatron_tgdpo.optimizer import build_optimizer, build_scheduler
from megatron_tgdpo.overlap import ddp_config, optimizer_kwargs, start_user_buffers, wire_overlap
from megatron_tgdpo.parallel import ParallelLayout
from megatron_tgdpo.prefetch import build_prefetcher
from megatron_tgdpo.ranks import agree
from megatron_tgdpo.run_inputs import RunData, row_format
from megatron_tgdpo.train_step import Engine

logger = logging.getLogger(__name__)

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
# megatron-core's arguments for each value of train.recompute.
RECOMPUTE: dict[str, dict[str, Any]] = {
    "none": {},
    "selective": {"recompute_granularity": "selective", "recompute_modules": ["core_attn"]},
    "full": {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1},
}


def load_model(
    path: str, hf_config: PretrainedConfig, layout: ParallelLayout, pg: ProcessGroupCollection, config: Config,
    device: torch.device, recompute: str = "none", frozen: bool = False,
) -> list[LanguageModel]:  # fmt: skip
    """Builds this rank's chunks of one model and fills them from an HF or Megatron directory. Collective.

    Raises:
        UserError: On every rank: it cannot be loaded, or a weight is not finite.
    """
    overrides, block_spec = model_options(config, hf_config, device, frozen=frozen)
    arguments: dict[str, Any] = {
        "dtype": DTYPES[config.precision.dtype],
        "device": device,
        "transformer_overrides": {
            "finalize_model_grads_func": finalize_model_grads,
            "deallocate_pipeline_outputs": layout.pipeline > 1,
            "batch_p2p_comm": True,
            **RECOMPUTE[recompute],
            **overrides,
        },
        "block_spec": block_spec,
    }
    with building(frozen):
        chunks = [build_language_model(hf_config, layout, pg, chunk=n, **arguments) for n in range(layout.virtual)]
    directory = Path(path)
    if is_megatron_checkpoint(directory):
        load_megatron_weights(chunks, directory, hf_config, verify=config.checkpoint.verify)
    else:
        agree(lambda: [load_hf_weights(chunk, directory, hf_config, pg) for chunk in chunks])
    agree(lambda: refuse_non_finite(chunks, directory, hf_config))
    if frozen and config.offload.frozen:
        for chunk in chunks:
            LayerStreamer(chunk.requires_grad_(False).decoder.layers, device)
    return chunks


def load_frozen_models(
    config: Config,
    configs: Mapping[str, PretrainedConfig],
    layout: ParallelLayout,
    pg: ProcessGroupCollection,
    device: torch.device,
) -> list[LanguageModel]:
    """This rank's slices of the frozen models that the method uses, the reference first. Collective."""
    whole = replace(layout, virtual=1)
    models = []
    for role in config.method.frozen:
        models += load_model(config.model_paths[role], configs[role], whole, pg, config, device, frozen=True)
    return models


def build_engine(
    config: Config,
    configs: Mapping[str, PretrainedConfig],
    layout: ParallelLayout,
    pg: ProcessGroupCollection,
    total_steps: int,
    device: torch.device,
) -> Engine:
    """Builds and loads the models and wires the training engine. Collective over all ranks.

    Args:
        config: The run.
        configs: From :func:`read_model_configs`.
        layout: The rank grid.
        pg: Its process groups.
        total_steps: That the learning rate schedule spans.
        device: Of models and optimizer.

    Raises:
        UserError: The same on every rank: a checkpoint cannot be loaded, or does not divide by the layout.
    """
    if config.overlap.tensor:
        start_user_buffers(config, configs["policy"].hidden_size, layout)
    policy = load_model(
        config.model_paths["policy"], configs["policy"], layout, pg, config, device, config.train.recompute
    )
    cached, prefetch = config.guidance.mode == "cached", config.guidance.prefetch
    frozen = [] if cached else load_frozen_models(config, configs, layout, pg, device)
    keep_bytes = config.train.keep_logits_mib * 2**20
    modules = [ColocatedModel(chunk, [] if prefetch else frozen, keep_bytes=keep_bytes) for chunk in policy]
    chunks = [DistributedDataParallel(module.config, ddp_config(config), module) for module in modules]
    wire_overlap(chunks, policy)
    fused, dtype = config.train.fused == "auto", DTYPES[config.precision.dtype]
    optimizer = build_optimizer(chunks, config.optimizer, dtype, pg, fused=fused, options=optimizer_kwargs(config))
    communicator = None
    if layout.pipeline > 1:
        communicator = ColocatedCommunicator(pg.pp, modules[0].config, modules[0].mailbox, device)
    return Engine(
        chunks=chunks,
        optimizer=optimizer,
        scheduler=build_scheduler(optimizer, config.optimizer, total_steps),
        communicator=communicator,
        prefetcher=build_prefetcher(config, configs, frozen, layout, pg, device) if prefetch else None,
        pg=pg,
        loss=config.loss,
        row=row_format(config, pg),
        device=device,
    )


def colocated_model(engine: Engine) -> ColocatedModel:
    """The model inside the data-parallel wrapper, where a stage has one chunk."""
    (chunk,) = engine.chunks
    return _unwrapped(chunk)


def policy_chunks(engine: Engine) -> list[LanguageModel]:
    """This rank's chunks of the policy, inside their wrappers."""
    return [_unwrapped(chunk).policy for chunk in engine.chunks]


def _unwrapped(chunk: DistributedDataParallel) -> ColocatedModel:
    module = chunk.module
    assert isinstance(module, ColocatedModel)
    return module


def log_setup(config: Config, engine: Engine, layout: ParallelLayout, data: RunData) -> None:
    """Logs, on the first rank, the layout, what this machine offers, what of it is in use, and the size of the job."""
    if dist.get_rank() != 0:
        return
    modules = [_unwrapped(chunk) for chunk in engine.chunks]
    frozen = modules[0].frozen if engine.prefetcher is None else engine.prefetcher.models
    parts: list[list[torch.nn.Module]] = [[module.policy for module in modules], [frozen]]
    counts = [sum(p.numel() for module in part for p in module.parameters()) for part in parts]
    found = capabilities(engine.device)
    logger.info("layout %s on %s; fused parts: %s", layout, found.describe(), config.train.fused)
    logger.info("policy: %s", describe_model(config, modules[0].policy.config, engine.device))
    for model in frozen.models:
        logger.info("frozen: %s", describe_model(config, model.config, engine.device))
    logger.info("parameters on rank 0: policy %.1fM, frozen %.1fM", counts[0] / 1e6, counts[1] / 1e6)
    logger.info("%d pairs, %d steps of %d pairs", len(data.train), data.order.steps, data.order.global_pairs)
