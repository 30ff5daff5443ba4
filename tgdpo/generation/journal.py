"""A long job's finished parts in a file of their own, so that a killed run goes on where it was."""

import fcntl
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from megatron_tgdpo.console import progress
from megatron_tgdpo.errors import UserError
from megatron_tgdpo.storage.atomic_file import replacing, temporary_path
from megatron_tgdpo.storage.json_text import parse_json

# Not .jsonl: FastChat and Arena-Hard read every file of that name in the directory of the answers.
SUFFIX = ".unfinished"


class Journal:
    """Context manager: an append-only JSONL file, settings first, then one line for each finished part.

    A line that is not whole, left by a killed run, is cut off on entering. One process at a time may have it open.

    Args:
        path: The file; its directory is made.
        settings: What the parts depend on. A journal with other settings is refused.

    Attributes:
        done: Number of finished parts.
        created: The ``created`` value of the run that began the journal.

    Raises:
        UserError: On entering: it cannot be written, belongs to a run with other settings, or is in use.
    """

    def __init__(self, path: Path, settings: Mapping[str, Any], *, created: float) -> None:
        self.path = path
        self.done = 0
        self.created = created
        self._settings = dict(settings)

    def __enter__(self) -> "Journal":
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._file = open(self.path, "a+b")
        except OSError as error:
            raise UserError(f"{self.path}: cannot be written: {error.strerror}") from error
        try:
            self._lock()
            self._recover()
        except BaseException:
            self._file.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._file.close()

    def append(self, part: Any) -> None:
        """Adds a finished part, on disk when this returns.

        Raises:
            UserError: It cannot be written.
        """
        self._write(part)
        self.done += 1

    def fill(self, total: int, size: int, unit: str, make_parts: Callable[[Sequence[range]], Iterable[Any]]) -> None:
        """Adds the parts that are missing, each of ``size`` of the job's ``total`` items, with a progress bar.

        Args:
            total: Items of the whole job.
            size: Items of a part.
            unit: What an item is.
            make_parts: Takes the items of each missing part to the parts, in their order.
        """
        starts = range(self.done * size, total, size)
        missing = [range(start, min(start + size, total)) for start in starts]
        with progress("answers", total, unit, initial=min(starts.start, total)) as bar:
            for items, part in zip(missing, make_parts(missing), strict=True):
                self.append(part)
                bar.update(len(items))

    def parts(self) -> Iterator[Any]:
        """The finished parts, in order, read from the file."""
        with open(self.path, "rb") as file:
            next(file)
            for line in file:
                yield parse_json(line)

    def remove(self) -> None:
        """Deletes the file: the job is done and its results are elsewhere."""
        self.path.unlink()

    def _lock(self) -> None:
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise UserError(f"{self.path}: another process is writing it") from error

    def _recover(self) -> None:
        end, header = 0, None
        self._file.seek(0)
        for line in self._file:
            content = _parse(line)
            if content is None:
                break
            if header is None:
                header = content
                self._check(header)
            else:
                self.done += 1
            end += len(line)
        self._file.truncate(end)
        if header is None:
            self._write({"created": self.created, "settings": self._settings})
        else:
            self.created = header["created"]

    def _check(self, header: Any) -> None:
        theirs = header.get("settings", {}) if isinstance(header, dict) else {}
        for name, value in self._settings.items():
            if theirs.get(name) != value:
                raise UserError(
                    f"{self.path}: holds an unfinished run with {name} {theirs.get(name)!r}, this one has {value!r}: "
                    "use the same options to continue it, or delete the file to start over"
                )

    def _write(self, content: Any) -> None:
        try:
            self._file.write(json.dumps(content, ensure_ascii=False).encode() + b"\n")
            self._file.flush()
            os.fsync(self._file.fileno())
        except OSError as error:
            raise UserError(f"{self.path}: cannot be written: {error.strerror}") from error


def write_whole(path: Path, chunks: Iterable[str]) -> None:
    """Writes a text file under a temporary name, syncs and renames it: it is there whole or as it was before.

    Raises:
        UserError: It cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as temporary, open(temporary, "w", encoding="utf-8") as file:
            file.writelines(chunks)
    except OSError as error:
        raise UserError(f"{path}: cannot be written: {error.strerror}") from error


def check_writable(path: Path) -> None:
    """Finds out before a long job whether :func:`write_whole` will work; makes the directory.

    Raises:
        UserError: It will not.
    """
    if path.is_dir():
        raise UserError(f"{path}: cannot be written: it is a directory")
    temporary = temporary_path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.touch()
        temporary.unlink()
    except OSError as error:
        raise UserError(f"{path}: cannot be written: {error.strerror}") from error


def summary_path(out: Path) -> Path:
    """Where the metrics and settings of a finished job are kept, beside its output."""
    return out.with_name(out.name + ".summary.json")


def finished_summary(out: Path, settings: Mapping[str, Any], summary_file: Path | None = None) -> dict[str, Any] | None:
    """The summary of this very job, if it is finished; in ``summary_file``, or else at :func:`summary_path`.

    Raises:
        UserError: ``out`` is something else's.
    """
    if not out.exists() or out.with_name(out.name + SUFFIX).exists():
        return None
    try:
        summary = parse_json((summary_file or summary_path(out)).read_text(encoding="utf-8"))
        theirs = summary["settings"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{out}: exists and is not a result of this command; choose another file") from error
    for name, value in settings.items():
        if theirs.get(name) != value:
            raise UserError(
                f"{out}: exists, made with {name} {theirs.get(name)!r}, this run has {value!r}: choose another file, "
                "or delete it"
            )
    result: dict[str, Any] | None = summary
    return result


def _parse(line: bytes) -> Any:
    if not line.endswith(b"\n"):
        return None
    try:
        return parse_json(line)
    except ValueError:
        return None
