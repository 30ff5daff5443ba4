"""What the commands share once their arguments are read: ranks, dtypes and checkpoints."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from megatron_tgdpo.checkpoints.find_model import find_model
from megatron_tgdpo.checkpoints.model_directory import is_megatron_checkpoint
from megatron_tgdpo.distributed.ranks import connect_store, init_distributed, read_rank_environment
from megatron_tgdpo.errors import UserError
from megatron_tgdpo.storage.dtypes import DTYPES


def join_ranks(timeout_minutes: float) -> None:
    """Joins all ranks (one if not launched by torchrun or srun) on the CPU, GPU or not."""
    ranks = read_rank_environment()
    init_distributed(ranks, torch.device("cpu"), timeout_minutes, connect_store(ranks))


def find_checkpoint(path: Path, option: str = "--megatron", *, adapter: bool = False) -> Path:
    """:func:`find_model`, of which only a Megatron checkpoint will do; with ``adapter``, also one of a LoRA run.

    Raises:
        UserError: It is none, or it is damaged.
        StorageError: It cannot be read.
    """
    found = find_model(path, option, weights=False, adapter=adapter)
    if not is_megatron_checkpoint(found):
        raise UserError(f"{option} {path}: an HF model: name a Megatron checkpoint or a training output directory")
    return found


def find_hf(path: Path, option: str = "--hf", *, adapter: bool = False) -> Path:
    """:func:`find_model`, of which only an HF directory will do; with ``adapter``, also one of ``peft``.

    Raises:
        UserError: It is none.
        StorageError: Storage or the Hub failed.
    """
    found = find_model(path, option, adapter=adapter)
    if is_megatron_checkpoint(found):
        raise UserError(f"{option} {path}: a Megatron checkpoint: name an HF directory, or a model of the Hub")
    return found


def dtype_of(metadata: Mapping[str, Any], path: Path) -> torch.dtype:
    """The dtype that a checkpoint's metadata names.

    Raises:
        UserError: It names none, or an unknown one.
    """
    if metadata.get("dtype") not in DTYPES:
        raise UserError(f"{path}: its metadata says dtype {metadata.get('dtype')!r}, known are {', '.join(DTYPES)}")
    return DTYPES[metadata["dtype"]]
