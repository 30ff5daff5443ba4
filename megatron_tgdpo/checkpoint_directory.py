"""What a Megatron checkpoint directory is, and which of them are complete.

    NAME/__R_N.distcp .metadata metadata.json common.pt    megatron-core's torch_dist files
    NAME/hf/                                               HF config, tokenizer, generation config, chat template
    NAME/tgdpo.json                                        this project's metadata, written last

A save writes to ``NAME.tmp`` and renames it: a directory without that ending and with ``tgdpo.json`` is complete.
"""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_tgdpo.aside import SUFFIX as ASIDE_SUFFIX
from megatron_tgdpo.errors import UserError

FORMAT_VERSION = 1
METADATA_FILE = "tgdpo.json"
HF_FOLDER = "hf"
COMMON_FILE = "common.pt"
TENSORS_FILE = ".metadata"
REMOVING_SUFFIX = ".removing"

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


def read_metadata(path: Path) -> dict[str, Any]:
    """Reads ``tgdpo.json``.

    Raises:
        UserError: It is missing or malformed, or of a format version that this code does not know.
    """
    file = path / METADATA_FILE
    if path.name.endswith(ASIDE_SUFFIX) or not file.is_file():
        raise UserError(f"{path}: not a complete Megatron checkpoint of this project: no {METADATA_FILE}")
    try:
        metadata = json.loads(file.read_text(encoding="utf-8"))
        version = metadata["format_version"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{file}: not readable: {error!r}") from error
    if version != FORMAT_VERSION:
        raise UserError(f"{file}: format_version is {version}, this version reads {FORMAT_VERSION}")
    return metadata


def is_megatron_checkpoint(path: Path) -> bool:
    """Whether this is a Megatron checkpoint directory, whole or not, rather than an HF one."""
    return any((path / name).is_file() for name in (METADATA_FILE, _FORMAT_FILE, TENSORS_FILE))


def is_complete(path: Path) -> bool:
    """Whether a save of this directory ended."""
    files = (METADATA_FILE, _FORMAT_FILE, TENSORS_FILE, COMMON_FILE, f"{HF_FOLDER}/config.json")
    return not path.name.endswith(ASIDE_SUFFIX) and all((path / name).is_file() for name in files)


def remove_incomplete(directory: Path) -> list[Path]:
    """Deletes what interrupted saves and removals left in a directory of checkpoints.

    Call it on one rank, with no save running.

    Returns:
        The directories that were deleted.
    """
    suffixes = (ASIDE_SUFFIX, REMOVING_SUFFIX)
    left = [path for path in sorted(directory.glob("step_*")) if path.name.endswith(suffixes) and path.is_dir()]
    for path in left:
        shutil.rmtree(path)
    return left


def complete_checkpoints(output_dir: Path) -> list[Path]:
    """The complete ``checkpoints/step_XXXXXXXX`` of a training output directory, lowest step first."""
    found = (output_dir / "checkpoints").glob("step_*")
    complete = [path for path in found if path.name[5:].isdigit() and is_complete(path)]
    return sorted(complete, key=lambda path: int(path.name[5:]))


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


def copy_hf_files(source: Path, target: Path) -> None:
    """Copies config, tokenizer, generation config and chat templates, no weights and no code.

    Args:
        source: An HF directory, or a Megatron checkpoint.
        target: An existing directory.
    """
    source = hf_folder(source)
    files = [source / name for name in _HF_FILES]
    files += [file for file in sorted(source.iterdir()) if file.suffix in _HF_SUFFIXES]
    files += [file for folder in _HF_FOLDERS for file in sorted((source / folder).glob("*.jinja"))]
    for file in files:
        if file.is_file():
            copy = target / file.relative_to(source)
            copy.parent.mkdir(exist_ok=True)
            shutil.copyfile(file, copy)


def write_description(directory: Path, hf_dir: Path, metadata: Mapping[str, Any]) -> None:
    """Adds to a directory of tensors what makes it a checkpoint of this project: ``tgdpo.json`` last.

    Args:
        directory: With the tensors, not yet renamed.
        hf_dir: An HF directory or another Megatron checkpoint, whose config, tokenizer and templates are copied.
        metadata: Goes into ``tgdpo.json``.
    """
    (directory / _FORMAT_FILE).write_text(json.dumps(_FORMAT), encoding="utf-8")
    (directory / HF_FOLDER).mkdir()
    copy_hf_files(hf_dir, directory / HF_FOLDER)
    text = json.dumps({"format_version": FORMAT_VERSION, "step": None, **metadata}, indent=2) + "\n"
    (directory / METADATA_FILE).write_text(text, encoding="utf-8")
