"""Whether an export of a LoRA run is what its checkpoint holds: to the bit, as an adapter or as a whole model."""

from pathlib import Path

import torch
import torch.distributed as dist
from transformers import PretrainedConfig

from checkpoints_convert.export_adapter import adapter_tensors
from checkpoints_convert.merge import find_base, merged, read_base_model
from checkpoints_convert.pieces import all_pieces, converted, share
from megatron_tgdpo.checkpoints.adapter_directory import read_lora
from megatron_tgdpo.checkpoints.model_directory import is_peft_adapter
from megatron_tgdpo.distributed.ranks import raise_on_all_ranks
from megatron_tgdpo.errors import UserError
from megatron_tgdpo.models.hf_config import read_hf_config
from megatron_tgdpo.models.hf_weights.adapter_layout import read_adapter
from megatron_tgdpo.models.hf_weights.mapping import expected_shapes
from megatron_tgdpo.models.hf_weights.reader import HfCheckpoint


def verify_adapter(hf: Path, checkpoint: Path) -> str:
    """Compares a checkpoint of a LoRA run with its export. Collective over the default group.

    Args:
        hf: A ``peft`` directory; or an HF one, that is compared with the run's base model and the adapter added.
        checkpoint: The checkpoint.

    Returns:
        What is equal, a line.

    Raises:
        UserError: On every rank: they differ, or one cannot be read.
    """
    hf_config = read_hf_config(checkpoint)
    if is_peft_adapter(hf):
        return raise_on_all_ranks(lambda: _same_adapter(hf, checkpoint, hf_config))
    mine = raise_on_all_ranks(lambda: _different(hf, checkpoint, hf_config))
    reports: list[list[str]] = [[]] * dist.get_world_size()
    dist.all_gather_object(reports, mine)
    _refuse(sorted({name for report in reports for name in report}), hf, checkpoint)
    return f"weights: all {len(expected_shapes(hf_config))} tensors equal to the bit to the base with the adapter added"


def _same_adapter(hf: Path, checkpoint: Path, hf_config: PretrainedConfig) -> str:
    theirs, ours = read_lora(hf), read_lora(checkpoint)
    if theirs != ours:
        raise UserError(f"{checkpoint}: its adapter is {ours}, that of {hf} is {theirs}")
    there, here = read_adapter(hf, theirs, hf_config), adapter_tensors(checkpoint, hf_config, torch.float32)
    _refuse([name for name, t in there.items() if not torch.equal(t, here[name].to(t.dtype))], hf, checkpoint)
    return f"adapter: all {len(there)} tensors equal to the bit"


def _different(hf: Path, checkpoint: Path, hf_config: PretrainedConfig) -> list[str]:
    """Names of tensors that differ in this rank's share of the pieces."""
    adapter, base = adapter_tensors(checkpoint, hf_config, torch.float32), find_base(checkpoint, None)
    read, theirs = merged(read_base_model(base, hf_config), adapter, read_lora(checkpoint), hf_config), HfCheckpoint(hf)
    pieces = all_pieces(hf_config, torch.float32.itemsize)  # as they are merged by an export
    found = []
    for piece in share(pieces, [piece.numel for piece in pieces], dist.get_rank(), dist.get_world_size()):
        for name, first, rows in read(piece):
            info = theirs.tensors.get(name)
            if info is None or info.shape[1:] != rows.shape[1:]:
                found.append(name)
                continue
            there = theirs.rows(name, first, first + rows.shape[0])
            if not torch.equal(there, converted(rows, info.torch_dtype, name)):
                found.append(name)
    return found


def _refuse(different: list[str], hf: Path, checkpoint: Path) -> None:
    if different:
        raise UserError(f"{checkpoint}: {len(different)} weights differ from {hf}, first {different[0]}")
