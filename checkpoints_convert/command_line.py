"""What the commands share: ranks, dtypes, and errors as one line."""

import argparse
import logging
import re
import sys
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist

from megatron_tgdpo.checkpoints.directory import newest_checkpoint
from megatron_tgdpo.checkpoints.manifest import check_files
from megatron_tgdpo.checkpoints.model_directory import is_megatron_checkpoint
from megatron_tgdpo.distributed.ranks import connect_store, init_distributed, read_rank_environment
from megatron_tgdpo.errors import StorageError, UserError
from megatron_tgdpo.signals import STORAGE_STATUS
from megatron_tgdpo.storage.dtypes import DTYPES

_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([KMGT]?)(i?)B", re.IGNORECASE)


def parse_size(option: str, text: str) -> int:
    """Bytes of a size such as ``500MB`` (10^6) or ``2GiB`` (2^30).

    Raises:
        UserError: It is not one, or less than a byte.
    """
    match = _SIZE.fullmatch(text.strip())
    size = 0
    if match:
        base = 1024 if match[3] else 1000
        size = int(float(match[1]) * base ** " KMGT".index(match[2].upper() or " "))
    if size < 1:
        raise UserError(f"{option} {text!r}: not a size, give a number and a unit such as 500MB, 5GB or 2GiB")
    return size


def timeout_argument(parser: argparse.ArgumentParser) -> None:
    """Adds the option that says how long ranks wait for each other."""
    parser.add_argument("--timeout-minutes", type=float, default=30.0, help="for a rank that does not answer")


def join_ranks(timeout_minutes: float) -> None:
    """Joins all ranks (one if not launched by torchrun or srun) on the CPU, GPU or not."""
    ranks = read_rank_environment()
    init_distributed(ranks, torch.device("cpu"), timeout_minutes, connect_store(ranks))


def find_checkpoint(path: Path) -> Path:
    """The checkpoint itself, or the newest complete one of a training output directory.

    Raises:
        UserError: There is none, or it is damaged.
        StorageError: It cannot be read.
    """
    if is_megatron_checkpoint(path):
        check_files(path)
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
    """Runs a command; bad input ends it with one line on stderr and exit code 1, failing storage with 74."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    try:
        main()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(STORAGE_STATUS if isinstance(error, StorageError) else 1)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
