"""The parallel layout of a run, and the format of its packs under it."""

import math
from collections.abc import Mapping
from dataclasses import asdict, replace

from megatron.core.process_groups_config import ProcessGroupCollection
from transformers import PretrainedConfig

from megatron_tgdpo.batching.packed_sequence import PackFormat
from megatron_tgdpo.config.schema import Config, ParallelConfig
from megatron_tgdpo.distributed.layout import ParallelLayout, make_layout
from megatron_tgdpo.planning.layouts import job_of
from megatron_tgdpo.planning.pipeline_layers import fit_layout
from megatron_tgdpo.setup.model_sources import planned_sources


def layout_of(parallel: ParallelConfig, world_size: int) -> ParallelLayout:
    """The parallel layout of a run."""
    return make_layout(
        parallel.tensor,
        parallel.pipeline,
        parallel.context,
        parallel.sequence_parallel,
        world_size,
        parallel.virtual_pipeline or 1,
        parallel.expert,
        parallel.expert_tensor,
    )


def fitted_layout(config: Config, configs: Mapping[str, PretrainedConfig], layout: ParallelLayout) -> ParallelLayout:
    """The layout with the layers of each stage: those of ``parallel.pipeline_layers``, or by cost.

    Args:
        config: The run.
        configs: HF configs of the models that run, by role.
        layout: From :func:`layout_of`.

    Raises:
        UserError: The models do not divide by it.
    """
    job = job_of(config, [*configs.values()], planned_sources(config, configs))
    return fit_layout(job, layout, config.train.recomputation, asdict(config.parallel.pipeline_layers))


def pack_format(config: Config, pg: ProcessGroupCollection) -> PackFormat:
    """The format of this run's packs on this rank."""
    # Divisible by what splits a pack, and by what matrix units like or, in FP8, insist on.
    multiple = math.lcm(64, 2 * pg.cp.size() * pg.tp.size(), config.seq_length_multiple) if pg.pp.size() == 1 else None
    return replace(whole_packs(config), context_rank=pg.cp.rank(), multiple=multiple)


def whole_packs(config: Config) -> PackFormat:
    """The format of this run's packs, without what depends on the rank."""
    shared, context = config.shared_prompts, config.parallel.context
    return PackFormat(config.seq_length, shared, context, chosen_only=config.method.chosen_only)
