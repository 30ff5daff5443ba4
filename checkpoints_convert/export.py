"""A Megatron checkpoint into an HF directory, a piece at a time: memory holds two pieces, however large the model."""

import itertools
import json
import logging
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from transformers import PretrainedConfig

from checkpoints_convert.export_adapter import adapter_tensors
from checkpoints_convert.merge import ReadPiece, check_base, merged, read_base_model, read_megatron
from checkpoints_convert.model_card import CARD_FILE, model_card
from checkpoints_convert.pieces import FiniteCheck, Piece, converted, pieces_of, share
from checkpoints_convert.safetensors_file import SafetensorsFile
from checkpoints_convert.streaming import Summary, progress_bar, read_ahead
from megatron_tgdpo.checkpoints.adapter_directory import read_lora
from megatron_tgdpo.checkpoints.integrity import refuse_damage
from megatron_tgdpo.checkpoints.manifest import read_metadata
from megatron_tgdpo.checkpoints.model_directory import (
    OF_WHOLE_MODEL,
    copy_hf_files,
    hf_files,
    is_megatron_checkpoint,
    is_peft_adapter,
)
from megatron_tgdpo.console import waiting
from megatron_tgdpo.data.tokenizers import load_tokenizer, read_template
from megatron_tgdpo.errors import UserError
from megatron_tgdpo.models.hf_config import read_hf_config
from megatron_tgdpo.models.hf_weights.mapping import (
    GlobalParameter,
    expected_shapes,
    global_parameters,
    parameter_count,
)
from megatron_tgdpo.storage.atomic_directory import AtomicDirectory
from megatron_tgdpo.storage.dtypes import dtype_name
from megatron_tgdpo.storage.json_text import parse_json

logger = logging.getLogger(__name__)

_INDEX = "model.safetensors.index.json"


@dataclass(frozen=True)
class _File:
    """A weight file to write: its name and the parameters whose HF tensors it holds."""

    name: str
    parameters: tuple[GlobalParameter, ...]

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Of the HF tensors."""
        return dict(tensor for parameter in self.parameters for tensor in parameter.hf_tensors)

    @property
    def fp32(self) -> set[str]:
        """Names of the HF tensors that are in fp32 whatever the others are in."""
        return {name for parameter in self.parameters if parameter.fp32 for name, _ in parameter.hf_tensors}

    @property
    def numel(self) -> int:
        """Elements of the HF tensors."""
        return sum(math.prod(shape) for shape in self.shapes.values())

    def size(self, dtype: torch.dtype) -> int:
        """Bytes of the HF tensors, of a model in a dtype."""
        more = torch.float32.itemsize - dtype.itemsize
        return self.numel * dtype.itemsize + more * sum(math.prod(self.shapes[name]) for name in self.fp32)


def export_hf(
    checkpoint: Path,
    out: Path,
    *,
    template: Path,
    stored: torch.dtype,
    dtype: torch.dtype,
    max_shard_bytes: int,
    base: Path | None = None,
    verify: bool = True,
    group: dist.ProcessGroup | None = None,
    quiet: bool = False,
) -> Summary:
    """Writes an HF directory that ``transformers`` loads; all of it, or nothing.

    Collective over all ranks, on the CPU; whole files are divided among them, and the result does not depend on their
    number. Padded vocabulary rows are dropped, optimizer state is not read. An export of a training checkpoint has a
    model card, and the chat template that the training used.

    With ``base`` the checkpoint is of a LoRA run, or is a ``peft`` directory, and what is written is its base model
    with the adapter added, in fp32 and cast once; memory holds the adapter as well.

    Args:
        checkpoint: A Megatron checkpoint, saved at any layout.
        out: The directory to make, on storage that all ranks share; it must not exist, or be empty.
        template: An HF directory or Megatron checkpoint whose config, tokenizer and templates are copied.
        stored: The checkpoint's dtype.
        dtype: Of the written weights.
        max_shard_bytes: Largest file's tensors (those that stay together and are larger get a file of their own).
        base: HF directory or Megatron checkpoint of an adapter's base model, of a ``peft`` directory also the template;
            None for a whole model.
        verify: Whether to compare the checkpoint's checksums first.
        group: Of all ranks, for the collectives; None for the default group.
        quiet: Without a word of how far it is.

    Raises:
        UserError: On every rank: the checkpoint is damaged, is not what the template's config asks for, or cannot be
            read; the base is not the one that the adapter was trained on; ``out`` is not empty, or could not be
            written.
    """
    started = time.perf_counter()
    shown = not quiet and dist.get_rank() == 0
    if is_megatron_checkpoint(checkpoint):
        with waiting(f"checksums of {checkpoint}", shown=shown):
            refuse_damage(checkpoint, content=verify, group=group)
    with AtomicDirectory(out, group) as directory:
        hf_config = directory.run_on_all_ranks(lambda: _read_config(checkpoint, template))
        if base is not None:
            with waiting(f"sha256 of {base}", shown=shown):
                check_base(base, checkpoint, directory)
        read = directory.run_on_all_ranks(lambda: _open(checkpoint, base, hf_config, stored))
        # Where products are made of pieces, these are of the same rows whatever dtype the base is stored in.
        element_size = stored.itemsize if base is None else torch.float32.itemsize
        files = _plan(global_parameters(hf_config), dtype.itemsize, max_shard_bytes)
        size = sum(file.size(dtype) for file in files)
        directory.reserve(size)
        mine = share(files, [file.numel for file in files], dist.get_rank(), dist.get_world_size())
        finite = FiniteCheck()
        directory.run_on_all_ranks(lambda: _write(read, directory.temporary, mine, element_size, dtype, quiet, finite))
        finite.warn(checkpoint, group)
        directory.run_on_rank0(lambda: _finish(directory.temporary, checkpoint, template, files, dtype, size))
        with waiting(f"{out}: until all of it is on disk", shown=shown):
            directory.commit()
    return Summary(out, parameter_count(hf_config), dtype_name(dtype), size, time.perf_counter() - started)


def _read_config(checkpoint: Path, template: Path) -> PretrainedConfig:
    hf_files(template)  # which are copied at the end
    theirs = read_hf_config(template)
    ours = theirs if is_peft_adapter(checkpoint) else read_hf_config(checkpoint)
    given, own = expected_shapes(theirs), expected_shapes(ours)
    for name in sorted(given.keys() | own.keys()):
        if given.get(name) != own.get(name):
            raise UserError(f"{checkpoint}: {name} has shape {own.get(name)}, {template} asks for {given.get(name)}")
    return theirs


def _open(checkpoint: Path, base: Path | None, hf_config: PretrainedConfig, stored: torch.dtype) -> ReadPiece:
    if base is None:
        return read_megatron(checkpoint, hf_config, stored)
    adapter = adapter_tensors(checkpoint, hf_config, torch.float32)
    return merged(read_base_model(base, hf_config), adapter, read_lora(checkpoint), hf_config)


def _plan(parameters: Sequence[GlobalParameter], element_size: int, max_bytes: int) -> list[_File]:
    """Fills files one after another; the HF tensors of a parameter, and the parameters of one, stay together."""
    groups: list[list[GlobalParameter]] = []
    used = 0
    for tensors, together in itertools.groupby(parameters, key=lambda parameter: parameter.hf_tensors):
        size = sum(math.prod(shape) for _, shape in tensors) * element_size
        if not groups or used + size > max_bytes:
            groups.append([])
            used = 0
        groups[-1].extend(together)
        used += size
    if len(groups) == 1:
        return [_File("model.safetensors", tuple(groups[0]))]
    return [
        _File(f"model-{number:05d}-of-{len(groups):05d}.safetensors", tuple(group))
        for number, group in enumerate(groups, start=1)
    ]


def _write(
    read: ReadPiece,
    directory: Path,
    files: list[_File],
    element_size: int,
    dtype: torch.dtype,
    quiet: bool,
    finite: FiniteCheck,
) -> None:
    def read_converted(piece: Piece) -> list[tuple[str, int, Tensor]]:
        own = piece.parameter.dtype(dtype)
        return [(name, first, converted(finite.look(name, part), own, name)) for name, first, part in read(piece)]

    with progress_bar("Megatron to HF", sum(file.size(dtype) for file in files), quiet=quiet) as bar:
        for file in files:
            pieces = [piece for parameter in file.parameters for piece in pieces_of(parameter, element_size)]
            with SafetensorsFile(directory / file.name, file.shapes, dtype, file.fp32) as writer:
                for _, parts in read_ahead(read_converted, pieces):
                    for name, first, rows in parts:
                        writer.write_rows(name, first, rows)
                        bar.update(rows.nbytes)


def _finish(
    temporary: Path, checkpoint: Path, template: Path, files: list[_File], dtype: torch.dtype, size: int
) -> None:
    if len(files) > 1:
        weight_map = {name: file.name for file in files for name in file.shapes}
        _write_json(
            temporary / _INDEX, {"metadata": {"total_size": size}, "weight_map": dict(sorted(weight_map.items()))}
        )
    copy_hf_files(template, temporary)
    if is_peft_adapter(checkpoint):
        # Its tokenizer, where it has one, may have another chat template than the base's.
        copy_hf_files(checkpoint, temporary, without=OF_WHOLE_MODEL)
    else:
        metadata = read_metadata(checkpoint)
        if template == checkpoint:
            _copy_chat_template(temporary, metadata)
        if (card := model_card(checkpoint, metadata)) is not None:
            (temporary / CARD_FILE).write_text(card, encoding="utf-8")
    _set_dtype(temporary / "config.json", dtype)


def _copy_chat_template(directory: Path, metadata: Mapping[str, Any]) -> None:
    """Has the export speak as the model was trained to, where ``data.chat_template`` replaced the tokenizer's own."""
    data = (metadata.get("config") or {}).get("data") or {}
    file, trained_with = data.get("chat_template"), (metadata.get("inputs") or {}).get("data.chat_template")
    if not file or not trained_with:
        return
    try:
        template = read_template(file)
        found = load_tokenizer(str(directory), file, data.get("template_kwargs")).template_fingerprint
    except UserError as error:
        found, why = None, str(error)
    else:
        why = f"{file}: not the template that the model was trained with"
    if found != trained_with:
        logger.warning("%s: the export has the tokenizer's own chat template", why)
        return
    # What transformers and vLLM read before the one in tokenizer_config.json.
    (directory / "chat_template.jinja").write_text(template, encoding="utf-8")


def _set_dtype(config_file: Path, dtype: torch.dtype) -> None:
    """Makes config.json say the dtype that was written, under the key that it uses (transformers 5: ``dtype``)."""
    config = parse_json(config_file.read_text(encoding="utf-8"))
    key = "torch_dtype" if "torch_dtype" in config else "dtype"
    name = str(dtype).removeprefix("torch.")
    if config.get(key) != name:
        _write_json(config_file, {**config, key: name})


def _write_json(file: Path, content: dict[str, Any]) -> None:
    file.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
