"""What ranks cost before and beside training: meeting in the store, telling one another, heartbeats, the first group.

    python -m tools.benchmarks.control_plane --processes 64

Forked processes that do nothing else run the project's own functions over one TCP store, as many ranks as asked for and
a quarter and half as many; seconds until the last has done, and what the store was asked for: requests and bytes of
values, over all ranks. ``all to all`` is a step in which every rank is told every other's answer; the project has none,
and it stands beside to show what grows with the square of the ranks.
"""

import argparse
import json
import multiprocessing
import socket
import time
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.queues import Queue
from typing import Any, cast

import torch
import torch.distributed as dist

from megatron_tgdpo.distributed.ranks import (
    RankEnvironment,
    init_distributed,
    raise_on_all_ranks,
    run_on_all_ranks,
    run_on_rank0,
)
from megatron_tgdpo.resilience.heartbeat import Heartbeat
from tools.benchmarks.training_step.table import aligned

_PATIENCE = timedelta(minutes=5)
# Of an answer: as a rank's facts, or its share of hashes.
_ANSWER = "x" * 500
_BEATS = 20


class _Counted:
    """A store that counts what it is asked for, as far as the project asks."""

    def __init__(self, store: dist.Store) -> None:
        self._store, self.requests, self.bytes = store, 0, 0

    def set(self, key: str, value: str) -> None:
        self.requests, self.bytes = self.requests + 1, self.bytes + len(value)
        self._store.set(key, value)

    def get(self, key: str) -> bytes:
        value: bytes = self._store.get(key)
        self.requests, self.bytes = self.requests + 1, self.bytes + len(value)
        return value

    def wait(self, keys: list[str], patience: timedelta) -> None:
        self.requests += 1
        self._store.wait(keys, patience)


def _all_to_all(store: dist.Store, ranks: RankEnvironment) -> None:
    store.set(f"rank_{ranks.rank}", json.dumps(_ANSWER))
    for rank in range(ranks.world_size):
        store.wait([f"rank_{rank}"], _PATIENCE)
        store.get(f"rank_{rank}")


def _beats(heartbeat: Heartbeat) -> None:
    for _ in range(_BEATS):
        heartbeat._exchange()


def _rank(ranks: RankEnvironment, report: "Queue[Any]") -> None:
    """One rank: each part after a barrier; reports seconds, requests and bytes of each."""
    torch.set_num_threads(1)
    found: dict[str, tuple[float, int, int]] = {}
    began = time.perf_counter()
    assert ranks.master_addr is not None
    assert ranks.master_port is not None
    store = dist.TCPStore(ranks.master_addr, ranks.master_port, ranks.world_size, ranks.rank == 0, timeout=_PATIENCE)
    found["connecting"] = time.perf_counter() - began, 0, 0

    def measure(name: str, part: Callable[[dist.Store], object]) -> None:
        _barrier(store, name, ranks)
        counted = _Counted(dist.PrefixStore(name, store))
        began = time.perf_counter()
        part(cast(dist.Store, counted))
        found[name] = time.perf_counter() - began, counted.requests, counted.bytes

    measure("rank 0 tells all", lambda store: run_on_rank0(lambda: _ANSWER, store, ranks.rank))
    measure("all tell rank 0", lambda store: run_on_all_ranks(lambda: _ANSWER, store, ranks))
    measure("all to all", lambda store: _all_to_all(store, ranks))
    # Its own beats, every few seconds, are few beside those that are asked for here.
    heartbeat = Heartbeat(ranks, store, 5.0)
    _barrier(store, "beating", ranks)
    began = time.perf_counter()
    _beats(heartbeat)
    found[f"{_BEATS} heartbeats"] = time.perf_counter() - began, 2 * _BEATS, 0
    measure("first group (gloo)", lambda _: init_distributed(ranks, torch.device("cpu"), 5.0, store))
    measure("agreeing that nothing failed", lambda _: raise_on_all_ranks(lambda: None))
    report.put(found)
    _barrier(store, "end", ranks)
    heartbeat.stop()
    dist.destroy_process_group()
    _barrier(store, "gone", ranks, last=ranks.rank == 0)


def _barrier(store: dist.Store, name: str, ranks: RankEnvironment, last: bool = True) -> None:
    """Waits for all ranks to come; without ``last`` only says that this one has."""
    if store.add(f"come_{name}", 1) == ranks.world_size:
        store.set(f"all_{name}", "1")
    if last:
        store.wait([f"all_{name}"], _PATIENCE)


def measure(processes: int) -> dict[str, tuple[float, int, int]]:
    """Seconds of the slowest rank, requests and bytes of all, by part."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = multiprocessing.get_context("fork")
    report: Queue[Any] = context.Queue()
    places = [RankEnvironment(rank, processes, rank, "127.0.0.1", port) for rank in range(processes)]
    ranks = [context.Process(target=_rank, args=(place, report)) for place in places]
    for each in ranks:
        each.start()
    try:
        found = [report.get(timeout=_PATIENCE.total_seconds()) for _ in ranks]
        for each in ranks:
            each.join(_PATIENCE.total_seconds())
    finally:
        for each in ranks:
            each.kill()
    return {
        part: (max(each[part][0] for each in found), *(sum(each[part][at] for each in found) for at in (1, 2)))
        for part in found[0]
    }


def main() -> None:
    """Prints a line for each part."""
    parser = argparse.ArgumentParser(prog="python -m tools.benchmarks.control_plane")
    parser.add_argument("--processes", type=int, default=64)
    options = parser.parse_args()
    sizes = [max(2, options.processes // 4), max(2, options.processes // 2), options.processes]
    by_size = {size: measure(size) for size in sizes}
    rows = []
    for part in by_size[sizes[-1]]:
        cells = [f"{by_size[size][part][0]:.3f}" for size in sizes]
        cells += [f"{by_size[size][part][1]:,}" for size in sizes] + [f"{by_size[size][part][2]:,}" for size in sizes]
        rows.append([part, *cells])
    head = [f"{what} {size}" for what in ("s", "requests", "bytes") for size in sizes]
    print(aligned(["part, by ranks", *head], rows))


if __name__ == "__main__":
    main()
