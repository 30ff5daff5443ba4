"""How many files and sockets a rank holds open at once, and the limit of that.

A gloo group is a full mesh: each of its n ranks keeps a socket to every other. NCCL's groups open theirs when they are
first used, to a few ranks each.
"""

import resource
import socket
from collections.abc import Sequence

import torch

from megatron_tgdpo.distributed.layout import ParallelLayout
from megatron_tgdpo.errors import UserError

# What gloo opens for a group besides its connections: a socket that listens, an epoll set, a pipe.
_FILES_OF_A_GLOO_GROUP = 4
# Weights and data, logs, a checkpoint's files, threads' pipes; on a GPU also the driver's, and NCCL's own connections.
_OTHER_FILES = {"cpu": 128, "cuda": 512}
# Two connections of each rank to the store, which rank 0 may keep.
_STORE_CONNECTIONS = 2


def mcore_group_sizes(layout: ParallelLayout) -> list[int]:
    """Ranks in each process group of megatron-core that one rank is in; of a first or last pipeline stage, which is in
    the most."""
    tensor, pipeline, context, data = layout.tensor, layout.pipeline, layout.context, layout.data
    of_data = [data * context, data, data * tensor, data * context * tensor, layout.world_size]
    of_models = [context, context * tensor, tensor, pipeline, tensor * pipeline]
    shards, expert = layout.expert_shards, layout.expert
    of_experts = [shards, expert, shards * expert, shards * expert * pipeline, layout.expert_data]
    of_ends = [min(pipeline, 2), 1]
    return [*of_data, *of_models, *of_experts, *of_ends]


def files_needed(layout: ParallelLayout, device: torch.device) -> int:
    """Files and sockets that the rank with the most of them holds open at once, about."""
    world = layout.world_size
    # Of checkpoints, and of preflight; on a CPU also the default group and megatron-core's, which on a GPU are NCCL's.
    gloo = [world, world]
    if device.type == "cpu":
        gloo += [world, *mcore_group_sizes(layout)]
    return _OTHER_FILES[device.type] + _STORE_CONNECTIONS * world + _open_by_gloo(gloo)


def _open_by_gloo(sizes: Sequence[int]) -> int:
    return sum(_FILES_OF_A_GLOO_GROUP + size - 1 for size in sizes)


def allow_open_files(needed: int) -> int:
    """Raises this process's limit of open files as far as it may itself, where it is lower than needed.

    Args:
        needed: From :func:`files_needed`.

    Returns:
        The limit that holds.

    Raises:
        UserError: Even the highest allowed is too low; names the machine.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY or soft >= needed:
        return soft
    if hard != resource.RLIM_INFINITY and hard < needed:
        raise UserError(
            f"{socket.gethostname()}: a rank of this layout opens about {needed:,} files and sockets, and the limit is "
            f"{hard:,}: raise the hard limit of open files (ulimit -Hn, LimitNOFILE of slurmd or the container)"
        )
    resource.setrlimit(resource.RLIMIT_NOFILE, (needed, hard))
    return needed
