"""What a model directory's weights are, as one hash of all their bytes; all ranks read for it, each file once.

A record of hashes has, for each file, the size, times and inode that it had; a file that still has them is not read
again. A change of content changes at least ``ctime``, which no program can set.
"""

import json
import logging
import os
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch.distributed as dist

from megatron_tgdpo.checkpoints.model_directory import model_files
from megatron_tgdpo.console import waiting
from megatron_tgdpo.data.manifest import digest_file
from megatron_tgdpo.distributed.ranks import RankEnvironment, run_on_all_ranks, run_on_rank0
from megatron_tgdpo.signals import leave_if_requested
from megatron_tgdpo.storage.atomic_file import write_atomically
from megatron_tgdpo.storage.files import read_error, write_error
from megatron_tgdpo.storage.json_text import parse_json

logger = logging.getLogger(__name__)

HASHES_FILE = "hashes.json"

_THREADS = 8


def weights_fingerprint(path: Path, digests: Mapping[str, str]) -> str:
    """sha256 (hex) over the content of :func:`model_files`; their names have no part in it.

    Args:
        path: An HF or Megatron directory.
        digests: From :func:`hash_files`.
    """
    return sha256("\n".join(digests[os.path.abspath(file)] for file in model_files(path)).encode()).hexdigest()


def hash_files(
    files: Callable[[], Iterable[Path]],
    record: Path,
    ranks: RankEnvironment,
    store: dist.Store,
    *,
    again: bool = False,
) -> dict[str, str]:
    """sha256 (hex) of files, by absolute path, for the first rank. Every rank calls and reads its share; no process
    group is needed.

    Args:
        files: Names them, on the first rank; they are on storage that all ranks share.
        record: JSON file in which the hashes are kept; the first rank reads and writes it.
        ranks: This process's place.
        store: Joins all ranks; its keys must be unused.
        again: Whether to read files too whose hashes are known.

    Returns:
        On the first rank, of all files; on others, nothing.

    Raises:
        UserError: On every rank: a file is not there, or the record cannot be written; a StorageError where storage
            failed, which may pass.
        StoppedEarly: On every rank: some rank was asked to stop.
    """
    first = dist.PrefixStore("plan", store)
    plan = _Plan.of_json(run_on_rank0(lambda: asdict(_plan(files(), record, again)), first, ranks.rank))
    if not plan.unknown:
        return plan.known if ranks.rank == 0 else {}
    sizes = {path: state.size for path, state in plan.unknown.items()}
    if ranks.rank == 0:
        logger.info("hashing %d files of models and data, %.1f GB", len(sizes), sum(sizes.values()) / 1e9)
    mine = shares(sizes, ranks.world_size)[ranks.rank]
    with waiting("hashing models and data", shown=ranks.rank == 0):
        answers = run_on_all_ranks(lambda: _hash(mine), dist.PrefixStore("hash", store), ranks)
    found = {path: digest for answer in answers for path, digest in answer.items()}
    read = {path: (plan.unknown[path], digest) for path, digest in found.items()}
    last = dist.PrefixStore("record", store)
    run_on_rank0(lambda: _write(record, _read(record) | read), last, ranks.rank)
    return plan.known | found if ranks.rank == 0 else {}


def known_hashes(files: Iterable[str | Path], record: Path) -> dict[str, str]:
    """sha256 (hex), by absolute path, of those files that are as a record of :func:`hash_files` has them.

    Raises:
        UserError: A file is not there.
        StorageError: A file or the record cannot be read.
    """
    return _plan(map(Path, files), record, again=False).known


def shares(sizes: Mapping[str, int], ranks: int) -> list[list[str]]:
    """Divides files among ranks so that each reads about as many bytes.

    Args:
        sizes: In bytes, by path.
        ranks: How many.

    Returns:
        The paths of each rank.
    """
    load, found = [0] * ranks, [[] for _ in range(ranks)]  # type: ignore[var-annotated]
    for path in sorted(sizes, key=lambda path: (-sizes[path], path)):
        lightest = load.index(min(load))
        load[lightest] += sizes[path]
        found[lightest].append(path)
    return found


@dataclass(frozen=True)
class FileState:
    """By what a file whose content has changed is told from one whose has not: bytes, ns since 1970, number."""

    size: int
    mtime_ns: int
    ctime_ns: int
    inode: int

    @classmethod
    def of(cls, path: str) -> "FileState":
        try:
            stat = Path(path).stat()
        except OSError as error:
            raise read_error(path, error) from error
        return cls(stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino)


_Record = dict[str, tuple[FileState, str]]


@dataclass(frozen=True)
class _Plan:
    """Hashes of the files that need not be read, and the states of those that must be, from before they are read."""

    known: dict[str, str]
    unknown: dict[str, FileState]

    @classmethod
    def of_json(cls, value: Mapping[str, Any]) -> "_Plan":
        """What ``dataclasses.asdict`` made of one."""
        return cls(value["known"], {path: FileState(**state) for path, state in value["unknown"].items()})


def _plan(files: Iterable[Path], record: Path, again: bool) -> _Plan:
    paths = sorted({os.path.abspath(file) for file in files})
    recorded = {} if again else _read(record)
    states = {path: FileState.of(path) for path in paths}
    known = {p: recorded[p][1] for p in paths if p in recorded and recorded[p][0] == states[p]}
    return _Plan(known, {path: states[path] for path in paths if path not in known})


def _hash(paths: list[str]) -> dict[str, str]:
    def digest(path: str) -> str:
        leave_if_requested("reading models and data")
        return digest_file(path).sha256

    # Hashing releases the interpreter's lock, so threads read several files at once.
    with ThreadPoolExecutor(_THREADS) as pool:
        return dict(zip(paths, pool.map(digest, paths), strict=True))


def _read(record: Path) -> _Record:
    """What a record says; nothing if there is none, or if it is no record: then files are read again."""
    try:
        entries = parse_json(record.read_text(encoding="utf-8")).items()
        return {path: (FileState(**state), str(digest)) for path, (state, digest) in entries}
    except FileNotFoundError:
        return {}
    except OSError as error:
        raise read_error(record, error) from error
    except (ValueError, TypeError, AttributeError) as error:
        logger.warning("%s: not readable (%r): files are hashed again", record, error)
        return {}


def _write(record: Path, entries: _Record) -> None:
    content = {path: [vars(state), digest] for path, (state, digest) in sorted(entries.items())}
    try:
        record.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise write_error(record, error) from error
    write_atomically(record, json.dumps(content, indent=1) + "\n")
