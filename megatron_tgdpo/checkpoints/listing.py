"""Checkpoint directories of a run: which are complete, how one comes to be and goes.

A save (``checkpoints/save.py``) writes under a temporary name and renames: a directory without that ending and with all
its files (``checkpoints/manifest.py``) is complete.
"""

import json
import logging
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_tgdpo.checkpoints.manifest import (
    COMMON_FILE,
    FORMAT,
    FORMAT_FILE,
    HF_FOLDER,
    TENSORS_FILE,
    UNFINISHED_SUFFIX,
    check_files,
    file_size,
    write_manifest,
)
from megatron_tgdpo.checkpoints.model_directory import copy_hf_files
from megatron_tgdpo.errors import DamageError, StorageError, UserError
from megatron_tgdpo.storage.files import FileDigest, file_digest, read_error

logger = logging.getLogger(__name__)

REMOVING_SUFFIX = ".removing"
DAMAGED_SUFFIX = ".damaged"


def remove_incomplete(directory: Path) -> list[Path]:
    """Deletes what interrupted saves and removals left in a directory of checkpoints.

    Call it on one rank, with no save running.

    Returns:
        The directories that were deleted.

    Raises:
        StorageError: One cannot be deleted, or the directory cannot be read.
    """
    suffixes = (UNFINISHED_SUFFIX, REMOVING_SUFFIX)
    left = [path for path in _entries(directory) if path.name.endswith(suffixes)]
    for path in left:
        try:
            shutil.rmtree(path)
        except OSError as error:
            raise StorageError(f"{path}: left by an interrupted save, cannot be removed: {error.strerror}") from error
    return left


def saved_checkpoints(output_dir: Path) -> list[Path]:
    """All ``checkpoints/step_XXXXXXXX`` of a training output directory, whatever their state, lowest step first.

    Raises:
        StorageError: The directory cannot be read.
    """
    found = [
        path for path in _entries(output_dir / "checkpoints") if path.name[5:].isascii() and path.name[5:].isdecimal()
    ]
    return sorted(found, key=lambda path: int(path.name[5:]))


def set_aside(output_dir: Path) -> list[Path]:
    """Checkpoints of a training output directory that were renamed for their damage."""
    return [path for path in _entries(output_dir / "checkpoints") if DAMAGED_SUFFIX in path.name]


def _entries(directory: Path) -> list[Path]:
    try:
        with os.scandir(directory) as entries:
            return sorted(directory / entry.name for entry in entries if entry.name.startswith("step_"))
    except FileNotFoundError:
        return []
    except OSError as error:
        raise read_error(directory, error) from error


def complete_checkpoints(output_dir: Path) -> list[Path]:
    """Those of :func:`saved_checkpoints` in which :func:`check_files` finds nothing; it logs what it finds in others.

    Raises:
        UserError: One is of another format version.
        StorageError: The directory or a file cannot be read.
    """
    complete = []
    for path in saved_checkpoints(output_dir):
        try:
            check_files(path)
        except DamageError as error:
            logger.warning("%s; %s is not used", error, path.name)
        else:
            complete.append(path)
    return complete


def newest_checkpoint(output_dir: Path) -> Path | None:
    """The last of :func:`complete_checkpoints`, or None."""
    complete = complete_checkpoints(output_dir)
    return complete[-1] if complete else None


def newest_damage(output_dir: Path) -> str | None:
    """What is wrong with the newest checkpoint that is damaged; None if there is none.

    Raises:
        UserError: One is of another format version.
        StorageError: The directory or a file cannot be read.
    """
    for path in reversed(saved_checkpoints(output_dir)):
        try:
            check_files(path)
        except DamageError as error:
            return str(error)
    left = set_aside(output_dir)
    return f"{left[-1]}: set aside for its damage" if left else None


def remove_checkpoint(path: Path) -> None:
    """Deletes a checkpoint; renamed first, so that one whose removal is interrupted is not taken for complete."""
    shutil.rmtree(path.rename(path.with_name(path.name + REMOVING_SUFFIX)))


def write_description(
    directory: Path, hf_dir: Path, metadata: Mapping[str, Any], digests: Mapping[str, FileDigest]
) -> None:
    """Adds to a directory of tensors what makes it a checkpoint of this project: ``tgdpo.json`` last.

    Args:
        directory: With the tensors, not yet renamed.
        hf_dir: An HF directory or another Megatron checkpoint, whose config, tokenizer and templates are copied.
        metadata: Goes into ``tgdpo.json``.
        digests: Of the files of tensors, as their writers know them.

    Raises:
        UserError: A file of tensors is not here as it was written, so not on storage that all ranks share; or a file
            of ``hf_dir`` is damaged.
        OSError: Something cannot be written.
    """
    (directory / FORMAT_FILE).write_text(json.dumps(FORMAT), encoding="utf-8")
    (directory / HF_FOLDER).mkdir()
    copy_hf_files(hf_dir, directory / HF_FOLDER)
    files = dict(digests)
    for name, written in files.items():
        size = file_size(directory / name)
        if size != written.size:
            raise UserError(f"{directory / name}: {size:,} bytes are here, its rank wrote {written.size:,}")
    small = [directory / FORMAT_FILE, directory / TENSORS_FILE, directory / COMMON_FILE]
    for file in [*small, *sorted((directory / HF_FOLDER).rglob("*"))]:
        if file.is_file():
            files[str(file.relative_to(directory))] = file_digest(file)
    write_manifest(directory, metadata, files)
