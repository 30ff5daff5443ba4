"""Ranks joined in a parallel layout, for a command that runs the model."""

import argparse
from dataclasses import dataclass

import torch
import torch.distributed as dist
from megatron.core.process_groups_config import ProcessGroupCollection

from megatron_tgdpo.distributed.cpu_backend import enable_cpu_backend, resolve_device
from megatron_tgdpo.distributed.layout import ParallelLayout, init_model_parallel, make_layout
from megatron_tgdpo.distributed.ranks import connect_store, init_distributed, read_rank_environment


@dataclass(frozen=True)
class Session:
    """A joined grid of ranks."""

    layout: ParallelLayout
    pg: ProcessGroupCollection
    device: torch.device

    @property
    def is_first(self) -> bool:
        """Whether this is rank 0, which prints."""
        return dist.get_rank() == 0


def open_session(arguments: argparse.Namespace, *, sequence_parallel: bool = False) -> Session:
    """Joins all ranks (one if not launched by torchrun or srun) in the layout that the options ask for.

    Args:
        arguments: The options.
        sequence_parallel: Whether tensor ranks share the sequence too, as experts need it.

    Raises:
        UserError: The layout does not fit the number of ranks, or the device is not usable.
    """
    ranks = read_rank_environment()
    pipeline = arguments.pipeline or max(1, ranks.world_size // arguments.tensor)
    layout = make_layout(arguments.tensor, pipeline, 1, sequence_parallel, ranks.world_size)
    device = resolve_device(arguments.device)
    if device.type == "cpu":
        enable_cpu_backend()
    init_distributed(ranks, device, arguments.timeout_minutes, connect_store(ranks))
    pg = init_model_parallel(layout, seed=0, timeout_minutes=arguments.timeout_minutes)
    return Session(layout, pg, device)
