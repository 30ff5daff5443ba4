"""The manifest of a Megatron checkpoint: what its files are, and whether all of them are there as written.

    NAME/__R_N.distcp .metadata metadata.json common.pt    megatron-core's torch_dist files
    NAME/hf/                                               HF config, tokenizer, generation config, chat template
    NAME/tgdpo.json                                        this project's metadata and manifest, written last

The manifest is what ties the files together: it names each of them with size and sha256, and has a sha256 of itself.
Whoever reads a checkpoint reads it first. Checkpoints written before there was a manifest are known by the files that
each must have.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from megatron_tgdpo.errors import DamageError, UserError
from megatron_tgdpo.storage.atomic_file import SUFFIX as UNFINISHED_SUFFIX
from megatron_tgdpo.storage.files import FileDigest, file_digest, read_error
from megatron_tgdpo.storage.json_text import parse_json

FORMAT_VERSION = 1
METADATA_FILE = "tgdpo.json"
HF_FOLDER = "hf"
COMMON_FILE = "common.pt"
TENSORS_FILE = ".metadata"
# Of a rank's tensors: all but these files are small.
TENSORS_SUFFIX = ".distcp"
FORMAT_FILE = "metadata.json"
# What megatron-core's loader looks for first.
FORMAT = {
    "sharded_backend": "torch_dist",
    "sharded_backend_version": 1,
    "common_backend": "torch",
    "common_backend_version": 1,
}

_NONE = type(None)
# Of the metadata that is read again; none may be missing from an older checkpoint.
_TYPES: dict[str, tuple[type, ...]] = {
    "step": (int, _NONE),
    "consumed_pairs": (int, _NONE),
    "config": (dict, _NONE),
    "inputs": (dict, _NONE),
    "changes": (list, _NONE),
    "data_fingerprint": (str, _NONE),
    "dtype": (str, _NONE),
}
_FILES_WITHOUT_MANIFEST = (METADATA_FILE, FORMAT_FILE, TENSORS_FILE, COMMON_FILE, f"{HF_FOLDER}/config.json")


@dataclass(frozen=True)
class Manifest:
    """The content of ``tgdpo.json``.

    Attributes:
        metadata: What the checkpoint says of itself.
        files: Size and sha256 of every other file, by its name in the checkpoint; None in one that was written before
            there was a manifest.
    """

    metadata: dict[str, Any]
    files: dict[str, FileDigest] | None


def read_manifest(path: Path) -> Manifest:
    """Reads ``tgdpo.json``.

    Raises:
        DamageError: It is missing or not as it was written.
        UserError: It is of a format version that this code does not know.
        StorageError: It cannot be read.
    """
    file = path / METADATA_FILE
    if path.name.endswith(UNFINISHED_SUFFIX):
        raise DamageError(f"{path}: not a complete Megatron checkpoint of this project: its save did not end")
    try:
        text = file.read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        raise DamageError(f"{path}: not a complete Megatron checkpoint of this project: no {METADATA_FILE}") from None
    except (OSError, MemoryError) as error:
        raise read_error(file, error) from error
    try:
        content = parse_json(text)
        version, files, digest = content["format_version"], content.pop("files", None), content.pop("sha256", None)
        if files is not None:
            files = {name: FileDigest(**entry) for name, entry in files.items()}
        _check_types(content, files or {})
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DamageError(f"{file}: not readable: {error!r}") from error
    if version != FORMAT_VERSION:
        raise UserError(f"{file}: format_version is {version}, this version reads {FORMAT_VERSION}")
    if (files is None) != (digest is None) or (files is not None and digest != _own_digest(content, files)):
        raise DamageError(f"{file}: its content is not what was written: its sha256 is another")
    return Manifest(content, files)


def _check_types(metadata: Mapping[str, Any], files: Mapping[str, FileDigest]) -> None:
    """Raises TypeError for what this project does not write, as what reads the manifest relies on it."""
    for key, kinds in _TYPES.items():
        if not isinstance(metadata.get(key), kinds):
            raise TypeError(f"{key} is {metadata[key]!r}")
    if not all(isinstance(value, str | None) for value in (metadata.get("inputs") or {}).values()):
        raise TypeError("inputs are not fingerprints")
    if not all(isinstance(change, dict) for change in metadata.get("changes") or []):
        raise TypeError("changes are not changes")
    for name, digest in files.items():
        path = PurePosixPath(name)
        if not name.isprintable() or path.is_absolute() or not path.parts or ".." in path.parts:
            raise TypeError(f"file name {name!r} leads out of the checkpoint")
        if type(digest.size) is not int or not isinstance(digest.sha256, str):
            raise TypeError(f"{name} has the digest {digest}")


def read_metadata(path: Path) -> dict[str, Any]:
    """The metadata of :func:`read_manifest`, which see."""
    return read_manifest(path).metadata


def _own_digest(metadata: Mapping[str, Any], files: Mapping[str, FileDigest]) -> str:
    content = {"metadata": metadata, "files": {name: asdict(digest) for name, digest in files.items()}}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def check_files(path: Path) -> Manifest:
    """Checks that every file of a checkpoint is there and has its size, and the content of all small ones.

    What it costs does not depend on the model's size; ``checkpoints/integrity.py`` reads the tensors as well.

    Raises:
        DamageError: The checkpoint is incomplete or damaged; the message names the file.
        UserError: It is of another format version.
        StorageError: A file cannot be read.
    """
    manifest = read_manifest(path)
    if manifest.files is None:
        for name in _FILES_WITHOUT_MANIFEST:
            file_size(path / name)
        _check_format(path / FORMAT_FILE)
        return manifest
    for name, written in manifest.files.items():
        size = file_size(path / name)
        if size != written.size:
            raise DamageError(f"{path / name}: {size:,} bytes, {written.size:,} were written")
    for name, written in manifest.files.items():
        if not name.endswith(TENSORS_SUFFIX):
            check_file(path / name, written)
    return manifest


def check_file(file: Path, written: FileDigest) -> None:
    """Reads a file whole and compares its content with what was written.

    Raises:
        DamageError: It is another.
        StorageError: It cannot be read.
    """
    with _missing_is_damage(file):
        found = file_digest(file)
    if found != written:
        raise DamageError(f"{file}: its bytes are not those that were written")


@contextmanager
def _missing_is_damage(file: Path) -> Iterator[None]:
    try:
        yield
    except (FileNotFoundError, NotADirectoryError):
        raise DamageError(f"{file}: missing") from None
    except (OSError, MemoryError) as error:
        raise read_error(file, error) from error


def _check_format(file: Path) -> None:
    """Of a checkpoint without a manifest: megatron-core's loader looks for these keys first."""
    try:
        content = parse_json(file.read_bytes())
    except OSError as error:
        raise read_error(file, error) from error
    except ValueError as error:
        raise DamageError(f"{file}: not readable: {error!r}") from error
    if not isinstance(content, dict) or not content.keys() >= FORMAT.keys():
        raise DamageError(f"{file}: it does not name the checkpoint's format")
    for key, known in FORMAT.items():
        if content[key] != known:
            raise UserError(f"{file}: {key} is {content[key]!r}, this version reads {known!r}")


def file_size(file: Path) -> int:
    """A file's size in bytes.

    Raises:
        DamageError: It is missing.
        StorageError: It cannot be read.
    """
    with _missing_is_damage(file):
        return file.stat().st_size


def write_manifest(directory: Path, metadata: Mapping[str, Any], files: Mapping[str, FileDigest]) -> None:
    """Writes ``tgdpo.json``.

    Args:
        directory: With all other files of the checkpoint.
        metadata: What the checkpoint says of itself; ``step`` is None if missing.
        files: Their digests by name.

    Raises:
        OSError: It cannot be written.
    """
    # As it will be read: keys are strings there, and tuples lists.
    content = json.loads(json.dumps({"format_version": FORMAT_VERSION, "step": None, **metadata}))
    digest = _own_digest(content, files)
    content |= {"files": {name: asdict(files[name]) for name in sorted(files)}, "sha256": digest}
    (directory / METADATA_FILE).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
