"""Finds the files behind datasets' names in LLaMA-Factory's ``dataset_info.json``."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_tgdpo.data.encode import decode_record
from megatron_tgdpo.data.example import Example
from megatron_tgdpo.data.layouts import detect_layout, parse_record
from megatron_tgdpo.data.options import PreprocessOptions
from megatron_tgdpo.data.records import detect_format, read_records, where
from megatron_tgdpo.errors import UserError
from megatron_tgdpo.json_text import parse_json

# Its columns, and what this project's data layouts call them.
_COLUMNS = {
    "alpaca": {"prompt": "instruction", "query": "input", "history": "history", "system": "system"},
    "sharegpt": {"messages": "conversations", "system": "system"},
}
# Those that it reads where ``columns`` is absent.
_DEFAULT_COLUMNS = {
    "alpaca": {"prompt": "instruction", "query": "input"},
    "sharegpt": {"messages": "conversations"},
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


def dataset_files(info_file: Path, named: Mapping[str, str]) -> tuple[dict[str, list[str]], dict[str, str]]:
    """The paths of datasets' pairs, and how their columns are called.

    Args:
        info_file: ``dataset_info.json``; file names in it are relative to its directory.
        named: ``dataset``, and ``eval_dataset`` if there is one, with their values: names, with commas between.

    Returns:
        For each of these keys its files, in order; and by this project's name of a column that of the files, where it
        is another.

    Raises:
        UserError: An entry is missing, is not a local file of preference pairs, names columns or tags that this
            project's data layouts do not have, or calls its columns otherwise than another.
    """
    try:
        entries = parse_json(info_file.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{info_file}: cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise UserError(f"{info_file}: cannot be read: {error}") from error
    files: dict[str, list[str]] = {key: [] for key in named}
    columns: dict[str, dict[str, str]] = {}
    for key, names in named.items():
        for name in (part.strip() for part in names.split(",")):
            entry = entries.get(name) if isinstance(entries, dict) else None
            if not isinstance(entry, dict):
                raise UserError(f"{info_file}: no entry {name!r}")
            file, columns[name] = _dataset_file(info_file, name, entry)
            files[key].append(file)
    first, *others = columns
    for name in others:
        if columns[name] != columns[first]:
            raise UserError(
                f"{info_file}: {name} calls its columns otherwise than {first} ({_shown(columns[name])}, "
                f"{_shown(columns[first])}), and data.columns is for all files: rename them in the files"
            )
    return files, columns[first]


def _shown(columns: Mapping[str, str]) -> str:
    return ", ".join(f"{ours}: {theirs}" for ours, theirs in columns.items()) or "as here"


def _dataset_file(info_file: Path, name: str, entry: Mapping[str, Any]) -> tuple[str, dict[str, str]]:
    """The file of one entry, and its columns that have another name here."""
    place = f"{info_file}: {name}"
    # What is null is not there; an empty name, as in "query": "", means no such column.
    entry = {key: value for key, value in entry.items() if value is not None}
    columns, tags = _names(entry, "columns", place), _names(entry, "tags", place)
    formatting = _check(entry, columns, tags, place)
    file = info_file.parent / entry["file_name"]
    if not file.is_file():
        raise UserError(f"{place}: {file} is not a file")
    ours = {**_COLUMNS[formatting], **_SIDES}
    # Without columns, these are the reference code's.
    given = columns if "columns" in entry else _DEFAULT_COLUMNS[formatting]
    read = {**_SIDES, **{ours[column]: theirs for column, theirs in given.items()}}
    renamed = {column: theirs for column, theirs in read.items() if column != theirs}
    _check_records(str(file), read, renamed)
    return str(file), renamed


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
        if column not in names:
            raise UserError(f"{place}: columns.{column} is {theirs!r}, which has no counterpart here: take it out")
    for tag, value in tags.items():
        if value not in _TAGS.get(tag, ()):
            raise UserError(f"{place}: tags.{tag} is {value!r}, here only {', '.join(_TAGS.get(tag, ())) or 'nothing'}")
    return formatting


def _check_records(file: str, read: Mapping[str, str], renamed: Mapping[str, str]) -> None:
    """Refuses records in which this project reads more than the reference code, which reads its columns alone.

    Args:
        file: Of the pairs.
        read: Columns that it reads: by their names here, those in the file.
        renamed: As :func:`dataset_files` returns it.
    """
    kind = detect_format(file)
    options = PreprocessOptions("", columns=renamed)
    for raw in read_records(file, kind, renamed.values()):
        place = where(file, kind, raw.number)
        record = decode_record(raw.payload, kind, place, options)
        theirs = record
        if isinstance(record, Mapping):
            theirs = {key: value for key, value in record.items() if key in read}
        try:
            alone = _example(theirs, place)
        except UserError as error:
            names = ", ".join(read.values())
            reason = str(error).removeprefix(f"{place}: ")
            raise UserError(f"{place}: by its columns, of which {names} are read, it is no pair: {reason}") from error
        if _example(record, place) != alone:
            others = [key for key in record if key not in read]
            found = [key for key in others if _example({**theirs, key: record[key]}, place) != alone] or others
            raise UserError(
                f"{place}: has {found[0]!r}, which is read here, and by the reference code only if columns names it: "
                "take it out of the file"
            )


def _example(record: Any, place: str) -> Example:
    return parse_record(record, detect_layout(record, place), place)
