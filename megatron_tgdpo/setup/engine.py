"""Builds what a run trains with: models, data-parallel wrappers, optimizer, communicators."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import ChainedOptimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from megatron.core.process_groups_config import ProcessGroupCollection
from transformers import PretrainedConfig

from megatron_tgdpo.batching.packed_sequence import PackFormat
from megatron_tgdpo.config.schema import Config, LossConfig
from megatron_tgdpo.distributed.layout import ParallelLayout
from megatron_tgdpo.frozen.colocated import ColocatedModel, colocated_chunks
from megatron_tgdpo.frozen.communicator import ColocatedCommunicator
from megatron_tgdpo.frozen.prefetch import Prefetcher, build_prefetcher
from megatron_tgdpo.gpu.overlap import ddp_config, optimizer_kwargs, start_user_buffers, wire_overlap
from megatron_tgdpo.models.language_model import LanguageModel
from megatron_tgdpo.setup.layout import pack_format
from megatron_tgdpo.setup.learning_rate import build_scheduler
from megatron_tgdpo.setup.models import load_frozen_models, load_policy
from megatron_tgdpo.setup.optimizer import build_optimizer
from megatron_tgdpo.storage.dtypes import DTYPES


@dataclass(frozen=True)
class Engine:
    """All that a step works with on this rank.

    Attributes:
        chunks: The wrapped co-located model; with the interleaved schedule, its chunks on this stage.
        optimizer: Over the policy's parameters; see :func:`~megatron_tgdpo.setup.optimizer.build_optimizer`.
        scheduler: Of the learning rate; advanced once a step.
        communicator: Between pipeline stages; None with one stage.
        prefetcher: Runs the frozen models, where they do not run in the policy's forward.
        pg: Process groups.
        loss: Method and its options.
        pack_format: The format of every pack.
        device: Where the model is.
    """

    chunks: Sequence[DistributedDataParallel]
    optimizer: ChainedOptimizer
    scheduler: OptimizerParamScheduler
    communicator: ColocatedCommunicator | None
    prefetcher: Prefetcher | None
    pg: ProcessGroupCollection
    loss: LossConfig
    pack_format: PackFormat
    device: torch.device


logger = logging.getLogger(__name__)


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
        layout: The parallel layout.
        pg: Its process groups.
        total_steps: That the learning rate schedule spans.
        device: Of models and optimizer.

    Raises:
        UserError: The same on every rank: a checkpoint cannot be loaded, or does not divide by the layout.
    """
    if config.overlap.tensor:
        start_user_buffers(config, configs["policy"].hidden_size, layout)
    policy = load_policy(config, configs, layout, pg, device)
    cached, prefetch = config.guidance.mode == "cached", config.guidance.prefetch
    base = policy if policy[0].config.adapters else ()
    frozen = [] if cached else load_frozen_models(config, configs, layout, pg, device, base)
    modules = colocated_chunks(policy, [] if prefetch else frozen, keep_bytes=config.train.keep_logits_mib * 2**20)
    chunks = [
        DistributedDataParallel(module.config, ddp_config(config.overlap, config.precision), module)
        for module in modules
    ]
    wire_overlap(chunks, policy)
    fused, dtype = config.train.fused == "auto", DTYPES[config.precision.dtype]
    options = optimizer_kwargs(config.precision, config.overlap, config.offload)
    optimizer = build_optimizer(chunks, config.optimizer, dtype, pg, fused=fused, options=options)
    prefetcher = build_prefetcher(config, configs, frozen[0], layout, pg, device) if prefetch else None
    communicator = None
    if layout.pipeline > 1:
        communicator = ColocatedCommunicator(
            pg.pp,
            modules[0].config,
            modules[0].p2p_buffer,
            device,
            meanwhile=prefetcher.during_exchange if prefetcher is not None else None,
        )
    return Engine(
        chunks=chunks,
        optimizer=optimizer,
        scheduler=build_scheduler(optimizer, config.optimizer, total_steps),
        communicator=communicator,
        prefetcher=prefetcher,
        pg=pg,
        loss=config.loss,
        pack_format=pack_format(config, pg),
        device=device,
    )


def policy_chunks(engine: Engine) -> list[LanguageModel]:
    """This rank's chunks of the policy, inside their wrappers."""
    return [unwrapped(chunk).policy for chunk in engine.chunks]


def unwrapped(chunk: DistributedDataParallel) -> ColocatedModel:
    """The co-located model inside a data-parallel wrapper."""
    module = chunk.module
    assert isinstance(module, ColocatedModel)
    return module
