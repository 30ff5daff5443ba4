"""Compares the weights of an HF directory and of a Megatron checkpoint to the bit, a piece at a time."""

from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor
from transformers import PretrainedConfig

from checkpoints_convert.check_parameters import check_checkpoint
from checkpoints_convert.pieces import Piece, all_pieces, share
from megatron_tgdpo.checkpoints.reader import CheckpointReader
from megatron_tgdpo.distributed.ranks import raise_on_all_ranks
from megatron_tgdpo.models.hf_weights.check import tie
from megatron_tgdpo.models.hf_weights.mapping import Heads
from megatron_tgdpo.models.hf_weights.reader import HfCheckpoint


def different_weights(hf: Path, checkpoint: Path, hf_config: PretrainedConfig, stored_dtype: torch.dtype) -> list[str]:
    """HF names of the tensors that differ or are missing in ``hf``, the same sorted list on all ranks.

    Collective over the default group; the pieces are divided among its ranks.

    Args:
        hf: An HF directory.
        checkpoint: A Megatron checkpoint.
        hf_config: The checkpoint's config.
        stored_dtype: The checkpoint's; the HF weights are converted to it.

    Raises:
        UserError: On every rank: something cannot be read, or the checkpoint is not of this config.
    """
    pieces = all_pieces(hf_config, stored_dtype.itemsize)
    mine = share(pieces, [piece.numel for piece in pieces], dist.get_rank(), dist.get_world_size())
    found = raise_on_all_ranks(
        lambda: _different(HfCheckpoint(hf), CheckpointReader(checkpoint), mine, hf_config, stored_dtype)
    )
    reports: list[set[str]] = [set()] * dist.get_world_size()
    dist.all_gather_object(reports, found)
    return sorted(set().union(*reports))


def _different(
    theirs: HfCheckpoint,
    ours: CheckpointReader,
    pieces: list[Piece],
    hf_config: PretrainedConfig,
    stored_dtype: torch.dtype,
) -> set[str]:
    check_checkpoint(ours, hf_config, stored_dtype)
    tie(theirs, hf_config)
    heads = Heads.of(hf_config)
    different = set()
    for piece in pieces:
        for name, start, rows in piece.to_hf(piece.read_megatron(ours), heads, hf_config.vocab_size):
            if not _equal(theirs, name, start, rows, dict(piece.parameter.hf_tensors)[name]):
                different.add(name)
    return different


def _equal(theirs: HfCheckpoint, name: str, start: int, rows: Tensor, shape: tuple[int, ...]) -> bool:
    if name not in theirs.tensors or theirs.tensors[name].shape != shape:
        return False
    return torch.equal(theirs.rows(name, start, start + rows.shape[0]).to(rows.dtype), rows)
