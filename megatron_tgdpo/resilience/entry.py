"""What every command that runs on many ranks does at its start and at its end, so that none of them hangs."""

import contextlib
import faulthandler
import logging
import os
import sys
import threading
import time
import traceback
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, NoReturn

from megatron_tgdpo import console, signals
from megatron_tgdpo.errors import AgreedError, UserError, one_line
from megatron_tgdpo.resilience.launch import report, start_ranks
from megatron_tgdpo.resilience.requeue import exit_status

if TYPE_CHECKING:
    import torch.distributed as dist

    from megatron_tgdpo.distributed.ranks import RankEnvironment

_LAST_WORDS_SECONDS = 1


def run_and_exit(action: Callable[[int], int], nproc: int | None = None) -> NoReturn:
    """Runs a command on this rank and leaves with its exit status.

    Exit status: what ``action`` returns, or 1 for bad input (one line says which), 74 for storage that failed, 76 for a
    node that preflight named, 75 where a signal asked to stop, 70 for any other failure (with its traceback).

    Args:
        action: Takes this process's rank; returns the exit status.
        nproc: Ranks to start for it on this machine, see :func:`~megatron_tgdpo.resilience.launch.start_ranks`.
    """
    rank = int(os.environ.get("RANK") or os.environ.get("SLURM_PROCID") or 0)
    faulthandler.enable()
    threading.excepthook = partial(_report_thread, rank)
    level = logging.INFO if rank == 0 else logging.ERROR
    console.configure(level, "%(asctime)s %(message)s")
    try:
        start_ranks(nproc)
        sys.exit(action(rank))
    except SystemExit:
        raise
    except BaseException as error:
        report_failure(error, rank)
        if isinstance(error, (UserError, signals.StoppedEarly)) and rank == 0:
            # It may keep the store from which the others learn the same.
            time.sleep(_LAST_WORDS_SECONDS)
        # At once: destructors of process groups may wait for ranks that will never come.
        os._exit(exit_status(error))


def run_distributed(timeout_minutes: float, action: Callable[["RankEnvironment", "dist.Store"], int]) -> int:
    """Joins the ranks in a store and watches over them while they run an action that joins them in process groups.

    Args:
        timeout_minutes: ``parallel.timeout_minutes``.
        action: Every rank's work; returns the exit status.
    """
    import torch.distributed as dist

    from megatron_tgdpo.distributed.ranks import connect_store, read_rank_environment
    from megatron_tgdpo.resilience.heartbeat import Heartbeat

    ranks = read_rank_environment()
    store = connect_store(ranks)
    heartbeat = Heartbeat(ranks, store, timeout_minutes)
    status = action(ranks, store)
    heartbeat.stop()
    # Rank 0 may keep the store: it must not leave while another's heartbeat still beats.
    dist.barrier()
    dist.destroy_process_group()
    return status


def report_failure(error: BaseException, rank: int) -> None:
    """Says on stderr, and to the launcher, what ends this rank; what all ranks know, rank 0 says."""
    if isinstance(error, UserError):
        if rank == 0 or (_joined() and not isinstance(error, AgreedError)):
            signals.last_words(f"error: {error}" if rank == 0 else f"error: rank {rank}: {error}")
            report(str(error))
    elif isinstance(error, (signals.StoppedEarly, KeyboardInterrupt)):
        if rank == 0:
            what = str(error) or "interrupted"
            signals.last_words(f"{what}; start the same command again to continue")
    else:
        lines = traceback.format_exc().splitlines()
        signals.last_words(*(f"[rank {rank}] {line}" for line in lines))
        report(one_line(error, named=True))
    with contextlib.suppress(OSError):
        sys.stdout.flush()


def _report_thread(rank: int, ended: threading.ExceptHookArgs) -> None:
    """One line for a library's thread that storage ended: who waits for it sees the same error."""
    if isinstance(ended.exc_value, OSError):
        name = ended.thread.name if ended.thread is not None else "a thread"
        signals.last_words(f"[rank {rank}] {name}: {ended.exc_value}")
    else:
        threading.__excepthook__(ended)


def _joined() -> bool:
    """Whether ranks may differ by now; before they are joined, all of them read the same and fail alike."""
    # Not imported here: a command that was refused before has joined nobody.
    dist = sys.modules.get("torch.distributed")
    return dist is not None and dist.is_initialized()
