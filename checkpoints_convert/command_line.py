"""What the three commands share: ranks, layout, dtypes, and errors as one line."""

import argparse
import logging
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from megatron.core.process_groups_config import ProcessGroupCollection

from megatron_tgdpo.checkpoint_format import is_megatron_checkpoint, newest_checkpoint, read_metadata
from megatron_tgdpo.cpu_backend import enable_cpu_backend, resolve_device
from megatron_tgdpo.errors import UserError
from megatron_tgdpo.parallel import ParallelLayout, init_model_parallel, make_layout
from megatron_tgdpo.ranks import connect_store, init_distributed, read_rank_environment

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


@dataclass(frozen=True)
class Session:
    """A joined grid of ranks."""

    layout: ParallelLayout
    pg: ProcessGroupCollection
    device: torch.device

    @property
    def is_first(self) -> bool:
        """Whether this is rank 0, which prints."""
        return dist.get_rank() == 0


def layout_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options that say how the ranks are used."""
    parser.add_argument("--tensor", type=int, default=1, help="tensor-parallel size (default 1)")
    parser.add_argument("--pipeline", type=int, help="pipeline-parallel size (default: all ranks / --tensor)")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--timeout-minutes", type=float, default=30.0, help="for a rank that does not answer")


def open_session(arguments: argparse.Namespace) -> Session:
    """Joins all ranks (one if not launched by torchrun or srun) in the layout that the options ask for.

    Raises:
        UserError: The layout does not fit the number of ranks, or the device is not usable.
    """
    ranks = read_rank_environment()
    pipeline = arguments.pipeline or max(1, ranks.world_size // arguments.tensor)
    layout = make_layout(arguments.tensor, pipeline, 1, False, ranks.world_size)
    device = resolve_device(arguments.device)
    if device.type == "cpu":
        enable_cpu_backend()
    init_distributed(ranks, device, arguments.timeout_minutes, connect_store(ranks))
    pg = init_model_parallel(layout, seed=0, timeout_minutes=arguments.timeout_minutes)
    return Session(layout, pg, device)


def find_checkpoint(path: Path) -> Path:
    """The checkpoint itself, or the newest complete one of a training output directory.

    Raises:
        UserError: There is none.
    """
    if is_megatron_checkpoint(path):
        read_metadata(path)
        return path
    newest = newest_checkpoint(path)
    if newest is None:
        raise UserError(f"{path}: neither a Megatron checkpoint nor a training output directory with a complete one")
    return newest


def dtype_of(metadata: dict, path: Path) -> torch.dtype:
    """The dtype that a checkpoint's metadata names.

    Raises:
        UserError: It names none, or an unknown one.
    """
    if metadata.get("dtype") not in DTYPES:
        raise UserError(f"{path}: its metadata says dtype {metadata.get('dtype')!r}, known are {', '.join(DTYPES)}")
    return DTYPES[metadata["dtype"]]


def run(main: Callable[[], None]) -> None:
    """Runs a command; bad input ends it with one line on stderr and exit code 1."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    try:
        main()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
