"""A LoRA checkpoint's base model, and its weights with the adapter added to them, a piece at a time."""

import os
from collections.abc import Callable, Mapping
from functools import reduce
from pathlib import Path

import torch
from torch import Tensor
from transformers import PretrainedConfig

from checkpoints_convert.check_parameters import check_checkpoint
from checkpoints_convert.command_line import dtype_of
from checkpoints_convert.pieces import Piece
from megatron_tgdpo.checkpoints.adapter_directory import read_base, read_peft_config, read_peft_tensors
from megatron_tgdpo.checkpoints.find_model import find_local_model, find_model, naming
from megatron_tgdpo.checkpoints.manifest import read_metadata
from megatron_tgdpo.checkpoints.model_directory import (
    ADAPTER_CONFIG,
    is_megatron_checkpoint,
    is_peft_adapter,
    model_files,
)
from megatron_tgdpo.checkpoints.reader import CheckpointReader
from megatron_tgdpo.data.manifest import digest_file
from megatron_tgdpo.errors import UserError
from megatron_tgdpo.models.hf_weights.check import open_hf
from megatron_tgdpo.models.hf_weights.mapping import Heads
from megatron_tgdpo.models.hf_weights.reader import HfCheckpoint
from megatron_tgdpo.setup.fingerprints import HASHES_FILE, known_hashes, shares, weights_fingerprint
from megatron_tgdpo.storage.atomic_directory import AtomicDirectory

# Gives a piece as parts of HF tensors: their name, the first row, the rows.
ReadPiece = Callable[[Piece], list[tuple[str, int, Tensor]]]


def find_base(checkpoint: Path, given: str | Path | None) -> Path:
    """The directory of an adapter's base model: the one that is given, else the run's ``model.policy``, or what a
    ``peft`` directory calls it, a path or a model of the Hub.

    Raises:
        UserError: It is not there, or no whole model; the message names ``--base``, or the entry to set.
        StorageError: It cannot be read, or the Hub failed.
    """
    if given is not None:
        return find_model(given, "--base")
    if is_peft_adapter(checkpoint):
        named, fix = read_peft_config(checkpoint)[1], f"base_model_name_or_path in its {ADAPTER_CONFIG}"
        if named is None:
            raise UserError(f"{checkpoint}: it does not say what its base model is: set {fix}")
        with naming(f"{checkpoint}: its base", f": set {fix} to where that is"):
            return find_model(named, "base_model_name_or_path")
    recorded = ((read_metadata(checkpoint).get("config") or {}).get("model") or {}).get("policy")
    if recorded is None:
        raise UserError(f"{checkpoint}: it does not say what its base model is: name that with --base")
    with naming(f"{checkpoint}: its base", ": name it with --base"):
        return find_local_model(recorded, "model.policy")


def check_base(base: Path, checkpoint: Path, directory: AtomicDirectory) -> None:
    """Compares the sha256 of a base model's weights with the one that an adapter's directory has. Collective.

    The same weights in other files, as in the other format, are another base. Ranks divide the files. Those that the
    checkpoint's run has read before, and that are as they were, are not read.

    Raises:
        UserError: On every rank: it is another model, or cannot be read.
    """
    wanted = directory.run_on_all_ranks(lambda: read_base(checkpoint))
    if wanted is None:
        return
    rank, ranks = torch.distributed.get_rank(), torch.distributed.get_world_size()

    def hash_share() -> dict[str, str]:
        sizes = {os.path.abspath(file): file.stat().st_size for file in model_files(base)}
        mine = shares(sizes, ranks)[rank]
        known = known_hashes(mine, checkpoint.absolute().parent.parent / HASHES_FILE)
        return {path: known.get(path) or digest_file(path).sha256 for path in mine}

    digests = directory.collect(directory.run_on_all_ranks(hash_share))

    fix = "name the right one with --base"
    if is_peft_adapter(checkpoint):
        fix = f"set base_model_name_or_path in its {ADAPTER_CONFIG} to the right one"

    def compare() -> None:
        found = weights_fingerprint(base, digests)
        if found != wanted:
            raise UserError(
                f"{base}: not the base model of {checkpoint}: the sha256 of its weights is {found[:12]}, not "
                f"{wanted[:12]}: {fix}"
            )

    directory.run_on_rank0(compare)


def read_megatron(path: Path, hf_config: PretrainedConfig, stored: torch.dtype) -> ReadPiece:
    """Reads from a Megatron checkpoint, after comparing its tensors with the config.

    Raises:
        UserError: They are not what the config asks for.
    """
    reader, heads = CheckpointReader(path), Heads.of(hf_config)
    check_checkpoint(reader, hf_config, stored)
    return lambda piece: piece.to_hf(piece.read_megatron(reader), heads, hf_config.vocab_size)


def read_hf(path: Path, hf_config: PretrainedConfig) -> ReadPiece:
    """Reads from an HF directory, after comparing its tensors with the config.

    Raises:
        UserError: They are not what the config asks for.
    """
    checkpoint = open_hf(path, hf_config)

    def read(piece: Piece) -> list[tuple[str, int, Tensor]]:
        names = [name for name, _ in piece.parameter.hf_tensors]
        expert = piece.parameter.expert
        if piece.parameter.is_stacked and expert is not None:
            return [(name, expert, checkpoint.rows(name, expert, expert + 1)) for name in names]
        if piece.hf_index is None:
            return [(name, 0, checkpoint.whole(name)) for name in names]
        name = names[piece.hf_index]
        return [(name, piece.hf_start, checkpoint.rows(name, piece.hf_start, piece.hf_end))]

    return read


def merged_dtype(adapter: Path, base: Path) -> torch.dtype:
    """The dtype that holds what a base model and a ``peft`` adapter on it are stored in.

    A base in bf16 would round a good part of what an adapter in fp32 has learned away.
    """
    dtypes = {tensor.dtype for tensor in read_peft_tensors(adapter).values()}
    if is_megatron_checkpoint(base):
        dtypes.add(dtype_of(read_metadata(base), base))
    else:
        dtypes.update(info.torch_dtype for info in HfCheckpoint(base).tensors.values())
    return reduce(torch.promote_types, dtypes)


def read_base_model(path: Path, hf_config: PretrainedConfig) -> ReadPiece:
    """Reads from either kind of directory; see :func:`read_megatron` and :func:`read_hf`."""
    if is_megatron_checkpoint(path):
        return read_megatron(path, hf_config, dtype_of(read_metadata(path), path))
    return read_hf(path, hf_config)


def merged(read: ReadPiece, adapter: Mapping[str, Tensor], scale: float) -> ReadPiece:
    """Reads ``W + scale * B @ A``, in fp32, where the adapter has an A and a B, and all else as it is.

    Args:
        read: Reads the base model.
        adapter: From :func:`~checkpoints_convert.export_adapter.adapter_tensors`.
        scale: Of the adapter.
    """

    def add(name: str, first: int, rows: Tensor) -> Tensor:
        linear = name.removesuffix(".weight")
        if f"{linear}.lora_A.weight" not in adapter:
            return rows
        a, b = (adapter[f"{linear}.lora_{which}.weight"].float() for which in "AB")
        return rows.float().addmm(b[first : first + rows.shape[0]], a, alpha=scale)

    return lambda piece: [(name, first, add(name, first, rows)) for name, first, rows in read(piece)]
