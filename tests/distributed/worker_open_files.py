"""Counts what process groups open. Usage: ``worker_open_files TP PP CP``; rank 0 prints what is and what should be."""

import os
import sys
from datetime import timedelta

import torch
import torch.distributed as dist

from megatron_tgdpo.distributed.cpu_backend import enable_cpu_backend
from megatron_tgdpo.distributed.layout import init_model_parallel, make_layout
from megatron_tgdpo.distributed.ranks import connect_store, init_distributed, read_rank_environment
from megatron_tgdpo.resilience.open_files import files_needed, mcore_group_sizes

CPU = torch.device("cpu")


def open_files() -> int:
    return len(os.listdir("/proc/self/fd"))


def main() -> None:
    ranks = read_rank_environment()
    layout = make_layout(*map(int, sys.argv[1:4]), False, ranks.world_size)
    enable_cpu_backend()
    init_distributed(ranks, CPU, 2, connect_store(ranks))
    before = open_files()
    init_model_parallel(layout, seed=0, timeout_minutes=2)
    opened = open_files() - before
    for _ in range(2):
        dist.new_group(backend="gloo", timeout=timedelta(minutes=2))
    dist.barrier()
    if ranks.rank == 0:
        sizes = mcore_group_sizes(layout)
        print(opened, sum(3 + size for size in sizes), len(sizes), open_files(), files_needed(layout, CPU))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
