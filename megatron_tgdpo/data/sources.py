"""What ``data.train`` and ``data.validation`` may name, and the files that each name stands for."""

import glob
import json
import math
import os
import re
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from megatron_tgdpo.errors import UserError, one_line
from megatron_tgdpo.storage.files import read_error
from megatron_tgdpo.storage.hub import DATASET, fetch, hub_name, local_path

MAX_WEIGHT = 1000.0
_SET_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")
# What the datasets library writes next to the files of `Dataset.save_to_disk` and `DatasetDict.save_to_disk`.
_STATE_FILE = "state.json"
_SPLITS_FILE = "dataset_dict.json"
_DATA_ENDINGS = (".json", ".jsonl", ".ndjson", ".parquet", ".arrow", ".csv", ".tsv")
# Not data, whatever their endings; the datasets library leaves them out, too.
_NOT_DATA = ("config.json", "dataset_info.json", "dataset_infos.json", _STATE_FILE, _SPLITS_FILE)
_SHOWN = 3


@dataclass(frozen=True)
class Source:
    """One entry of ``data.train`` or of a validation set.

    Attributes:
        path: a file, a directory, a glob, a dataset of the Hub (``storage/hub.py``), or the prefix of a preprocessed
            dataset.
        split: of a directory or dataset of the Hub that holds several; None where there is one.
        subset: of one whose README declares several (its ``configs``); None for the default one.
        weight: how often an epoch takes each of its pairs.
    """

    path: str
    split: str | None = None
    subset: str | None = None
    weight: float = 1.0


_KEYS = tuple(field.name for field in fields(Source))


def read_sources(value: Any, key: str) -> tuple[Source, ...]:
    """The entries of a dataset as a configuration has them: a path, a mapping with ``path``, or a list of these.

    Args:
        value: of the key.
        key: its name, for errors.

    Raises:
        UserError: it is something else.
    """
    entries = value if isinstance(value, Sequence) and not isinstance(value, str) else [value]
    if not entries:
        raise UserError(f"{key} is an empty list: name at least one file")
    return tuple(
        _source(entry, key if entries is not value else f"{key}[{number}]") for number, entry in enumerate(entries)
    )


def read_sets(value: Any, key: str) -> dict[str, tuple[Source, ...]]:
    """Datasets by name: of a mapping without ``path``, one for each of its keys; else a single one, named ``""``.

    Args:
        value: of the key; None for no datasets.
        key: its name, for errors.

    Raises:
        UserError: as ``read_sources``, or a name cannot be part of a metric's name.
    """
    if value is None:
        return {}
    if not isinstance(value, Mapping) or "path" in value:
        return {"": read_sources(value, key)}
    if not value:
        raise UserError(f"{key} is an empty mapping: name at least one dataset, or set it to null")
    for name in value:
        if not _SET_NAME.fullmatch(str(name)):
            raise UserError(f"{key}: the name {name!r} may have letters, digits, '_', '-' and '.' only")
    return {str(name): read_sources(entry, f"{key}.{name}") for name, entry in value.items()}


def _source(entry: Any, key: str) -> Source:
    values = entry if isinstance(entry, Mapping) else {"path": entry}
    unknown = [name for name in values if name not in _KEYS]
    if unknown:
        raise UserError(f"{key}: unknown key '{unknown[0]}': an entry has {', '.join(_KEYS)}")
    for name in ("path", "split", "subset"):
        found = values.get(name)
        if not (isinstance(found, str) and found) and not (found is None and name != "path"):
            what = f"{key}.{name}" if isinstance(entry, Mapping) else key
            raise UserError(f"{what} is {found!r}: give a path, in quotes if need be" if name == "path" else
                            f"{what} is {found!r}: give a name")  # fmt: skip
    weight = values.get("weight", 1.0)
    number = isinstance(weight, (int, float)) and not isinstance(weight, bool)
    if not number or not (math.isfinite(weight) and 0 < weight <= MAX_WEIGHT):
        raise UserError(f"{key}.weight is {weight!r}: give a number above 0, at most {MAX_WEIGHT:g}")
    return Source(**{**values, "weight": float(weight)})


def find_files(source: Source) -> list[str]:
    """The raw files that a source stands for, in the order in which they are read: by name, or as a split lists them.

    Raises:
        UserError: there are none, or which of several splits is not said.
        StorageError: a directory cannot be read.
    """
    path = source.path
    if os.path.isdir(path):
        return _files_of_directory(path, source)
    name = hub_name(path)
    if name is not None:
        return _files_of_directory(str(local_path(str(fetch(name, DATASET)), DATASET)), source)
    chosen = next((name for name in ("split", "subset") if getattr(source, name)), None)
    if chosen is not None:
        raise UserError(f"{path}: {chosen} {getattr(source, chosen)!r} is given, but this is no directory: remove it")
    if glob.has_magic(path) and not os.path.exists(path):
        files = sorted(found for found in glob.glob(path, recursive=True) if os.path.isfile(found))
        if not files:
            raise UserError(f"{path}: no file matches")
        return files
    return [path]


def _files_of_directory(path: str, source: Source) -> list[str]:
    if os.path.exists(os.path.join(path, _STATE_FILE)):
        splits = {"": _saved_files(path)}
    elif os.path.exists(os.path.join(path, _SPLITS_FILE)):
        names = _read_json(os.path.join(path, _SPLITS_FILE)).get("splits", [])
        chosen = _choose(source.path, {str(name): [] for name in names}, source.split)
        return _saved_files(os.path.join(path, chosen))
    else:
        splits = _declared_files(path, source.subset)
    return splits[_choose(source.path, splits, source.split)]


def _choose(path: str, splits: Mapping[str, Sequence[str]], split: str | None) -> str:
    named = [name for name in splits if name]
    if split is not None and split not in splits:
        there = f"has {', '.join(named)}" if named else "is a single one"
        raise UserError(f"{path}: no split {split!r}: the dataset {there}")
    if split is None and len(splits) != 1:
        raise UserError(
            f"{path}: holds the splits {', '.join(named)}: say which, as {{path: {path}, split: {named[0]}}}"
            if named
            else f"{path}: holds no split"
        )
    return next(iter(splits)) if split is None else split


def _saved_files(path: str) -> list[str]:
    """The Arrow files of ``datasets.Dataset.save_to_disk``, in their order."""
    state_file = os.path.join(path, _STATE_FILE)
    state = _read_json(state_file)
    if state.get("_indices_data_files"):
        raise UserError(f"{path}: saved with indices by an old datasets library: load it there and save it again")
    try:
        names = [entry["filename"] for entry in state["_data_files"]]
    except (KeyError, TypeError) as error:
        raise UserError(f"{state_file}: lists no files of data: save the dataset again") from error
    files = [os.path.join(path, os.path.basename(name)) for name in names]
    missing = [file for file in files if not os.path.exists(file)]
    if missing or not files:
        raise UserError(f"{missing[0] if missing else path}: missing: the dataset is incomplete, save it again")
    return files


def _read_json(path: str) -> dict[str, Any]:
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise read_error(path, error) from error
    except ValueError as error:
        raise UserError(f"{path}: not readable: {error}: save the dataset again") from error
    if not isinstance(content, dict):
        raise UserError(f"{path}: not readable: save the dataset again")
    return content


def _declared_files(path: str, subset: str | None) -> dict[str, list[str]]:
    """Files by split as the datasets library sees a directory: as its README declares them, else by their names."""
    # Takes a second, which runs from single files need not wait.
    from datasets import load_dataset_builder

    try:
        # It locks what it would make of the files.
        with tempfile.TemporaryDirectory() as scratch:
            found = load_dataset_builder(path, subset, cache_dir=scratch).config.data_files or {}
    except Exception as error:  # of many types, for a directory's content
        raise UserError(
            f"{path}: no dataset in this directory ({one_line(error)}); name files by a list or a glob, as {path}/*"
        ) from error
    splits = {str(split): [str(file) for file in files] for split, files in found.items()}
    _check_all_read(path, splits)
    return splits


def _check_all_read(path: str, splits: Mapping[str, Sequence[str]]) -> None:
    """Refuses a directory of which files would be left out without a word, unless its README says which to read."""
    if any(_declares_files(Path(path) / name) for name in ("README.md", ".huggingface.yaml")):
        return
    read = {os.path.realpath(file) for files in splits.values() for file in files}
    left = []
    for folder, folders, names in os.walk(path):
        folders[:] = [name for name in folders if not name.startswith((".", "__"))]
        files = [os.path.join(folder, name) for name in names if not name.startswith(".") and name not in _NOT_DATA]
        left += [file for file in files if _is_data(file) and os.path.realpath(file) not in read]
    if left:
        raise UserError(
            f"{', '.join(sorted(left)[:_SHOWN])}{' and others' if len(left) > _SHOWN else ''}: in none of the splits "
            f"that the names of the files in {path} make ({', '.join(splits)}): name the files by a list or a glob"
        )


def _declares_files(readme: Path) -> bool:
    try:
        return "data_files" in readme.read_text(encoding="utf-8", errors="replace")
    except FileNotFoundError:
        return False
    except OSError as error:
        raise read_error(readme, error) from error


def _is_data(file: str) -> bool:
    return any(suffix in _DATA_ENDINGS for suffix in Path(file).suffixes)
