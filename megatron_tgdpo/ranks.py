"""The ranks before any layout: who am I (torchrun or srun), where to meet, and how to fail together."""

import json
import os
import socket
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar, cast

import torch
import torch.distributed as dist

from megatron_tgdpo.errors import AgreedError, AgreedStorageError, StorageError, UserError
from megatron_tgdpo.stopping import StoppedEarly

T = TypeVar("T")

# What ends a run other than bad input, by its name in the store: the exception of the rank that has it, and of others.
_KINDS: dict[str, tuple[type[Exception], type[Exception]]] = {
    "stopped": (StoppedEarly, StoppedEarly),
    "storage": (StorageError, AgreedStorageError),
}


@dataclass(frozen=True)
class RankEnvironment:
    """This process's place among all, as the launcher tells it."""

    rank: int
    world_size: int
    local_rank: int
    master_addr: str | None
    master_port: int | None


def read_rank_environment(env: Mapping[str, str] | None = None) -> RankEnvironment:
    """Reads RANK, WORLD_SIZE and LOCAL_RANK from torchrun, or their srun equivalents; alone when there is neither.

    Args:
        env: The environment to read; ``os.environ`` by default.

    Raises:
        UserError: A multi-process launch does not say where to meet (MASTER_ADDR, MASTER_PORT).
    """
    env = os.environ if env is None else env
    if "RANK" in env and "WORLD_SIZE" in env:
        rank, world, local = int(env["RANK"]), int(env["WORLD_SIZE"]), int(env.get("LOCAL_RANK", env["RANK"]))
    elif "SLURM_PROCID" in env and "SLURM_STEP_ID" in env and env.get("SLURM_NTASKS"):
        rank, world, local = int(env["SLURM_PROCID"]), int(env["SLURM_NTASKS"]), int(env["SLURM_LOCALID"])
    else:
        return RankEnvironment(0, 1, 0, None, None)
    addr, port = env.get("MASTER_ADDR"), env.get("MASTER_PORT")
    if world > 1 and not addr and env.get("SLURM_NNODES") == "1":
        addr, port = "127.0.0.1", str(20000 + int(env.get("SLURM_JOB_ID", "0")) % 20000)
    if world > 1 and not (addr and port):
        raise UserError(f"{world} ranks but MASTER_ADDR or MASTER_PORT is not set: export both before srun")
    return RankEnvironment(rank, world, local, addr, int(port) if port else None)


def connect_store(ranks: RankEnvironment) -> dist.Store:
    """Joins all ranks in a key-value store, where they can talk before any process group and its time-out exist."""
    if ranks.world_size == 1:
        return dist.HashStore()
    # torchrun's agent already serves a store; env:// finds it.
    elastic = "TORCHELASTIC_RUN_ID" in os.environ
    url = "env://" if elastic else f"tcp://{ranks.master_addr}:{ranks.master_port}"
    store, _, _ = next(dist.rendezvous(url, ranks.rank, ranks.world_size))
    return store


def on_first_rank(action: Callable[[], str], store: dist.Store, rank: int) -> str:
    """Runs a long action on rank 0 while the others wait for it, however long it takes.

    Args:
        action: Returns what all ranks are to know.
        store: From :func:`connect_store`; the key ``first_rank`` must be unused.
        rank: This process's rank.

    Raises:
        AgreedError: On the other ranks, with rank 0's message, if the action failed there in any way; a storage failure
            is an AgreedStorageError.
        StoppedEarly: On all ranks, if it ended so.
    """
    if rank == 0:
        try:
            answer = action()
        except BaseException as error:
            kind = next((kind for kind, (caught, _) in _KINDS.items() if isinstance(error, caught)), "error")
            store.set("first_rank", json.dumps({kind: str(error) or type(error).__name__}))
            raise
        store.set("first_rank", json.dumps({"answer": answer}))
        return answer
    store.wait(["first_rank"], timedelta(days=30))
    reply = json.loads(store.get("first_rank"))
    for kind, (_, raised) in _KINDS.items():
        if kind in reply:
            raise raised(reply[kind])
    if "error" in reply:
        raise AgreedError(reply["error"])
    return reply["answer"]


def agree(action: Callable[[], T], group: dist.ProcessGroup | None = None) -> T:
    """Runs an action without collectives on every rank; if it fails on any, all raise the first rank's error.

    Args:
        action: Runs on this rank.
        group: Of all ranks; None for the default group.

    Raises:
        AgreedError: The action raised a UserError on some rank; the message names the rank if that is not rank 0. Of a
            StorageError it is an AgreedStorageError.
    """
    result, failure = None, None
    try:
        result = action()
    except UserError as error:
        failure = str(error), AgreedStorageError if isinstance(error, StorageError) else AgreedError
    failures: list[tuple[str, type[AgreedError]] | None] = [None] * dist.get_world_size()
    dist.all_gather_object(failures, failure, group=group)
    for rank, found in enumerate(failures):
        if found is not None:
            text, kind = found
            raise kind(text if rank == 0 else f"rank {rank}: {text}")
    return cast(T, result)


def init_distributed(ranks: RankEnvironment, device: torch.device, timeout_minutes: float, store: dist.Store) -> None:
    """Joins all ranks in the default process group (gloo on CPU, NCCL plus gloo on GPU); a second call does nothing.

    Raises:
        UserError: There are fewer GPUs on this node than local ranks.
    """
    if dist.is_initialized():
        return
    backend = "gloo"
    if device.type == "cuda":
        if ranks.local_rank >= torch.cuda.device_count():
            raise UserError(
                f"rank {ranks.rank} on {socket.gethostname()} is local rank {ranks.local_rank} but only "
                f"{torch.cuda.device_count()} GPUs are visible: start one task per GPU"
            )
        torch.cuda.set_device(ranks.local_rank)
        backend = "cpu:gloo,cuda:nccl"
    dist.init_process_group(
        backend,
        store=dist.PrefixStore("default_group", store),
        rank=ranks.rank,
        world_size=ranks.world_size,
        timeout=timedelta(minutes=timeout_minutes),
    )
