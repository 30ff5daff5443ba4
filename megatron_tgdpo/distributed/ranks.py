"""The ranks before any layout: who am I (torchrun or srun), where to meet, and how to fail together."""

import json
import os
import socket
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist

from megatron_tgdpo.errors import AgreedError, AgreedStorageError, StorageError, UserError
from megatron_tgdpo.signals import StoppedEarly

T = TypeVar("T")

_FOR_EVER = timedelta(days=30)

# What ends a run, by its name in the store: the exception of the rank that has it, and of others. The first that fits.
_KINDS: dict[str, tuple[type[BaseException], type[Exception]]] = {
    "stopped": (StoppedEarly, StoppedEarly),
    "storage": (StorageError, AgreedStorageError),
    "error": (BaseException, AgreedError),
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
    result: dist.Store = store
    return result


def run_on_rank0(action: Callable[[], T], store: dist.Store, rank: int) -> T:
    """Runs a long action on rank 0 while the others wait for it, however long it takes.

    Args:
        action: Returns what all ranks are to know: a value of JSON, of lists and not tuples.
        store: From :func:`connect_store`; the key ``first_rank`` must be unused.
        rank: This process's rank.

    Returns:
        What the action returned; on every rank as JSON has it.

    Raises:
        AgreedError: On the other ranks, with rank 0's message, if the action failed there in any way; a storage failure
            is an AgreedStorageError.
        StoppedEarly: On all ranks, if it ended so.
    """
    if rank == 0:
        try:
            text = json.dumps({"answer": action()})
        except BaseException as error:
            store.set("first_rank", json.dumps(_reply_of(error)))
            raise
        store.set("first_rank", text)
    else:
        store.wait(["first_rank"], _FOR_EVER)
        text = store.get("first_rank").decode()
    reply = json.loads(text)
    _raise_failure(reply, 0)
    return cast(T, reply["answer"])


def run_on_all_ranks(action: Callable[[], T], store: dist.Store, ranks: RankEnvironment) -> list[T]:
    """Runs a long action on every rank, however long it takes on any, before any process group and its time-out exist.

    Args:
        action: Returns what the first rank is to know of this one: a value of JSON, of lists and not tuples.
        store: From :func:`connect_store`; the keys ``every_rank`` and ``rank_N`` must be unused.
        ranks: This process's place.

    Returns:
        On the first rank the answers of all, in their order, as JSON has them; on others an empty list, for what all
        ranks tell all grows with the square of their number, through one store.

    Raises:
        AgreedError: The action failed on some rank, in any way; the message names the rank if that is not rank 0. Of a
            storage failure it is an AgreedStorageError.
        StoppedEarly: The action ended so on some rank.
    """
    failure: Exception | None = None
    try:
        mine = json.dumps({"answer": action()})
    except Exception as error:
        failure, mine = error, json.dumps(_reply_of(error))
    # Through the first rank, so that each rank reads one key and not one of every other rank.
    replies: list[dict[str, Any]] = []
    if ranks.rank == 0:
        others = [f"rank_{rank}" for rank in range(1, ranks.world_size)]
        for key in others:
            store.wait([key], _FOR_EVER)
        replies = [json.loads(mine), *(json.loads(store.get(key)) for key in others)]
        failed = next(((rank, reply) for rank, reply in enumerate(replies) if "answer" not in reply), None)
        store.set("every_rank", json.dumps(failed))
    else:
        store.set(f"rank_{ranks.rank}", mine)
        store.wait(["every_rank"], _FOR_EVER)
        failed = json.loads(store.get("every_rank"))
    if failure is not None and not isinstance(failure, (UserError, StoppedEarly)):
        raise failure
    if failed is not None:
        _raise_failure(failed[1], failed[0])
    return [reply["answer"] for reply in replies]


def _reply_of(error: BaseException) -> dict[str, str]:
    """An error as other ranks are to know it: its message, by its kind."""
    kind = next(kind for kind, (caught, _) in _KINDS.items() if isinstance(error, caught))
    return {kind: str(error) or type(error).__name__}


def _raise_failure(reply: Mapping[str, str], rank: int) -> None:
    """Raises the error that a rank's reply tells of, if it does."""
    for kind, (_, raised) in _KINDS.items():
        if kind in reply:
            raise raised(reply[kind] if rank == 0 else f"rank {rank}: {reply[kind]}")


def raise_on_all_ranks(action: Callable[[], T], group: dist.ProcessGroup | None = None) -> T:
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
    """Joins all ranks in the default process group (gloo on CPU, NCCL on GPU); a second call does nothing.

    Groups that are made later have its backend unless they name another. With gloo beside NCCL each of them would be a
    full mesh of sockets that nothing uses.

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
        backend = "nccl"
    dist.init_process_group(
        backend,
        store=dist.PrefixStore("default_group", store),
        rank=ranks.rank,
        world_size=ranks.world_size,
        timeout=timedelta(minutes=timeout_minutes),
    )
