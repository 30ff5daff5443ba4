"""The parallel layout of a run, and the format of its packs under it."""

import math
from dataclasses import replace

from megatron.core.process_groups_config import ProcessGroupCollection

from megatron_tgdpo.batching.packed_sequence import PackFormat
from megatron_tgdpo.config.schema import Config, ParallelConfig
from megatron_tgdpo.distributed.layout import ParallelLayout, make_layout


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


def pack_format(config: Config, pg: ProcessGroupCollection) -> PackFormat:
    """The format of this run's packs on this rank."""
    # Divisible by what splits a pack, and by what matrix units like or, in FP8, insist on.
    multiple = math.lcm(64, 2 * pg.cp.size() * pg.tp.size(), config.seq_length_multiple) if pg.pp.size() == 1 else None
    return replace(whole_packs(config), context_rank=pg.cp.rank(), multiple=multiple)


def whole_packs(config: Config) -> PackFormat:
    """The format of this run's packs, without what depends on the rank."""
    shared, context = config.shared_prompts, config.parallel.context
    return PackFormat(config.seq_length, shared, context, chosen_only=config.method.chosen_only)
