"""Runs preflight on four ranks that believe to be two nodes, once well and once for each fault of one rank.

Usage: ``worker_preflight POLICY OUT``; leaves what each rank was told in OUT/rank-N.json.
"""

import errno
import json
import logging
import os
import sys
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from unittest import mock

import torch
import torch.distributed as dist

from megatron_tgdpo.config.loading import config_from_dict
from megatron_tgdpo.distributed.cpu_backend import enable_cpu_backend
from megatron_tgdpo.distributed.layout import init_model_parallel, make_layout
from megatron_tgdpo.distributed.ranks import connect_store, init_distributed, read_rank_environment
from megatron_tgdpo.errors import UserError
from megatron_tgdpo.models.hf_config import read_hf_config
from megatron_tgdpo.resilience import preflight as checks
from megatron_tgdpo.resilience import preflight_facts, preflight_network

CPU = torch.device("cpu")


def wrong_sum(tensor: torch.Tensor, group: dist.ProcessGroup) -> None:
    _all_reduce(tensor, group=group)
    tensor[5] += 1


_all_reduce = dist.all_reduce


def fault(name: str, rank: int) -> AbstractContextManager:
    """What goes wrong on this rank: everything on rank 2, the first of the second node, but "full-0" on rank 0."""
    if (name, rank) in (("full-0", 0), ("full-2", 2)):
        return mock.patch.object(
            checks.Path, "write_text", side_effect=OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        )
    if rank != 2 or name in ("none", "full-0"):
        return nullcontext()
    if name == "version":
        return mock.patch.object(preflight_facts, "package_versions", return_value={"torch": "0.4"})
    if name == "blind":
        return mock.patch.object(checks, "_reads", return_value=False)
    if name == "disk":
        return mock.patch.object(checks.Path, "write_text", return_value=0)
    return mock.patch.object(preflight_network.dist, "all_reduce", wrong_sum)


def main() -> None:
    policy, out = sys.argv[1], Path(sys.argv[2])
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    ranks = read_rank_environment()
    os.environ["SLURMD_NODENAME"] = f"node{ranks.rank // 2}"
    enable_cpu_backend()
    init_distributed(ranks, CPU, 1, connect_store(ranks))
    layout = make_layout(2, 1, 1, False, ranks.world_size, expert=2)
    pg = init_model_parallel(layout, seed=0, timeout_minutes=15)
    told = {}
    for name in ("none", "version", "blind", "disk", "full-0", "full-2", "sum"):
        (out / name).mkdir(exist_ok=True)
        config = config_from_dict(
            {
                "model": {"policy": policy},
                "data": {"train": "pairs"},
                "loss": {"method": "dpo"},
                "batch": {"global_pairs": 1},
                "optimizer": {"lr": 1e-6},
                "train": {"steps": 1},
                "output_dir": str(out / name),
            }
        )
        dist.barrier()
        try:
            with fault(name, ranks.rank):
                checks.preflight(config, read_hf_config(Path(policy)), ranks, layout, pg, CPU)
            told[name] = "fine"
        except UserError as error:
            told[name] = str(error)
    (out / f"rank-{ranks.rank}.json").write_text(json.dumps(told))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
