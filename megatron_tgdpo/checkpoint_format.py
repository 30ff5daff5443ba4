"""What a Megatron checkpoint directory is, how it is saved whole or not at all, and how it is read back.

    NAME/__R_N.distcp .metadata metadata.json common.pt    megatron-core's torch_dist files
    NAME/hf/                                               HF config, tokenizer, generation config, chat template
    NAME/tgdpo.json                                        this project's metadata, written last

A save writes to ``NAME.tmp``, syncs it, and renames it: a directory without that ending and with ``tgdpo.json`` is
complete. Global tensor names do not depend on the layout, so any layout can load what any other saved.
"""

import contextlib
import errno
import json
import os
import pickle
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.core import CheckpointingConfig, CheckpointingException, save_config
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, is_main_replica
from megatron.core.dist_checkpointing.state_dict_utils import save_preprocess
from torch.distributed.checkpoint.api import CheckpointException

from megatron_tgdpo.checkpoint_storage import SafeLoadCommon, SafeLoadSharded, write_common, write_sharded
from megatron_tgdpo.errors import UserError
from megatron_tgdpo.ranks import agree

FORMAT_VERSION = 1
METADATA_FILE = "tgdpo.json"
HF_FOLDER = "hf"
ASIDE_SUFFIX = ".tmp"
REMOVING_SUFFIX = ".removing"

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


def save(path: Path, sharded_state_dict: dict[str, Any], hf_dir: Path, metadata: Mapping[str, Any]) -> None:
    """Saves a checkpoint: afterwards ``path`` is complete on every rank's view, or an error is raised on every rank.

    Collective over the default group; ``path`` must be on storage that all ranks share.

    Args:
        path: The checkpoint's directory; it must not exist, or be empty. ``path`` + ``.tmp`` is written first.
        sharded_state_dict: megatron-core's: ShardedTensors, ShardedObjects and factories, and plain values (numbers,
            strings, containers, tensors), which are taken from rank 0. Consumed: do not use it afterwards.
        hf_dir: An HF directory or another Megatron checkpoint, whose config, tokenizer and templates are copied.
        metadata: Goes into ``tgdpo.json``. By convention ``dtype`` (``bf16`` or ``fp32``), ``step`` (None if not from
            training; set if missing) and ``parameters`` (count); anything that JSON holds may be added.

    Raises:
        UserError: On every rank, if any rank failed: ``path`` is not empty, the disk is full, or anything else.
            Nothing is left behind.
    """
    aside = path.with_name(path.name + ASIDE_SUFFIX)
    is_first = dist.get_rank() == 0
    needed = 0
    try:
        _on_first_rank(path, lambda: _begin(path, aside))
        sharded, common = _all_ranks(path, lambda: save_preprocess(sharded_state_dict))
        needed = _total_bytes(sharded)
        _on_first_rank(path, lambda: _check_space(path, needed), needed)
        _on_first_rank(path, lambda: write_common(common, aside), needed)
        _all_ranks(path, lambda: write_sharded(sharded, aside), needed)
        _on_first_rank(path, lambda: _finish(path, aside, hf_dir, metadata), needed)
    except BaseException:
        if is_first and not is_complete(path):
            shutil.rmtree(aside, ignore_errors=True)
        raise


def load(path: Path, sharded_state_dict: dict[str, Any]) -> dict[str, Any]:
    """Loads what ``sharded_state_dict`` asks for, from a checkpoint saved at any layout; the rest is not read.

    Collective over the default group. No file is unpickled freely (see ``checkpoint_storage.py``).

    Returns:
        The plain state dict, with the checkpoint's plain values added. ShardedTensors are filled in place as well.

    Raises:
        UserError: The checkpoint is incomplete or corrupt, or lacks a tensor or has it in another shape.
    """
    read_metadata(path)
    try:
        return dist_checkpointing.load(
            sharded_state_dict, str(path), sharded_strategy=SafeLoadSharded(), common_strategy=SafeLoadCommon()
        )
    except (
        CheckpointingException,
        CheckpointException,
        pickle.UnpicklingError,
        OSError,
        EOFError,
        KeyError,
        ValueError,
        RuntimeError,
    ) as error:
        raise UserError(f"{path}: cannot load: {_describe(error)}") from error


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
    return any((path / name).is_file() for name in (METADATA_FILE, "metadata.json", ".metadata"))


def is_complete(path: Path) -> bool:
    """Whether a save of this directory ended."""
    files = (METADATA_FILE, "metadata.json", ".metadata", "common.pt", f"{HF_FOLDER}/config.json")
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
    """Copies config, tokenizer, generation config and chat templates, no weights and no code, and syncs them.

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
            sync(copy)


def sync(path: Path) -> None:
    """Makes a file or a directory's entries survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _begin(path: Path, aside: Path) -> None:
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise UserError(f"{path}: exists and is not empty, delete it or choose another directory")
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)


def _check_space(path: Path, needed: int) -> None:
    free = shutil.disk_usage(path.parent).free
    if free < needed:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def _finish(path: Path, aside: Path, hf_dir: Path, metadata: Mapping[str, Any]) -> None:
    save_config(CheckpointingConfig("torch_dist", 1), str(aside))
    (aside / HF_FOLDER).mkdir()
    copy_hf_files(hf_dir, aside / HF_FOLDER)
    text = json.dumps({"format_version": FORMAT_VERSION, "step": None, **metadata}, indent=2) + "\n"
    (aside / METADATA_FILE).write_text(text, encoding="utf-8")
    for name in ("common.pt", ".metadata", "metadata.json", METADATA_FILE, HF_FOLDER, "."):
        sync(aside / name)
    aside.rename(path)
    sync(path.parent)


def _total_bytes(sharded: Any) -> int:
    """Bytes of tensor data over all ranks."""
    local = sum(
        item.data.numel() * item.data.element_size()
        for item in nested_values(sharded)
        if isinstance(item, ShardedTensor) and item.data is not None and is_main_replica(item.replica_id)
    )
    sizes: list[int] = [0] * dist.get_world_size()
    dist.all_gather_object(sizes, local)
    return sum(sizes)


def _on_first_rank(path: Path, action: Callable[[], Any], needed: int = 0) -> None:
    _all_ranks(path, action if dist.get_rank() == 0 else lambda: None, needed)


def _all_ranks(path: Path, action: Callable[[], Any], needed: int = 0) -> Any:
    """Runs a step and has all ranks agree that it worked, so that no rank goes on to wait for one that failed."""

    def attempt() -> Any:
        try:
            return action()
        except (Exception, CheckpointException) as error:  # the latter derives from BaseException
            raise UserError(_message(path, error, needed)) from error

    return agree(attempt)


def _message(path: Path, error: BaseException, needed: int) -> str:
    if isinstance(error, UserError):
        return str(error)
    text = f"{path}: saving failed, nothing was changed: {_describe(error)}"
    if needed:
        with contextlib.suppress(OSError):
            text += f"; it needs {needed:,} bytes, {shutil.disk_usage(path.parent).free:,} are free"
    return text


def _describe(error: BaseException) -> str:
    """One line; of DCP's collected failures the first, named by its rank."""
    if isinstance(error, CheckpointException) and error.failures:
        rank, (cause, _) = min(error.failures.items())
        return f"rank {rank}: {_describe(cause)}"
    if isinstance(error, UserError):
        return str(error)
    return f"{type(error).__name__}: {' '.join(str(error).split())[:500]}"
