"""Finds the file behind a dataset's name in LLaMA-Factory's ``dataset_info.json``."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_tgdpo.errors import UserError

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
        entries = json.loads(info_file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{info_file}: cannot be read: {error}") from error
    if "," in name:
        raise UserError(f"dataset: {name} are several datasets: join their files and give the path with --train")
    entry = entries.get(name) if isinstance(entries, dict) else None
    if not isinstance(entry, dict):
        raise UserError(f"{info_file}: no entry {name!r}")
    _check(entry, f"{info_file}: {name}")
    file = info_file.parent / entry["file_name"]
    if not file.is_file():
        raise UserError(f"{info_file}: {name}: {file} is not a file")
    return str(file)


def _check(entry: Mapping[str, Any], place: str) -> None:
    for key in _SOURCES:
        if key in entry:
            raise UserError(f"{place}: {key} is not downloaded here: fetch the data and give its path with --train")
    unknown = sorted(entry.keys() - _UNDERSTOOD)
    if unknown:
        raise UserError(f"{place}: {unknown[0]} has no counterpart here: prepare the file and give it with --train")
    if "file_name" not in entry or not entry.get("ranking"):
        raise UserError(f"{place}: not a file of preference pairs (file_name, and ranking: true)")
    formatting = entry.get("formatting", "alpaca")
    if formatting not in _COLUMNS:
        raise UserError(f"{place}: formatting {formatting!r} is not supported, only {', '.join(_COLUMNS)}")
    names = {**_COLUMNS[formatting], **_SIDES}
    for column, theirs in entry.get("columns", {}).items():
        if names.get(column) != theirs:
            wanted = f"must be called {names[column]!r}" if column in names else "has no counterpart"
            raise UserError(f"{place}: columns.{column} is {theirs!r}, which {wanted} here: rename it in the file")
    for tag, value in entry.get("tags", {}).items():
        if value not in _TAGS.get(tag, ()):
            raise UserError(f"{place}: tags.{tag} is {value!r}, here only {', '.join(_TAGS.get(tag, ())) or 'nothing'}")
