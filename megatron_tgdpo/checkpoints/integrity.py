"""Finds damage in a Megatron checkpoint: a file that is missing or cut off, or bytes that are not those written.

Damage is what was read and is wrong. What cannot be read (a device's error, a stale handle, no descriptors or memory
left) says nothing of the checkpoint, and neither does what one rank finds and another does not: that is its mount.

A checkpoint's manifest has a sha256 of each file. Of one that was written before there was a manifest, every tensor and
object in a ``.distcp`` file is a zip archive as ``torch.save`` writes it, which holds a CRC-32 of its content. torch
writes these checksums and never looks at them; here Python's zip reader does.
"""

import io
import os
import pickle
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist

from megatron_tgdpo.checkpoints.dcp_io import SafeReader
from megatron_tgdpo.checkpoints.manifest import (
    COMMON_FILE,
    TENSORS_FILE,
    TENSORS_SUFFIX,
    check_file,
    check_files,
    read_manifest,
)
from megatron_tgdpo.errors import AgreedError, AgreedStorageError, DamageError, UserError
from megatron_tgdpo.storage.atomic_directory import describe, is_of_storage
from megatron_tgdpo.storage.files import FilePart, read_error


@dataclass(frozen=True)
class _Finding:
    """What is wrong, what ``part`` of the checkpoint it is in, and whether it is damage."""

    message: str
    part: int
    is_damage: bool
    kind: type[AgreedError]


def find_damage(path: Path, *, content: bool = True, group: dist.ProcessGroup | None = None) -> str | None:
    """Checks a checkpoint, the ranks sharing the work. Collective.

    Args:
        path: The checkpoint.
        content: Whether to read the tensors too; without, it costs next to nothing.
        group: Of all ranks; None for the default group.

    Returns:
        The same on every rank: what is wrong, in one line that names the file; None if nothing is.

    Raises:
        AgreedStorageError: A file could not be read, or ranks find different things in it.
        AgreedError: It is of another format version.
    """
    rank, ranks = dist.get_rank(), dist.get_world_size()
    reports: list[_Finding | None] = [None] * ranks
    dist.all_gather_object(reports, _examine(path, content, slice(rank, None, ranks)), group=group)
    for finder, report in enumerate(reports):
        if report is not None and not report.is_damage:
            raise report.kind(_of_rank(finder, report.message))
    finder, found = next(((r, report) for r, report in enumerate(reports) if report is not None), (0, None))
    if found is None:
        return None
    # Before anything is thought of the checkpoint, another rank looks, on another machine if there is one.
    second = 0 if finder else ranks - 1
    if second != finder:
        again: list[_Finding | None] = [None]
        if rank == second:
            again[0] = _examine(path, content, slice(found.part, found.part + 1))
        dist.broadcast_object_list(again, src=second, group=group)
        if again[0] is None or not again[0].is_damage:
            raise AgreedStorageError(
                f"{_of_rank(finder, found.message)}; rank {second} finds no damage there: check what that rank's "
                "machine sees of the storage"
            )
    return found.message


def refuse_damage(path: Path, *, content: bool = True, group: dist.ProcessGroup | None = None) -> None:
    """Checks a checkpoint before it is used, as :func:`find_damage` does, which see. Collective.

    Raises:
        AgreedError: It is damaged, or of another format version.
        AgreedStorageError: See :func:`find_damage`.
    """
    damage = find_damage(path, content=content, group=group)
    if damage is not None:
        raise AgreedError(f"{damage}: put it back, or name another checkpoint")


def _of_rank(rank: int, message: str) -> str:
    return message if rank == 0 else f"rank {rank}: {message}"


def _examine(path: Path, content: bool, share: slice) -> _Finding | None:
    """The first thing that is wrong in a share of the checkpoint's parts."""
    part = 0
    try:
        checks = _checks(path, content)
        for part in range(len(checks))[share]:
            checks[part]()
    except DamageError as error:
        return _Finding(str(error), part, True, AgreedError)
    except UserError as error:
        return _Finding(str(error), part, False, AgreedStorageError if is_of_storage(error) else AgreedError)
    return None


def _checks(path: Path, content: bool) -> list[Callable[[], object]]:
    """What checks the checkpoint: everything but the tensors first, then these, by files or one by one."""
    files = read_manifest(path).files
    checks: list[Callable[[], object]] = [partial(check_files, path)]
    if content and files is None:
        checks += [partial(_check_archive, path / COMMON_FILE, "plain values", 0, None), *_items(path)]
    elif content and files is not None:
        tensors = [(written.size, name) for name, written in files.items() if name.endswith(TENSORS_SUFFIX)]
        # The largest first, so that ranks have about as much to do.
        checks += [partial(check_file, path / name, files[name]) for _, name in sorted(tensors, reverse=True)]
    return checks


def _items(path: Path) -> Iterator[Callable[[], object]]:
    file = path / TENSORS_FILE
    try:
        stored_items = list(SafeReader(path).read_metadata().storage_data.items())
    except (FileNotFoundError, NotADirectoryError):
        raise DamageError(f"{file}: missing") from None
    except (OSError, MemoryError) as error:
        raise read_error(file, error) from error
    except (pickle.UnpicklingError, EOFError, LookupError, AttributeError, TypeError, ValueError) as error:
        raise DamageError(f"{file}: {describe(error)}") from error
    for index, stored in stored_items:
        yield partial(_check_archive, path / stored.relative_path, index.fqn, stored.offset, stored.length)


def _check_archive(file: Path, name: str, offset: int, length: int | None) -> None:
    """Checks one archive; without ``length`` it reaches to the file's end."""
    try:
        with file.open("rb") as stream:
            _check_opened_archive(file, name, stream.fileno(), offset, length)
    except (FileNotFoundError, NotADirectoryError):
        raise DamageError(f"{file}: missing") from None
    except (OSError, MemoryError) as error:
        raise read_error(file, error) from error


def _check_opened_archive(file: Path, name: str, descriptor: int, offset: int, length: int | None) -> None:
    size = os.fstat(descriptor).st_size
    end = size if length is None else offset + length
    if size < end:
        raise DamageError(f"{file}: ends before byte {end:,}: truncated")
    part = FilePart(descriptor, offset, end - offset)
    try:
        with zipfile.ZipFile(part) as archive:
            intact = archive.testzip() is None
        # What lies between the checksummed contents: torch's own reader is stricter about it.
        part.seek(0)
        torch.load(io.BufferedReader(part), map_location="meta", weights_only=True)
    except Exception as error:  # the readers raise many types for one cause
        if part.failure is not None:
            raise part.failure from error
        if isinstance(error, MemoryError):
            raise
        intact = False
    if not intact:
        raise DamageError(f"{file}: the bytes of {name} are not those that were written")
