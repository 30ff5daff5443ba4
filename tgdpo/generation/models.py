"""Model directories for generation and scoring: HF ones as they are, Megatron ones by way of the exporter."""

import hashlib
import multiprocessing
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedModel

from megatron_tgdpo.checkpoints import model_directory
from megatron_tgdpo.checkpoints.adapter_directory import is_adapter
from megatron_tgdpo.checkpoints.find_model import find_local_model
from megatron_tgdpo.checkpoints.manifest import TENSORS_FILE, read_metadata
from megatron_tgdpo.checkpoints.model_directory import is_megatron_checkpoint, is_peft_adapter, model_files
from megatron_tgdpo.console import waiting
from megatron_tgdpo.data.encode import encode_responses
from megatron_tgdpo.data.fields import Message
from megatron_tgdpo.data.layouts import Example
from megatron_tgdpo.data.tokenizers import Tokenizer
from megatron_tgdpo.errors import UserError, one_line
from megatron_tgdpo.storage.dtypes import DTYPES

# For errors of what changed since the command looked at its arguments.
_WHAT = "the model"
_TOKENIZERS = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json")


def default_device() -> torch.device:
    """The first GPU, or the CPU where there is none."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def dtype_of(name: str | None, device: torch.device) -> torch.dtype:
    """A dtype by its name; by default bf16 on a GPU and fp32 on a CPU."""
    return DTYPES[name or ("bf16" if device.type == "cuda" else "fp32")]


@contextmanager
def hf_directory(path: Path, scratch: Path | None = None, base: Path | None = None) -> Iterator[Path]:
    """An HF directory with the model's weights and tokenizer.

    Args:
        path: What ``checkpoints/find_model.py`` takes for a model, of the Hub once it is fetched. A Megatron checkpoint
            is exported, in the dtype it is stored in, and deleted at the end; an adapter, of a LoRA run or of ``peft``,
            is merged with its base. The export initialises torch.distributed with one rank, and ends it.
        scratch: Where exports go; None for the system's temporary directory.
        base: Of an adapter of ``peft``; None for what that names.

    Raises:
        UserError: It is none of these, or it cannot be exported.
    """
    found = find_local_model(path, _WHAT, adapter=True)
    if not (is_megatron_checkpoint(found) or is_adapter(found)):
        yield found
        return
    if scratch is not None and not scratch.is_dir():
        raise UserError(f"--scratch {scratch}: no such directory")
    with tempfile.TemporaryDirectory(prefix="tgdpo-export-", dir=scratch) as folder:
        _export(found, Path(folder) / "hf", base)
        yield Path(folder) / "hf"


def tokenizer_directory(path: Path) -> Path:
    """Where the tokenizer of a model directory lies, without exporting it; of an adapter without one, its base's.

    Raises:
        UserError: It is no model directory.
    """
    found = find_local_model(path, _WHAT, adapter=True)
    if is_peft_adapter(found) and not any((found / name).is_file() for name in _TOKENIZERS):
        found = _base_of(found)
    return model_directory.hf_directory(found)


def fingerprint(path: Path) -> str:
    """sha256 (hex) of a model directory's config and of its weight files' names, sizes and times of change."""
    directory = find_local_model(path, _WHAT, adapter=True)
    config, *weights = model_files(directory)
    digest = hashlib.sha256(config.read_bytes())
    for file in (directory / TENSORS_FILE, *weights):
        if file.is_file():
            status = file.stat()
            digest.update(f"{file.name} {status.st_size} {status.st_mtime_ns}\n".encode())
    if is_peft_adapter(directory):
        digest.update(fingerprint(_base_of(directory)).encode())
    return digest.hexdigest()


def _base_of(adapter: Path) -> Path:
    # Here, because it imports torch.distributed and megatron-core, which HF directories do not need.
    from checkpoints_convert.merge import find_base

    return find_base(adapter, None)


def load_causal_lm(directory: Path, dtype: torch.dtype, device: torch.device) -> PreTrainedModel:
    """Loads a causal language model in evaluation mode; safetensors only, no code of its own.

    Raises:
        UserError: It cannot be loaded.
    """
    return load_model(AutoModelForCausalLM, directory, dtype, device)


def load_model(kind: Any, directory: Path, dtype: torch.dtype, device: torch.device) -> PreTrainedModel:
    """Loads a model with one of transformers' auto classes, as :func:`load_causal_lm` does."""
    try:
        # One of several processes keeps silent: the command's own speaks for all.
        with waiting(f"loading {directory}", shown=multiprocessing.parent_process() is None):
            model = kind.from_pretrained(
                directory, dtype=dtype, local_files_only=True, trust_remote_code=False, use_safetensors=True
            )
    except Exception as error:  # a broken directory raises anything from OSError to the Rust library's own type
        raise UserError(f"{directory}: cannot load the model: {one_line(error)}") from error
    result: PreTrainedModel = model.to(device).eval()
    return result


def stop_ids(generation_config: GenerationConfig | None, tokenizer: Tokenizer) -> list[int]:
    """Ids that end an answer: those of the model's generation config, EOS, and what ends a turn in the template."""
    given = generation_config.eos_token_id if generation_config else None
    ids = set(given if isinstance(given, list) else [given])
    ids.add(tokenizer.eos_id)
    if tokenizer.template is not None:
        _, turn, _ = encode_responses(Example((Message("user", "a"),), "b", "b"), tokenizer, "a probe of the template")
        if any(tokenizer.encode(token) == turn[-1:] for token in tokenizer.special_tokens):
            ids.add(turn[-1])
    return sorted(number for number in ids if number is not None)


def plain_generation(model: PreTrainedModel, stops: list[int]) -> None:
    """Removes sampling settings that came with the model: temperatures, penalties and the like are the caller's."""
    pad = stops[0] if stops else 0
    model.generation_config = GenerationConfig(eos_token_id=stops or None, pad_token_id=pad)


def _export(checkpoint: Path, out: Path, base: Path | None) -> None:
    # Here, because it imports megatron-core, which HF directories do not need.
    from checkpoints_convert.arguments import DEFAULT_SHARD_SIZE, parse_size
    from checkpoints_convert.command_line import dtype_of as stored_dtype
    from checkpoints_convert.command_line import join_ranks
    from checkpoints_convert.export import export_hf
    from checkpoints_convert.merge import find_base, merged_dtype

    size = parse_size("the shard size", DEFAULT_SHARD_SIZE)
    template = checkpoint
    if is_peft_adapter(checkpoint):
        template = base = base or find_base(checkpoint, None)
        stored = merged_dtype(checkpoint, base)
    else:
        stored = stored_dtype(read_metadata(checkpoint), checkpoint)
        base = find_base(checkpoint, None) if is_adapter(checkpoint) else None
    own_group = not dist.is_initialized()
    if own_group:
        join_ranks(timeout_minutes=30.0)
    try:
        export_hf(checkpoint, out, template=template, stored=stored, dtype=stored, max_shard_bytes=size, base=base)
    finally:
        if own_group:
            dist.destroy_process_group()
