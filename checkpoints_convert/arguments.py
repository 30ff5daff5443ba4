"""What the commands' command lines share; imports nothing heavy, so that help and wrong options answer at once."""

import argparse
import os
import re
import sys
from collections.abc import Callable

from megatron_tgdpo import console
from megatron_tgdpo.errors import StorageError, UserError
from megatron_tgdpo.resilience.entry import report_failure
from megatron_tgdpo.signals import STORAGE_STATUS

DTYPE_NAMES = ("bf16", "fp16", "fp32")
DEFAULT_SHARD_SIZE = "5GB"  # of weight files

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


def layout_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options that say how the ranks of a command that runs the model are used."""
    parser.add_argument("--tensor", type=int, default=1, help="tensor-parallel size (default 1)")
    parser.add_argument("--pipeline", type=int, help="pipeline-parallel size (default: all ranks / --tensor)")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    timeout_argument(parser)


def check_positive(given: argparse.Namespace, *options: str) -> None:
    """Refuses options (``--tensor``) whose number is not above zero; None is left out.

    Raises:
        UserError: One is not.
    """
    for option in options:
        value = getattr(given, option.lstrip("-").replace("-", "_"))
        if value is not None and not value > 0:
            raise UserError(f"{option} is {value}: it must be positive")


def run(main: Callable[[], None]) -> None:
    """Runs a command; bad input ends it with one line on stderr and exit code 1, failing storage with 74."""
    console.configure()
    try:
        main()
    except UserError as error:
        report_failure(error, int(os.environ.get("RANK") or os.environ.get("SLURM_PROCID") or 0))
        sys.exit(STORAGE_STATUS if isinstance(error, StorageError) else 1)
    finally:
        # Not imported here: a command that was refused before has joined nobody.
        dist = sys.modules.get("torch.distributed")
        if dist is not None and dist.is_initialized():
            dist.destroy_process_group()
