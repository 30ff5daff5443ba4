"""Finds the file behind a dataset's name in LLaMA-Factory's ``dataset_info.json``."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron_tgdpo.data.records import detect_format, parse_line, read_records, where
from megatron_tgdpo.errors import UserError
from megatron_tgdpo.storage.json_text import parse_json

# Its columns, and what this project's data layouts call them.
_COLUMNS = {
    "alpaca": {"prompt": "instruction", "query": "input", "history": "history", "system": "system"},
    "sharegpt": {"messages": "conversations", "system": "system"},
}
_SIDES = {"chosen": "chosen", "rejected": "rejected"}
_TAGS = {
    "role_tag": ("from", "role"),
    "content_tag": ("value", "content"),
    "user_tag": ("human", "user"),
    "assistant_tag": ("gpt", "assistant"),
    "observation_tag": ("observation", "tool"),
    "system_tag": ("system",),
}
_SOURCES = ("hf_hub_url", "ms_hub_url", "om_hub_url", "script_url", "cloud_file_name")
_UNDERSTOOD = {"file_name", "formatting", "ranking", "columns", "tags", "file_sha1"}


def dataset_file(info_file: Path, name: str) -> str:
    """The path of a dataset's pairs.

    Args:
        info_file: ``dataset_info.json``; file names in it are relative to its directory.
        name: The value of ``dataset`` or ``eval_dataset``.

    Raises:
        UserError: The entry is missing, is not a local file of preference pairs, or names columns or tags that this
            project's data layouts do not have.
    """
    try:
        entries = parse_json(info_file.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{info_file}: cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise UserError(f"{info_file}: cannot be read: {error}") from error
    if "," in name:
        raise UserError(f"dataset: {name} are several datasets: join their files and give the path with --train")
    entry = entries.get(name) if isinstance(entries, dict) else None
    if not isinstance(entry, dict):
        raise UserError(f"{info_file}: no entry {name!r}")
    place = f"{info_file}: {name}"
    # What is null is not there; an empty name, as in "query": "", means no such column.
    entry = {key: value for key, value in entry.items() if value is not None}
    columns, tags = _names(entry, "columns", place), _names(entry, "tags", place)
    formatting = _check(entry, columns, tags, place)
    file = info_file.parent / entry["file_name"]
    if not file.is_file():
        raise UserError(f"{place}: {file} is not a file")
    unread = [*_COLUMNS[formatting].values(), "tools"]
    if "columns" in entry or formatting == "sharegpt":
        unread = [ours for ours in unread if ours not in columns.values()]
    else:
        unread = [ours for ours in unread if ours not in ("instruction", "input")]
    if formatting == "sharegpt" and "columns" not in entry:
        unread.remove("conversations")
    _check_records(str(file), unread)
    return str(file)


def _names(entry: Mapping[str, Any], key: str, place: str) -> dict[str, str]:
    names = entry.get(key, {})
    if not isinstance(names, dict) or not all(isinstance(name, str | None) for name in names.values()):
        raise UserError(f"{place}: {key} is not a mapping of names to names")
    return {ours: theirs for ours, theirs in names.items() if theirs}


def _check(entry: Mapping[str, Any], columns: Mapping[str, str], tags: Mapping[str, str], place: str) -> str:
    """Checks an entry and returns its formatting."""
    for key in _SOURCES:
        if key in entry:
            raise UserError(f"{place}: {key} is not downloaded here: fetch the data and give its path with --train")
    unknown = sorted(entry.keys() - _UNDERSTOOD)
    if unknown:
        raise UserError(f"{place}: {unknown[0]} has no counterpart here: prepare the file and give it with --train")
    if not isinstance(entry.get("file_name"), str) or not entry.get("ranking"):
        raise UserError(f"{place}: not a file of preference pairs (file_name, and ranking: true)")
    formatting = entry.get("formatting", "alpaca")
    if not isinstance(formatting, str) or formatting not in _COLUMNS:
        raise UserError(f"{place}: formatting {formatting!r} is not supported, only {', '.join(_COLUMNS)}")
    names = {**_COLUMNS[formatting], **_SIDES}
    for column, theirs in columns.items():
        if names.get(column) != theirs:
            wanted = f"must be called {names[column]!r}" if column in names else "has no counterpart"
            raise UserError(f"{place}: columns.{column} is {theirs!r}, which {wanted} here: rename it in the file")
    for tag, value in tags.items():
        if value not in _TAGS.get(tag, ()):
            raise UserError(f"{place}: tags.{tag} is {value!r}, here only {', '.join(_TAGS.get(tag, ())) or 'nothing'}")
    return formatting


def _check_records(file: str, unread: Sequence[str]) -> None:
    """Refuses records with columns that this project reads and the reference code, by its columns, does not."""
    kind = detect_format(file)
    for record in read_records(file, kind):
        place = where(file, kind, record.number)
        value = parse_line(record.payload, place) if kind == "jsonl" and record.payload.strip() else record.payload
        found = [name for name in unread if isinstance(value, dict) and value.get(name)]
        if found:
            raise UserError(
                f"{place}: has {found[0]!r}, which is read here, and by the reference code only if columns names it: "
                "take it out of the file, and give that with --train"
            )
