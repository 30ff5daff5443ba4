"""What the commands share once their arguments are read: ranks, dtypes and checkpoints."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from megatron_tgdpo.checkpoints.directory import newest_checkpoint
from megatron_tgdpo.checkpoints.manifest import check_files
from megatron_tgdpo.checkpoints.model_directory import is_megatron_checkpoint
from megatron_tgdpo.distributed.ranks import connect_store, init_distributed, read_rank_environment
from megatron_tgdpo.errors import UserError
from megatron_tgdpo.storage.dtypes import DTYPES


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


def dtype_of(metadata: Mapping[str, Any], path: Path) -> torch.dtype:
    """The dtype that a checkpoint's metadata names.

    Raises:
        UserError: It names none, or an unknown one.
    """
    if metadata.get("dtype") not in DTYPES:
        raise UserError(f"{path}: its metadata says dtype {metadata.get('dtype')!r}, known are {', '.join(DTYPES)}")
    return DTYPES[metadata["dtype"]]
