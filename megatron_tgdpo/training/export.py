"""HF directories of a run's checkpoints, of a LoRA run's adapters ``peft`` directories, in ``output_dir/hf``.

What writes them is given: conversion builds on this package.
"""

import shlex
from pathlib import Path
from typing import Protocol

import torch.distributed as dist

from megatron_tgdpo.checkpoints.listing import remove_checkpoint
from megatron_tgdpo.checkpoints.manifest import METADATA_FILE
from megatron_tgdpo.checkpoints.model_directory import ADAPTER_CONFIG
from megatron_tgdpo.config.schema import ExportKind
from megatron_tgdpo.distributed.ranks import raise_on_all_ranks
from megatron_tgdpo.errors import AgreedError, AgreedStorageError, StorageError, UserError
from megatron_tgdpo.storage.files import write_error

_FOLDER = "hf"


class Exporter(Protocol):
    """Writes a checkpoint as an HF directory, whole or not at all; collective over a group of all ranks."""

    def __call__(
        self, checkpoint: Path, out: Path, group: dist.ProcessGroup | None, *, verify: bool, kind: ExportKind
    ) -> None:
        """Writes it.

        Args:
            checkpoint: A complete checkpoint.
            out: The directory to make; it must not exist, or be empty.
            group: For the collectives; None for the default group.
            verify: Whether to compare the checkpoint's checksums first.
            kind: What is written of it.

        Raises:
            UserError: On every rank: it could not be written; a StorageError where that may pass.
        """


def export_path(output_dir: Path, checkpoint: Path) -> Path:
    """Where the HF directory of a checkpoint goes."""
    return output_dir / _FOLDER / checkpoint.name


def export_command(checkpoint: Path, out: Path, kind: ExportKind) -> str:
    """What a user types to export a checkpoint."""
    words = ["tgdpo", "convert", "to-hf", "--megatron", str(checkpoint), "--out", str(out)]
    return shlex.join([*words, *(["--merge"] if kind == "merged" else [])])


def run_export_command(output_dir: str, kind: ExportKind) -> str:
    """What a user types to export a run's newest checkpoint."""
    return export_command(Path(output_dir), Path("DIR"), kind)


def export(
    exporter: Exporter,
    output_dir: Path,
    checkpoint: Path,
    group: dist.ProcessGroup | None = None,
    *,
    verify: bool,
    kind: ExportKind,
) -> Path:
    """Exports a checkpoint, unless that was done since it was saved. Collective over ``group``, of all ranks.

    Returns:
        The directory.

    Raises:
        AgreedError: On every rank: it could not be written. The checkpoint is as it was; the message says how to export
            it by hand. An AgreedStorageError where storage failed.
    """
    out = export_path(output_dir, checkpoint)
    try:
        there = [raise_on_all_ranks(lambda: dist.get_rank() == 0 and _keep_current(out, checkpoint, kind), group)]
        dist.broadcast_object_list(there, src=0, group=group)
        if not there[0]:
            exporter(checkpoint, out, group, verify=verify, kind=kind)
    except UserError as error:
        agreed = AgreedStorageError if isinstance(error, StorageError) else AgreedError
        command = export_command(checkpoint, out, kind)
        raise agreed(f"{error}; the checkpoint is as it was, to export it again: {command}") from error
    return out


def is_current(out: Path, checkpoint: Path, kind: ExportKind) -> bool:
    """Whether a directory was made of this checkpoint, not of one of the same step that was there before.

    Args:
        out: The directory.
        checkpoint: The checkpoint.
        kind: What it should hold.
    """
    written = out / (ADAPTER_CONFIG if kind == "adapter" else "config.json")
    return written.exists() and written.stat().st_mtime_ns >= (checkpoint / METADATA_FILE).stat().st_mtime_ns


def _keep_current(out: Path, checkpoint: Path, kind: ExportKind) -> bool:
    """The same; one of a step that was made again, or of the other kind, is removed."""
    try:
        if is_current(out, checkpoint, kind):
            return True
        if out.exists():
            remove_checkpoint(out)
    except OSError as error:
        raise write_error(out, error) from error
    return False
