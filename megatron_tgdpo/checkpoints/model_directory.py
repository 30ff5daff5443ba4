"""What is in a model directory, an HF one or a Megatron checkpoint: its config and tokenizer, and its weights."""

from collections.abc import Container, Iterable
from pathlib import Path

from megatron_tgdpo.checkpoints.manifest import (
    FORMAT_FILE,
    HF_FOLDER,
    METADATA_FILE,
    TENSORS_FILE,
    TENSORS_SUFFIX,
    check_file,
    read_manifest,
)
from megatron_tgdpo.errors import DamageError, UserError
from megatron_tgdpo.storage.files import read_error
from megatron_tgdpo.storage.json_text import parse_json
from megatron_tgdpo.storage.links import real_file

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
# Of a LoRA adapter as peft writes it.
ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
# What is of the whole model, and not of an adapter.
OF_WHOLE_MODEL = ("config.json", "generation_config.json")
_ADAPTER = (ADAPTER_CONFIG, ADAPTER_WEIGHTS, "adapter_model.bin")
_WEIGHT_SUFFIXES = (".safetensors", TENSORS_SUFFIX)
_ANY_WEIGHTS = (*_WEIGHT_SUFFIXES, ".bin", ".pt", ".pth")


def is_megatron_checkpoint(path: Path) -> bool:
    """Whether this is a Megatron checkpoint directory, whole or not, rather than an HF one."""
    return any((path / name).is_file() for name in (METADATA_FILE, FORMAT_FILE, TENSORS_FILE))


def hf_directory(path: Path) -> Path:
    """Where a model directory keeps its config and tokenizer: itself, or ``hf/`` in a Megatron checkpoint."""
    return path / HF_FOLDER if is_megatron_checkpoint(path) else path


def is_peft_adapter(path: Path) -> bool:
    """Whether a directory holds a LoRA adapter as ``peft`` writes it, and not a whole model.

    Some tools leave the base model's config beside it, which makes no model of it.
    """
    return (path / ADAPTER_CONFIG).is_file() and not _has_whole_model(path)


def _has_whole_model(path: Path) -> bool:
    if not (path / "config.json").is_file():
        return False
    names = [file.name for file in path.iterdir() if file.suffix in _ANY_WEIGHTS]
    return any(name not in _ADAPTER for name in names)


def model_files(path: Path) -> list[Path]:
    """``config.json``, then every weight file of a model directory by name: what makes it this model, or adapter.

    Raises:
        UserError: There are no weight files, or no such directory.
        StorageError: It cannot be read.
    """
    try:
        if is_peft_adapter(path):
            return [path / ADAPTER_CONFIG, path / ADAPTER_WEIGHTS]
        weights = sorted(file for file in path.iterdir() if file.suffix in _WEIGHT_SUFFIXES)
        config = hf_directory(path) / "config.json"
    except OSError as error:
        raise read_error(path, error) from error
    if not weights:
        raise UserError(f"{path}: no weight files ({', '.join(_WEIGHT_SUFFIXES)}) there")
    return [config, *weights]


def refuse_adapter(path: Path, tensors: Iterable[str] = ()) -> None:
    """Stops at a LoRA adapter, which has not all weights, and at one beside a whole model: transformers would take
    the adapter and its base, and not the weights that are there.

    Args:
        path: A directory.
        tensors: The names of its tensors, if known.

    Raises:
        UserError: It is one.
    """
    here = [name for name in _ADAPTER if (path / name).is_file()]
    if ADAPTER_CONFIG in here and _has_whole_model(path):
        raise UserError(
            f"{path}: a whole model and a LoRA adapter ({ADAPTER_CONFIG}) in one directory: move one of them elsewhere"
        )
    found = here if ADAPTER_CONFIG in here or not (path / "config.json").is_file() else []
    found += [name for name in tensors if ".lora_" in name]
    if found:
        raise UserError(
            f"{path}: a LoRA adapter ({found[0]}), not a whole model: in training it may be lora.adapter, "
            "model.reference or model.guide; elsewhere merge it into its base model first (peft's merge_and_unload)"
        )


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
    folder = hf_directory(source)
    try:
        files = [folder / name for name in _HF_FILES]
        files += [file for file in sorted(folder.iterdir()) if file.suffix in _HF_SUFFIXES]
        files += [file for name in _HF_FOLDERS for file in sorted((folder / name).glob("*.jinja"))]
        return {str(file.relative_to(folder)): real_file(file, source) for file in files if file.is_file()}
    except OSError as error:
        raise read_error(source, error) from error


def copy_hf_files(source: Path, target: Path, without: Container[str] = ()) -> None:
    """Copies :func:`hf_files`.

    Args:
        source: An HF directory, or a Megatron checkpoint.
        target: An existing directory.
        without: Names that are not copied.

    Raises:
        DamageError: A file is damaged: a checkpoint's manifest says so, or it ends in the middle of its JSON.
        UserError: One is a link out of the directory.
        StorageError: One cannot be read.
        OSError: One cannot be written.
    """
    check_hf_files(source)
    for name, file in hf_files(source).items():
        if name in without:
            continue
        try:
            content = file.read_bytes()
        except OSError as error:
            raise read_error(file, error) from error
        if name.endswith(".json"):
            _check_json(hf_directory(source) / name, content)
        copy = target / name
        copy.parent.mkdir(exist_ok=True)
        copy.write_bytes(content)


def _check_json(file: Path, content: bytes) -> None:
    try:
        parse_json(content)
    except ValueError as error:
        raise DamageError(f"{file}: not readable: {error}: truncated or damaged, get it again") from error
