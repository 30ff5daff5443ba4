"""The adapter of a checkpoint of a LoRA run into a directory that ``peft`` loads and vLLM serves."""

import json
import time
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
import torch.distributed as dist
from torch import Tensor
from transformers import PretrainedConfig

from checkpoints_convert.model_card import CARD_FILE, model_card
from checkpoints_convert.streaming import Summary
from megatron_tgdpo.checkpoints.adapter_directory import (
    BASE,
    PREFIX,
    Lora,
    read_base,
    read_lora,
)
from megatron_tgdpo.checkpoints.integrity import refuse_damage
from megatron_tgdpo.checkpoints.manifest import read_metadata
from megatron_tgdpo.checkpoints.model_directory import (
    ADAPTER_CONFIG,
    ADAPTER_WEIGHTS,
    OF_WHOLE_MODEL,
    copy_hf_files,
    is_peft_adapter,
)
from megatron_tgdpo.checkpoints.reader import CheckpointReader
from megatron_tgdpo.errors import UserError
from megatron_tgdpo.models.hf_config import read_hf_config
from megatron_tgdpo.models.hf_weights.adapter_layout import (
    adapted_parts,
    fused_linears,
    peft_tensors,
    read_adapter,
)
from megatron_tgdpo.models.hf_weights.mapping import kinds_of_layers
from megatron_tgdpo.storage.atomic_directory import AtomicDirectory
from megatron_tgdpo.storage.dtypes import dtype_name
from megatron_tgdpo.storage.hub import hub_name


def export_adapter(
    checkpoint: Path, out: Path, *, dtype: torch.dtype, verify: bool = True, group: dist.ProcessGroup | None = None
) -> Summary:
    """Writes a ``peft`` directory: adapter, tokenizer, model card; all of it, or nothing. Collective; rank 0 writes.

    Args:
        checkpoint: Of a LoRA run, saved at any layout.
        out: The directory to make; it must not exist, or be empty.
        dtype: Of the written tensors.
        verify: Whether to compare the checkpoint's checksums first.
        group: Of all ranks, for the collectives; None for the default group.

    Raises:
        UserError: On every rank: the checkpoint is damaged or ``out`` is not empty, or could not be written.
    """
    started = time.perf_counter()
    refuse_damage(checkpoint, content=verify, group=group)
    with AtomicDirectory(out, group) as directory:
        tensors = directory.run_on_all_ranks(lambda: adapter_tensors(checkpoint, read_hf_config(checkpoint), dtype))
        size = sum(tensor.nbytes for tensor in tensors.values())
        directory.reserve(size)
        directory.run_on_rank0(lambda: _write(directory.temporary, checkpoint, tensors))
        directory.commit()
    count = sum(tensor.numel() for tensor in tensors.values())
    return Summary(out, count, dtype_name(dtype), size, time.perf_counter() - started)


def adapter_tensors(checkpoint: Path, hf_config: PretrainedConfig, dtype: torch.dtype) -> dict[str, Tensor]:
    """The adapter of a checkpoint, or of a ``peft`` directory, as tensors by their names there, without the prefix.

    Raises:
        UserError: A part of it is missing.
    """
    lora = read_lora(checkpoint)
    if is_peft_adapter(checkpoint):
        return {name: tensor.to(dtype) for name, tensor in read_adapter(checkpoint, lora, hf_config).items()}
    reader = CheckpointReader(checkpoint)
    found: dict[str, Tensor] = {}
    for layer in range(hf_config.num_hidden_layers):
        for fused in fused_linears(hf_config, layer):
            if not any(True for _ in adapted_parts(fused, lora)):
                continue
            names = (f"{fused.prefix}a", f"{fused.prefix}b")
            missing = [name for name in names if name not in reader.tensors]
            if missing:
                raise UserError(f"{checkpoint}: it lacks {missing[0]}, which an adapter of its targets has")
            a, b = (
                reader.rows(name, fused.index, 0, reader.tensors[name].size[len(fused.index)]).to(dtype)
                for name in names
            )
            found |= dict(peft_tensors(fused, layer, a, b, lora, hf_config))
    return found


def _write(directory: Path, checkpoint: Path, tensors: dict[str, Tensor]) -> None:
    metadata, base = read_metadata(checkpoint), read_base(checkpoint)
    copy_hf_files(checkpoint, directory, without=OF_WHOLE_MODEL)
    header = {"format": "pt", **({} if base is None else {BASE: base})}
    whole = {PREFIX + name: tensor.contiguous() for name, tensor in tensors.items()}
    safetensors.torch.save_file(whole, directory / ADAPTER_WEIGHTS, metadata=header)
    model = (metadata.get("config") or {}).get("model") or {}
    content = peft_config(read_lora(checkpoint), model.get("policy"), read_hf_config(checkpoint))
    (directory / ADAPTER_CONFIG).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    if (card := model_card(checkpoint, metadata, whole=False)) is not None:
        (directory / CARD_FILE).write_text(card, encoding="utf-8")


def peft_config(lora: Lora, base: str | None, hf_config: PretrainedConfig) -> dict[str, Any]:
    """What ``adapter_config.json`` says of an adapter.

    Args:
        lora: What it is.
        base: Of its base model, a path or a pinned name of the Hub.
        hf_config: Of its base model.
    """
    kinds = kinds_of_layers(hf_config)
    adapted = [
        (fused, part)
        for layer in kinds
        for fused in fused_linears(hf_config, layer)
        for part in adapted_parts(fused, lora)
    ]

    def name(part: str, words: int) -> str:
        return ".".join(part.split(".")[-words:])

    # Beside experts ``peft`` takes modules of a dense MLP's names for theirs.
    dense_mlps = [part for fused, part in adapted if len(kinds) > 1 and not fused.experts and ".mlp." in part]
    linears = [name(part, 1) for fused, part in adapted if not fused.experts and part not in dense_mlps]
    parameters = [f"{name(part, 2)}.weight" for part in dense_mlps]
    parameters += [name(part, 3) for fused, part in adapted if fused.experts]
    hub = None if base is None else hub_name(base)
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base if hub is None else hub.repo,
        "revision": None if hub is None else hub.revision,
        "r": lora.rank,
        "lora_alpha": int(lora.alpha) if lora.alpha == int(lora.alpha) else lora.alpha,
        "target_modules": list(dict.fromkeys(linears)),
        **({"target_parameters": parameters} if parameters else {}),
        "use_rslora": lora.rslora,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
    }
