"""Finds damage in a Megatron checkpoint: a file that is missing or cut off, or bytes that are not those written.

Every tensor and object in a ``.distcp`` file is a zip archive as ``torch.save`` writes it, which holds a CRC-32 of its
content. torch writes these checksums and never looks at them; here Python's zip reader does.
"""

import io
import os
import pickle
import zipfile
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.distributed as dist

from megatron_tgdpo.checkpoint_directory import COMMON_FILE, read_metadata
from megatron_tgdpo.checkpoint_storage import SafeReader
from megatron_tgdpo.errors import UserError
from megatron_tgdpo.files import FilePart
from megatron_tgdpo.whole_directory import one_line


def find_damage(path: Path) -> str | None:
    """Reads a checkpoint whole, the ranks sharing the work. Collective over the default group.

    Returns:
        The same on every rank: what is wrong, in one line that names the file; None if nothing is.
    """
    found = _damage_in_share(path, dist.get_rank(), dist.get_world_size())
    reports: list[str | None] = [None] * dist.get_world_size()
    dist.all_gather_object(reports, found)
    return next((report for report in reports if report is not None), None)


def _damage_in_share(path: Path, rank: int, ranks: int) -> str | None:
    try:
        read_metadata(path)
        if rank == 0:
            with (path / COMMON_FILE).open("rb") as stream:
                _check_archive(
                    path / COMMON_FILE, "plain values", stream.fileno(), 0, os.fstat(stream.fileno()).st_size
                )
        items = list(_items(path))
        for name, file, offset, length in items[rank::ranks]:
            with file.open("rb") as stream:
                _check_archive(file, name, stream.fileno(), offset, length)
    except UserError as error:
        return str(error)
    except OSError as error:
        return f"{error.filename}: {error.strerror}"
    except (pickle.UnpicklingError, EOFError, LookupError, AttributeError, TypeError, ValueError) as error:
        return f"{path / '.metadata'}: {one_line(error)}"
    return None


def _items(path: Path) -> Iterator[tuple[str, Path, int, int]]:
    """Name, file, first byte and length of everything that the metadata says is there."""
    for index, stored in SafeReader(path).read_metadata().storage_data.items():
        yield index.fqn, path / stored.relative_path, stored.offset, stored.length


def _check_archive(file: Path, name: str, descriptor: int, offset: int, length: int) -> None:
    if os.fstat(descriptor).st_size < offset + length:
        raise UserError(f"{file}: ends before byte {offset + length:,}: truncated")
    part = FilePart(descriptor, offset, length)
    try:
        with zipfile.ZipFile(part) as archive:
            intact = archive.testzip() is None
        # What lies between the checksummed contents: torch's own reader is stricter about it.
        part.seek(0)
        torch.load(io.BufferedReader(part), map_location="meta", weights_only=True)
    except Exception:  # the readers raise many types for one cause
        intact = False
    if not intact:
        raise UserError(f"{file}: the bytes of {name} are not those that were written")
