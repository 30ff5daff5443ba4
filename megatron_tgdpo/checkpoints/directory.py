"""What a Megatron checkpoint directory is, and which of them are complete.

    NAME/__R_N.distcp .metadata metadata.json common.pt    megatron-core's torch_dist files
    NAME/hf/                                               HF config, tokenizer, generation config, chat template
    NAME/tgdpo.json                                        this project's metadata and manifest, written last

The manifest is what ties the files together: it names each of them with size and sha256, and has a sha256 of itself.
Whoever reads a checkpoint reads it first. Checkpoints written before there was a manifest are known by the files that
each must have.

A save writes under a temporary name (``storage/atomic_file.py``) and renames: a directory without that ending and with
all its files is complete.
"""

import hashlib
import json
import logging
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from megatron_tgdpo.errors import DamageError, StorageError, UserError
from megatron_tgdpo.storage.atomic_file import SUFFIX as ASIDE_SUFFIX
from megatron_tgdpo.storage.files import FileDigest, file_digest, read_error
from megatron_tgdpo.storage.json_text import parse_json
from megatron_tgdpo.storage.links import real_file

logger = logging.getLogger(__name__)

FORMAT_VERSION = 1
METADATA_FILE = "tgdpo.json"
HF_FOLDER = "hf"
COMMON_FILE = "common.pt"
TENSORS_FILE = ".metadata"
REMOVING_SUFFIX = ".removing"
DAMAGED_SUFFIX = ".damaged"
# Of a rank's tensors: all but these files are small.
TENSORS_SUFFIX = ".distcp"

_FORMAT_FILE = "metadata.json"
# What megatron-core's loader looks for first.
_FORMAT = {
    "sharded_backend": "torch_dist",
    "sharded_backend_version": 1,
    "common_backend": "torch",
    "common_backend_version": 1,
}

_HF_FILES = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "chat_template.json",
    "chat_template.jinja",
)
_HF_SUFFIXES = (".model", ".tiktoken")
_HF_FOLDERS = ("additional_chat_templates",)
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
_FILES_WITHOUT_MANIFEST = (METADATA_FILE, _FORMAT_FILE, TENSORS_FILE, COMMON_FILE, f"{HF_FOLDER}/config.json")


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
    if path.name.endswith(ASIDE_SUFFIX):
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
            _size(path / name)
        _check_format(path / _FORMAT_FILE)
        return manifest
    for name, written in manifest.files.items():
        size = _size(path / name)
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


def check_hf_files(path: Path, name: str | None = None) -> None:
    """Checks config, tokenizer and templates of a Megatron checkpoint; an HF directory says nothing of its own.

    Args:
        path: An HF directory or a Megatron checkpoint.
        name: The only file to check; all of them by default.

    Raises:
        DamageError: One is missing or damaged.
        StorageError: One cannot be read.
    """
    if is_megatron_checkpoint(path):
        for found, written in (read_manifest(path).files or {}).items():
            folder, _, rest = found.partition("/")
            if folder == HF_FOLDER and name in (None, rest):
                check_file(path / found, written)


def _size(file: Path) -> int:
    with _missing_is_damage(file):
        return file.stat().st_size


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
    if not isinstance(content, dict) or not content.keys() >= _FORMAT.keys():
        raise DamageError(f"{file}: it does not name the checkpoint's format")
    for key, known in _FORMAT.items():
        if content[key] != known:
            raise UserError(f"{file}: {key} is {content[key]!r}, this version reads {known!r}")


def is_megatron_checkpoint(path: Path) -> bool:
    """Whether this is a Megatron checkpoint directory, whole or not, rather than an HF one."""
    return any((path / name).is_file() for name in (METADATA_FILE, _FORMAT_FILE, TENSORS_FILE))


def is_complete(path: Path) -> bool:
    """Whether :func:`check_files` finds nothing.

    Raises:
        UserError: It is of another format version.
        StorageError: A file cannot be read.
    """
    try:
        check_files(path)
    except DamageError:
        return False
    return True


def remove_incomplete(directory: Path) -> list[Path]:
    """Deletes what interrupted saves and removals left in a directory of checkpoints.

    Call it on one rank, with no save running.

    Returns:
        The directories that were deleted.

    Raises:
        StorageError: One cannot be deleted, or the directory cannot be read.
    """
    suffixes = (ASIDE_SUFFIX, REMOVING_SUFFIX)
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
    found = [path for path in _entries(output_dir / "checkpoints") if path.name[5:].isdigit()]
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


def remove_checkpoint(path: Path) -> None:
    """Deletes a checkpoint; renamed first, so that one whose removal is interrupted is not taken for complete."""
    shutil.rmtree(path.rename(path.with_name(path.name + REMOVING_SUFFIX)))


def hf_folder(path: Path) -> Path:
    """Where the HF files of a checkpoint are: its ``hf/`` subfolder, or itself if it is an HF directory."""
    return path / HF_FOLDER if (path / HF_FOLDER / "config.json").is_file() else path


def hf_files(source: Path) -> dict[str, Path]:
    """Config, tokenizer, generation config and chat templates of a model directory, no weights and no code.

    Args:
        source: An HF directory, or a Megatron checkpoint.

    Returns:
        The file to read, by its name relative to the HF files.

    Raises:
        UserError: One is a link out of the directory.
        StorageError: One cannot be read.
    """
    folder = hf_folder(source)
    try:
        files = [folder / name for name in _HF_FILES]
        files += [file for file in sorted(folder.iterdir()) if file.suffix in _HF_SUFFIXES]
        files += [file for name in _HF_FOLDERS for file in sorted((folder / name).glob("*.jinja"))]
        return {str(file.relative_to(folder)): real_file(file, source) for file in files if file.is_file()}
    except OSError as error:
        raise read_error(source, error) from error


def copy_hf_files(source: Path, target: Path) -> None:
    """Copies :func:`hf_files`.

    Args:
        source: An HF directory, or a Megatron checkpoint.
        target: An existing directory.

    Raises:
        DamageError: A file is damaged: a checkpoint's manifest says so, or it ends in the middle of its JSON.
        UserError: One is a link out of the directory.
        StorageError: One cannot be read.
        OSError: One cannot be written.
    """
    check_hf_files(source)
    for name, file in hf_files(source).items():
        try:
            content = file.read_bytes()
        except OSError as error:
            raise read_error(file, error) from error
        if name.endswith(".json"):
            _check_json(hf_folder(source) / name, content)
        copy = target / name
        copy.parent.mkdir(exist_ok=True)
        copy.write_bytes(content)


def _check_json(file: Path, content: bytes) -> None:
    try:
        parse_json(content)
    except ValueError as error:
        raise DamageError(f"{file}: not readable: {error}: truncated or damaged, get it again") from error


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
    (directory / _FORMAT_FILE).write_text(json.dumps(_FORMAT), encoding="utf-8")
    (directory / HF_FOLDER).mkdir()
    copy_hf_files(hf_dir, directory / HF_FOLDER)
    files = dict(digests)
    for name, written in files.items():
        size = _size(directory / name)
        if size != written.size:
            raise UserError(f"{directory / name}: {size:,} bytes are here, its rank wrote {written.size:,}")
    small = [directory / _FORMAT_FILE, directory / TENSORS_FILE, directory / COMMON_FILE]
    for file in [*small, *sorted((directory / HF_FOLDER).rglob("*"))]:
        if file.is_file():
            files[str(file.relative_to(directory))] = file_digest(file)
    # As it will be read: keys are strings there, and tuples lists.
    content = json.loads(json.dumps({"format_version": FORMAT_VERSION, "step": None, **metadata}))
    digest = _own_digest(content, files)
    content |= {"files": {name: asdict(files[name]) for name in sorted(files)}, "sha256": digest}
    (directory / METADATA_FILE).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
