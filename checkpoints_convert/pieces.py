"""A model as pieces that fit in memory, each of them rows of one parameter and of the HF tensors it is made of."""

import itertools
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from transformers import PretrainedConfig

from megatron_tgdpo.checkpoints.reader import CheckpointReader
from megatron_tgdpo.errors import UserError
from megatron_tgdpo.models.hf_weights.mapping import GlobalParameter, Heads, global_parameters, join_shards, read_shard
from megatron_tgdpo.models.hf_weights.reader import HfCheckpoint

logger = logging.getLogger(__name__)

# Blocks of up to 32 MiB are used again by the allocator; the first touch of larger, fresh ones costs more than reading.
PIECE_BYTES = 16 << 20
# Kinds of parameters that are a linear's.
_LINEARS = ("qkv", "glu", "row", "fused_qkv", "fused_glu")

T = TypeVar("T")


@dataclass(frozen=True)
class Piece:
    """Rows of a parameter, and what they are in HF.

    Attributes:
        parameter: The parameter, or one layer's part of it.
        start: First row of it.
        end: Last row + 1.
        hf_index: Of the HF tensor (in ``parameter.hf_tensors``) whose rows they are; None for the whole of a parameter
            that interleaves several, or is an expert's part of one.
        hf_start: First row of that HF tensor.
        hf_end: Last row + 1; less than ``hf_start + end - start`` where rows are padding.
    """

    parameter: GlobalParameter
    start: int
    end: int
    hf_index: int | None
    hf_start: int = 0
    hf_end: int = 0

    @property
    def numel(self) -> int:
        """Elements, padding included."""
        return (self.end - self.start) * self.row_numel

    @property
    def row_numel(self) -> int:
        """Elements of a row."""
        return self.parameter.shape[1] if len(self.parameter.shape) > 1 else 1

    def read_hf(self, checkpoint: HfCheckpoint, heads: Heads) -> Tensor:
        """The parameter's rows from HF files, in the stored dtype; padding is zeros."""
        names = [name for name, _ in self.parameter.hf_tensors]
        if self.hf_index is None:
            parameter = self.parameter
            return read_shard(checkpoint, parameter.kind, names, parameter.shape, heads, 0, parameter.expert)
        rows = checkpoint.rows(names[self.hf_index], self.hf_start, self.hf_end)
        missing = self.end - self.start - rows.shape[0]
        return torch.cat((rows, rows.new_zeros(missing, *rows.shape[1:]))) if missing else rows

    def read_megatron(self, checkpoint: CheckpointReader) -> Tensor:
        """The rows from a Megatron checkpoint, in the stored dtype, without padding."""
        end = self.end if self.hf_index is None else self.start + self.hf_end - self.hf_start
        return checkpoint.rows(self.parameter.checkpoint_key, self.parameter.index, self.start, end)

    def to_hf(self, rows: Tensor, heads: Heads, vocab_size: int) -> list[tuple[str, int, Tensor]]:
        """What :meth:`read_megatron` gave as (HF name, first row, rows)."""
        names = [name for name, _ in self.parameter.hf_tensors]
        if self.hf_index is not None:
            return [(names[self.hf_index], self.hf_start, rows)]
        joined = join_shards(self.parameter.kind, [rows], heads, vocab_size)
        first = self.parameter.expert if self.parameter.is_stacked else 0
        return [(name, first or 0, tensor) for name, tensor in zip(names, joined, strict=True)]


def converted(rows: Tensor, dtype: torch.dtype, name: str) -> Tensor:
    """Rows in another dtype.

    Raises:
        UserError: fp16 cannot hold some value.
    """
    result = rows.to(dtype)
    # fp32 and bf16 reach about as far as each other.
    narrower = dtype == torch.float16 and rows.dtype != torch.float16
    if narrower and not torch.equal(result.isfinite(), rows.isfinite()):
        raise UserError(f"{name}: has values beyond what fp16 holds (65504), choose --dtype bf16 or fp32")
    return result


class FiniteCheck:
    """Notes the tensors that have NaN or infinite values: these are converted as they are, and not without a word."""

    def __init__(self) -> None:
        self._names: dict[str, None] = {}

    def look(self, name: str, rows: Tensor) -> Tensor:
        """Looks at some rows of a tensor, and returns them; as long as a copy of them would take."""
        # NaN goes through both.
        if rows.numel() and not torch.stack(torch.aminmax(rows)).isfinite().all():
            self._names[name] = None
        return rows

    def warn(self, path: Path, group: dist.ProcessGroup | None = None) -> None:
        """Has rank 0 log one line about what all ranks have seen, if there was any.

        Collective over ``group`` of all ranks, None for the default group: the others' logs may go nowhere.
        """
        seen: list[list[str]] = [[] for _ in range(dist.get_world_size(group))]
        dist.all_gather_object(seen, list(self._names), group=group)
        names = list(dict.fromkeys(itertools.chain.from_iterable(seen)))
        if names and dist.get_rank(group) == 0:
            first, *others = names
            more = f" and {len(others)} other tensors" if others else ""
            logger.warning("%s: NaN or infinite values in %s%s: no training starts with them", path, first, more)


def checkpoint_sizes(hf_config: PretrainedConfig) -> dict[str, tuple[int, ...]]:
    """Size of every tensor of the model by its name in a Megatron checkpoint, the vocabulary padded for one rank."""
    # The last of each name has the highest numbers of layer and expert.
    return {
        parameter.checkpoint_key: (*(number + 1 for number in parameter.index), *parameter.shape)
        for parameter in global_parameters(hf_config)
    }


def extra_state_keys(hf_config: PretrainedConfig) -> list[str]:
    """Names of the empty objects that megatron-core saves beside, and asks of a checkpoint: one for every linear that
    is no expert's."""
    layers = hf_config.num_hidden_layers
    return [
        f"{parameter.checkpoint_key.removesuffix('weight')}_extra_state/shard_"
        + (f"{parameter.index[0]}_{layers}" if parameter.index else "0_1")
        for parameter in global_parameters(hf_config)
        if parameter.kind in _LINEARS and parameter.key.endswith(".weight") and parameter.expert is None
    ]


def all_pieces(hf_config: PretrainedConfig, element_size: int) -> list[Piece]:
    """The pieces of a model, padding included, in the order of a forward pass; the same on every rank."""
    return [piece for parameter in global_parameters(hf_config) for piece in pieces_of(parameter, element_size)]


def pieces_of(parameter: GlobalParameter, element_size: int) -> Iterator[Piece]:
    """Divides a parameter by rows into pieces of at most PIECE_BYTES (but for parameters that interleave HF tensors).

    Args:
        parameter: The parameter.
        element_size: Bytes of an element.
    """
    rows = parameter.shape[0]
    if parameter.kind in ("qkv", "fused_qkv") or parameter.is_stacked:
        yield Piece(parameter, 0, rows, None)
        return
    row_bytes = element_size * (parameter.shape[1] if len(parameter.shape) > 1 else 1)
    step = max(1, PIECE_BYTES // row_bytes)
    first, count = 0, len(parameter.hf_tensors)
    for index, (_, shape) in enumerate(parameter.hf_tensors):
        # The last tensor's rows are followed by the padding.
        last = rows if index == count - 1 else first + shape[0]
        for start in range(first, last, step):
            end = min(start + step, last)
            hf = [min(row - first, shape[0]) for row in (start, end)]
            yield Piece(parameter, start, end, index, *hf)
        first = last


def share(items: Sequence[T], sizes: Sequence[int], rank: int, ranks: int) -> list[T]:
    """This rank's part of a list: one run of it, of about equal size on all ranks."""
    total, before, mine = sum(sizes), 0, []
    for item, size in zip(items, sizes, strict=True):
        # The run whose span holds the item's middle.
        if min((2 * before + size) * ranks // max(2 * total, 1), ranks - 1) == rank:
            mine.append(item)
        before += size
    return mine
