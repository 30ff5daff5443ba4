"""``tgdpo train CONFIG.yaml [--nproc N] section.key=value ...``, a process per rank; or under torchrun or srun.

USR1, TERM or Ctrl-C to any rank ends the run at the next step boundary, with a checkpoint; a second Ctrl-C at once.
"""

import argparse
import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING

from megatron_tgdpo import signals
from megatron_tgdpo.errors import UserError
from megatron_tgdpo.resilience.entry import run_and_exit, run_distributed
from megatron_tgdpo.resilience.launch import nproc_argument

if TYPE_CHECKING:
    from megatron_tgdpo.training.export import Exporter

logger = logging.getLogger(__name__)


def main(arguments: Sequence[str] | None = None, exporter: "Exporter | None" = None) -> None:
    """Command line; see the module.

    Args:
        arguments: None means this process's.
        exporter: Does what ``export.hf`` asks for; None refuses that key.

    Exit status: 0 all steps are made (up to ``train.exit_step``), 75 stopped by a signal and saved, 130 ended at once
    by a second Ctrl-C, else as :func:`~megatron_tgdpo.resilience.entry.run_and_exit` says.
    """
    parser = argparse.ArgumentParser(prog="tgdpo train", description=__doc__)
    parser.add_argument("config", help="YAML file")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    parser.add_argument("--guide", action="store_true", help="train what section guide of the config says")
    parser.add_argument(
        "--dry-run", action="store_true", help="print what the run takes, and whether it fits, then stop"
    )
    parser.add_argument("--world-size", type=int, help="GPUs to assume in a dry run; default: what is here")
    parser.add_argument("--gpu-memory-gib", type=float, help="of a dry run's GPUs; default 80")
    parser.add_argument("--full-config", action="store_true", help="a dry run prints every key, not only what you set")
    nproc_argument(parser)
    args = parser.parse_intermixed_args(arguments)
    run_and_exit(lambda rank: _main(args, rank, exporter), None if args.dry_run else args.nproc)


def _main(args: argparse.Namespace, rank: int, exporter: "Exporter | None") -> int:
    signals.listen()
    if args.world_size is not None and args.world_size < 1:
        raise UserError(f"--world-size is {args.world_size}: it must be positive")
    if args.gpu_memory_gib is not None and not 0 < args.gpu_memory_gib < 1e9:
        raise UserError(f"--gpu-memory-gib is {args.gpu_memory_gib:g}: it must be positive")
    # Only now: a wrong option should not take the seconds of an import, nor a wrong key those of the next.
    from megatron_tgdpo.config.loading import load_config

    config = load_config(args.config, args.overrides)
    if args.guide:
        from megatron_tgdpo.config.guide import guide_config

        config = guide_config(config, args.config)
    from megatron_tgdpo.setup.trained_guide import check_finished

    if not args.dry_run:
        check_finished(config, [args.config, *args.overrides])
    import torch.distributed as dist

    from megatron_tgdpo.distributed.cpu_backend import resolve_device
    from megatron_tgdpo.distributed.ranks import read_rank_environment
    from megatron_tgdpo.training.export import run_export_command
    from megatron_tgdpo.training.run import dry_run, run

    if args.dry_run:
        if rank != 0:
            return 0
        world_size = args.world_size or args.nproc or read_rank_environment().world_size
        elsewhere = args.world_size is not None or args.gpu_memory_gib is not None
        text, fits = dry_run(
            config,
            world_size,
            args.gpu_memory_gib,
            full=args.full_config,
            on_cpu=not elsewhere and resolve_device(config.parallel.device).type == "cpu",
        )
        print(text)
        return 0 if fits else 1
    if config.export.hf != "none" and exporter is None:
        raise UserError(f"export.hf is {config.export.hf}: only tgdpo train exports, start the run with that")

    def train(ranks, store) -> int:  # type: ignore[no-untyped-def]
        try:
            run(config, ranks, store, exporter, [args.config, *args.overrides] if args.guide else None)
        except signals.StoppedEarly as stopped:
            if not dist.is_initialized():
                raise
            logger.info("%s; start the same command again to continue", stopped)
            if config.export.hf != "none":
                command = run_export_command(config.output_dir, config.export_kind)
                logger.info("what is saved can be exported: %s", command)
            return signals.STOPPED_STATUS
        return 0

    return run_distributed(config.parallel.timeout_minutes, train)


if __name__ == "__main__":
    main()
