"""A model's weights out to an HF directory, from any layout, to the bit."""

import json
import os
import shutil
import uuid
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.process_groups_config import ProcessGroupCollection
from safetensors.torch import save_file
from torch import Tensor
from transformers import PretrainedConfig

from checkpoints_convert.mapping import Heads, join_shards
from checkpoints_convert.model_mapping import mapped_parameters
from megatron_tgdpo.checkpoint_format import copy_hf_files, sync
from megatron_tgdpo.errors import UserError
from megatron_tgdpo.models import LanguageModel
from megatron_tgdpo.ranks import agree

DEFAULT_SHARD_BYTES = 5_000_000_000
_INDEX = "model.safetensors.index.json"


class _ShardWriter:
    """Collects HF tensors of one pipeline stage and writes a file whenever the next would make it too large."""

    def __init__(self, directory: Path, stage: int, max_bytes: int) -> None:
        self._directory, self._stage, self._max_bytes = directory, stage, max_bytes
        self._pending: dict[str, Tensor] = {}
        self._pending_bytes = 0
        self.files: list[list[str]] = []
        self.total_bytes = 0
        self.error: OSError | None = None

    def add(self, name: str, tensor: Tensor) -> None:
        """Takes a tensor; after a failed write only remembers the error, as other ranks still wait for this one."""
        size = tensor.numel() * tensor.element_size()
        if self._pending and self._pending_bytes + size > self._max_bytes:
            self.flush()
        # A clone: safetensors refuses views, and a view would keep the whole joined parameter alive.
        self._pending[name] = tensor.cpu().clone(memory_format=torch.contiguous_format)
        self._pending_bytes += size
        self.total_bytes += size

    def flush(self) -> None:
        """Writes what is pending."""
        if self._pending and self.error is None:
            file = stage_file(self._directory, self._stage, len(self.files))
            try:
                save_file(self._pending, file, metadata={"format": "pt"})
                sync(file)
            except Exception as error:  # safetensors wraps the system's error in its own type
                self.error = OSError(f"{file.name}: {error}")
        if self._pending:
            self.files.append(list(self._pending))
        self._pending, self._pending_bytes = {}, 0


def stage_file(directory: Path, stage: int, number: int) -> Path:
    """A file's name before the number of files is known."""
    return directory / f"stage-{stage:05d}-{number:05d}.safetensors"


def export_hf(
    model: LanguageModel,
    out: Path,
    template: Path,
    hf_config: PretrainedConfig,
    pg: ProcessGroupCollection,
    dtype: torch.dtype | None = None,
    max_shard_size: int = DEFAULT_SHARD_BYTES,
) -> None:
    """Writes an HF directory that ``transformers`` loads; it appears whole, or not at all.

    Collective over all ranks. Tensor-parallel shards meet one parameter at a time on the first tensor rank of each
    pipeline stage of the first data-parallel replica, which writes them; padded vocabulary rows are dropped.

    Args:
        model: This rank's slice.
        out: The directory to make, on storage that all ranks share; it must not exist, or be empty.
        template: An HF directory or Megatron checkpoint whose config, tokenizer and templates are copied.
        hf_config: The config that the model was built from.
        pg: Process groups.
        dtype: Of the written weights; None keeps the model's.
        max_shard_size: Largest file, in bytes (a larger single tensor gets a file of its own).

    Raises:
        UserError: On every rank: ``out`` is not empty, or it could not be written.
    """
    is_first = dist.get_rank() == 0
    names = [f".tmp-{uuid.uuid4().hex[:8]}"]
    dist.broadcast_object_list(names, src=0)
    aside = out.with_name(out.name + names[0])
    agree(lambda: _begin(out, aside) if is_first else None)
    try:
        writer = _write_weights(model, aside, hf_config, pg, dtype, max_shard_size)
        agree(lambda: _raise_write_error(out, writer))
        report = (pg.pp.rank(), writer.files, writer.total_bytes) if writer else None
        reports: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(reports, report)
        stages = sorted(entry for entry in reports if entry is not None)
        stored_dtype = dtype or model.config.params_dtype
        agree(lambda: _finish(out, aside, template, stages, stored_dtype) if is_first else None)
    except BaseException:
        if is_first:
            shutil.rmtree(aside, ignore_errors=True)
        raise


def refuse_existing(out: Path) -> None:
    """Stops early, before any work, where an output directory holds something.

    Raises:
        UserError: It does.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out}: exists and is not empty, delete it or choose another directory")


def _begin(out: Path, aside: Path) -> None:
    refuse_existing(out)
    try:
        aside.mkdir(parents=True)
    except OSError as error:
        raise UserError(f"{aside}: cannot be made: {error.strerror}") from error


@torch.no_grad()
def _write_weights(
    model: LanguageModel,
    aside: Path,
    hf_config: PretrainedConfig,
    pg: ProcessGroupCollection,
    dtype: torch.dtype | None,
    max_shard_size: int,
) -> _ShardWriter | None:
    """Streams the weights into files; returns the writer on the ranks that write."""
    if pg.dp_cp.rank() != 0:
        return None
    writer = _ShardWriter(aside, pg.pp.rank(), max_shard_size) if pg.tp.rank() == 0 else None
    heads = Heads.of(hf_config)
    for mapped in mapped_parameters(model, hf_config):
        if mapped.is_tied_copy:
            continue
        parameter = mapped.parameter.detach()
        shards = [parameter] if mapped.kind == "copy" else gather_shards(parameter, pg.tp)
        if writer is None:
            continue
        tensors = join_shards(mapped.kind, shards, heads, hf_config.vocab_size)
        for name, tensor in zip(mapped.hf_names, tensors, strict=True):
            writer.add(name, tensor if dtype is None else tensor.to(dtype))
    if writer is not None:
        writer.flush()
    return writer


def gather_shards(shard: Tensor, group: dist.ProcessGroup) -> list[Tensor]:
    """Collects equal shards on the group's first rank, in rank order; empty on the others. Collective."""
    if group.size() == 1:
        return [shard]
    # gloo sends wrong data for tensors that are not contiguous
    shard = shard.contiguous()
    shards = [torch.empty_like(shard) for _ in range(group.size())] if group.rank() == 0 else None
    dist.gather(shard, shards, dst=dist.get_global_rank(group, 0), group=group)
    return shards or []


def _raise_write_error(out: Path, writer: _ShardWriter | None) -> None:
    if writer is not None and writer.error is not None:
        free = shutil.disk_usage(out.parent).free
        needed = f"this stage needs {writer.total_bytes:,} bytes, {free:,} are free"
        raise UserError(f"{out}: writing failed, nothing was changed: {writer.error}; {needed}") from writer.error


def _finish(
    out: Path, aside: Path, template: Path, stages: list[tuple[int, list[list[str]], int]], dtype: torch.dtype
) -> None:
    try:
        count = sum(len(files) for _, files, _ in stages)
        weight_map: dict[str, str] = {}
        for stage, files, _ in stages:
            for number, names in enumerate(files):
                position = len(set(weight_map.values())) + 1
                name = f"model-{position:05d}-of-{count:05d}.safetensors" if count > 1 else "model.safetensors"
                stage_file(aside, stage, number).rename(aside / name)
                weight_map.update(dict.fromkeys(names, name))
        if count > 1:
            total = {"total_size": sum(size for _, _, size in stages)}
            _write_json(aside / _INDEX, {"metadata": total, "weight_map": dict(sorted(weight_map.items()))})
        copy_hf_files(template, aside)
        _set_dtype(aside / "config.json", dtype)
        sync(aside)
        os.replace(aside, out)  # an existing out is an empty directory, which this replaces
        sync(out.parent)
    except OSError as error:
        raise UserError(f"{out}: writing failed, nothing was changed: {error}") from error


def _set_dtype(config_file: Path, dtype: torch.dtype) -> None:
    """Makes config.json say the dtype that was written, under the key that it uses (transformers 5: ``dtype``)."""
    config = json.loads(config_file.read_text(encoding="utf-8"))
    key = "torch_dtype" if "torch_dtype" in config else "dtype"
    name = str(dtype).removeprefix("torch.")
    if config.get(key) != name:
        _write_json(config_file, {**config, key: name})


def _write_json(file: Path, content: dict[str, Any]) -> None:
    file.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    sync(file)
