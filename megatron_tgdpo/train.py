"""``python -m megatron_tgdpo.train CONFIG.yaml section.key=value ...``, a process per rank, under torchrun or srun.

USR1 or TERM to any rank ends the run at the next step boundary, with a checkpoint.
"""

import argparse
import faulthandler
import logging
import os
import sys
import time
import traceback
import warnings
from collections.abc import Sequence

from megatron_tgdpo import stopping
from megatron_tgdpo.config import load_config
from megatron_tgdpo.errors import AgreedError, BadNodeError, UserError

_LAST_WORDS_SECONDS = 1


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line; see the module.

    Exit status: 0 all steps are made (up to ``train.exit_step``), 75 stopped by a signal and saved, 1 bad input (one
    line says which), 76 a node that preflight named, 70 any other failure (with its traceback).
    """
    stopping.listen()
    parser = argparse.ArgumentParser(prog="python -m megatron_tgdpo.train", description=__doc__)
    parser.add_argument("config", help="YAML file")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    parser.add_argument("--dry-run", action="store_true", help="print config, rank grid and memory per rank, then stop")
    parser.add_argument("--world-size", type=int, help="ranks to assume in a dry run; default: as launched")
    args = parser.parse_intermixed_args(arguments)
    rank = int(os.environ.get("RANK") or os.environ.get("SLURM_PROCID") or 0)
    faulthandler.enable()
    level = logging.INFO if rank == 0 else logging.ERROR
    logging.basicConfig(level=level, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    logging.getLogger("megatron").setLevel(logging.WARNING)
    # megatron-core and torch warn on every rank about missing fused parts, which the start-up lines report once.
    warnings.filterwarnings("ignore")
    try:
        sys.exit(_main(args, rank))
    except SystemExit:
        raise
    except BaseException as error:
        _report(error, rank)
        if isinstance(error, UserError) and rank == 0:
            # It may keep the store from which the others learn the same.
            time.sleep(_LAST_WORDS_SECONDS)
        # At once: destructors of process groups may wait for ranks that will never come.
        os._exit(_status(error))


def _main(args: argparse.Namespace, rank: int) -> int:
    config = load_config(args.config, args.overrides)
    # Only now: these imports take seconds, a wrong key should not.
    import torch.distributed as dist

    from megatron_tgdpo.heartbeat import Heartbeat
    from megatron_tgdpo.ranks import connect_store, read_rank_environment
    from megatron_tgdpo.run import dry_run, run

    ranks = read_rank_environment()
    if args.dry_run:
        if rank == 0:
            print(dry_run(config, args.world_size or ranks.world_size))
        return 0
    store = connect_store(ranks)
    heartbeat = Heartbeat(ranks, store, config.parallel.timeout_minutes)
    status = 0
    try:
        run(config, ranks, store)
    except stopping.StoppedEarly as stopped:
        logging.info("%s; start the same command again to continue", stopped)
        status = stopping.STOPPED_STATUS
    heartbeat.stop()
    # Rank 0 may keep the store: it must not leave while another's heartbeat still beats.
    dist.barrier()
    dist.destroy_process_group()
    return status


def _status(error: BaseException) -> int:
    if isinstance(error, BadNodeError):
        return stopping.BAD_NODE_STATUS
    return 1 if isinstance(error, UserError) else stopping.FAILED_STATUS


def _report(error: BaseException, rank: int) -> None:
    if isinstance(error, UserError):
        if rank == 0:
            print(f"error: {error}", file=sys.stderr)
        elif _joined() and not isinstance(error, AgreedError):
            print(f"error: rank {rank}: {error}", file=sys.stderr)
    else:
        lines = traceback.format_exc().splitlines()
        print("\n".join(f"[rank {rank}] {line}" for line in lines), file=sys.stderr)
    sys.stdout.flush()
    sys.stderr.flush()


def _joined() -> bool:
    """Whether ranks may differ by now; before they are joined, all of them read the same and fail alike."""
    import torch.distributed as dist

    return dist.is_initialized()


if __name__ == "__main__":
    main()
