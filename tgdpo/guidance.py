"""Computes the token log-probs of reference and guide once, for ``guidance.mode: cached``.

    tgdpo guidance CONFIG.yaml --nproc 8 guidance.cache=DIR [section.key=value ...]
    tgdpo guidance CONFIG.yaml guidance.cache=DIR --verify 100

CONFIG is that of the training. Only ``precision.dtype``, the data and the models must stay as they are for the training
that uses the cache: layout and ``batch.tokens_per_micro_batch`` may be others (forward passes need little memory, so
larger packs and fewer ranks per model pay). Data-parallel replicas share the work. An interrupted computation continues
where it stopped; complete shards are never computed again. ``--verify`` instead computes some pairs of a complete cache
again and compares.
"""

import argparse
import logging
import shlex
from collections.abc import Sequence

from megatron_tgdpo.errors import UserError
from megatron_tgdpo.resilience.entry import run_and_exit, run_distributed
from megatron_tgdpo.resilience.launch import nproc_argument

logger = logging.getLogger(__name__)


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line; see the module. Exit status as :func:`~megatron_tgdpo.resilience.entry.run_and_exit` says."""
    parser = argparse.ArgumentParser(
        prog="tgdpo guidance",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("config", help="YAML file of the training")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    parser.add_argument("--block-pairs", type=int, default=1024, help="pairs of a shard; default %(default)s")
    parser.add_argument("--verify", type=int, metavar="PAIRS", help="compute so many pairs again and compare")
    nproc_argument(parser)
    args = parser.parse_intermixed_args(arguments)
    run_and_exit(lambda rank: _main(args), args.nproc)


def _main(args: argparse.Namespace) -> int:
    for name, value in (("--block-pairs", args.block_pairs), ("--verify", args.verify)):
        if value is not None and value < 1:
            raise UserError(f"{name} is {value}: it must be positive")
    # Only now: a wrong option should not take the seconds of an import, nor a wrong key those of the next.
    from megatron_tgdpo.config.loading import load_config

    config = load_config(args.config, args.overrides)
    if config.guidance.cache is None:
        raise UserError(f"{args.config}: guidance.cache is not set: name the directory to write to")
    if not config.method.frozen:
        raise UserError(f"{args.config}: loss.method {config.loss.method} has no frozen models to compute")
    from megatron_tgdpo.setup.trained_guide import check_finished

    check_finished(config, [args.config, *args.overrides])
    from megatron_tgdpo.guidance.precompute import precompute_guidance, verify_guidance

    def work(ranks, store) -> int:  # type: ignore[no-untyped-def]
        if args.verify is None:
            precompute_guidance(config, args.block_pairs, ranks, store)
            cached = [] if config.guidance.mode == "cached" else ["guidance.mode=cached"]
            if ranks.rank == 0:
                logger.info("train with it: %s", shlex.join(["tgdpo", "train", args.config, *args.overrides, *cached]))
        else:
            verify_guidance(config, args.verify, ranks, store)
        return 0

    return run_distributed(config.parallel.timeout_minutes, work)


if __name__ == "__main__":
    main()
