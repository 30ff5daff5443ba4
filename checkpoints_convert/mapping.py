"""Which HF tensors make which megatron-core parameter, and how each splits over tensor-parallel ranks.

Legend: tp ranks of the tensor group, r this rank, D head size. A parameter of kind ``qkv`` is, for each key/value
group, the group's query heads, its key head, its value head; with tp > groups a rank holds an equal run of those rows.
"""

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from megatron.core.models.gpt.gpt_model import GPTModel
from torch import Tensor
from transformers import PretrainedConfig

from checkpoints_convert.families import family_of
from checkpoints_convert.families.family import Kind
from checkpoints_convert.hf_reader import HfCheckpoint
from megatron_tgdpo.rotary import head_dim

_LAYER_PARAMETER = re.compile(r"decoder\.layers\.(\d+)\.(.+)")
_EMBEDDING = "embedding.word_embeddings.weight"
_OUTPUT = "output_layer.weight"


@dataclass(frozen=True)
class Heads:
    """Attention geometry: key/value groups, query heads in each, size of a head."""

    groups: int
    queries_per_group: int
    size: int

    @classmethod
    def of(cls, hf_config: PretrainedConfig) -> "Heads":
        """Reads it from the HF config."""
        groups = hf_config.num_key_value_heads
        return cls(groups, hf_config.num_attention_heads // groups, head_dim(hf_config))


@dataclass(frozen=True)
class MappedParameter:
    """One parameter of this rank and the HF tensors it is made of.

    Attributes:
        name: The parameter's name in the model.
        parameter: The parameter itself, this rank's shard.
        kind: See ``families/family.py``.
        hf_names: Names of the HF tensors.
        is_tied_copy: The last stage's copy of tied embeddings: loaded, never exported.
    """

    name: str
    parameter: torch.nn.Parameter
    kind: Kind
    hf_names: tuple[str, ...]
    is_tied_copy: bool


def mapped_parameters(model: GPTModel, hf_config: PretrainedConfig) -> Iterator[MappedParameter]:
    """Goes through the parameters of this rank's slice of the model, in the model's order.

    Args:
        model: This rank's slice of a language model.
        hf_config: The config it was built from.

    Raises:
        KeyError: The family's table lacks a parameter of the model.
    """
    weights = family_of(hf_config.architectures).weights
    for name, parameter in model.named_parameters():
        match = _LAYER_PARAMETER.fullmatch(name)
        layer = None
        key = name
        if match:
            # The index in the module list is local to the pipeline stage; layer_number is global and 1-based.
            layer = int(model.decoder.layers[int(match[1])].layer_number) - 1
            key = match[2]
        is_tied_copy = key == _OUTPUT and bool(hf_config.tie_word_embeddings)
        weight = weights[_EMBEDDING if is_tied_copy else key]
        names = tuple(hf_name.format(layer=layer) for hf_name, _ in weight.hf_tensors)
        yield MappedParameter(name, parameter, weight.kind, names, is_tied_copy)


def expected_shapes(hf_config: PretrainedConfig) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor that an HF checkpoint of this config holds (no lm_head if tied)."""
    heads = Heads.of(hf_config)
    sizes = {
        "vocab": hf_config.vocab_size,
        "hidden": hf_config.hidden_size,
        "mlp": hf_config.intermediate_size,
        "query": heads.groups * heads.queries_per_group * heads.size,
        "kv": heads.groups * heads.size,
    }
    shapes: dict[str, tuple[int, ...]] = {}
    for key, weight in family_of(hf_config.architectures).weights.items():
        if key == _OUTPUT and hf_config.tie_word_embeddings:
            continue
        for name, dimensions in weight.hf_tensors:
            shape = tuple(sizes[dimension] for dimension in dimensions)
            layers = range(hf_config.num_hidden_layers) if "{layer}" in name else (0,)
            shapes.update({name.format(layer=layer): shape for layer in layers})
    return shapes


def parameter_count(hf_config: PretrainedConfig) -> int:
    """Parameters of the HF model, tied ones once."""
    return sum(math.prod(shape) for shape in expected_shapes(hf_config).values())


def read_shard(checkpoint: HfCheckpoint, mapped: MappedParameter, heads: Heads, rank: int) -> Tensor:
    """Reads from HF files exactly what one tensor-parallel rank holds of a parameter.

    Args:
        checkpoint: The open HF checkpoint.
        mapped: The parameter; its shape says how much a rank holds.
        heads: Attention geometry.
        rank: The tensor-parallel rank.

    Returns:
        A tensor of the parameter's shape, in the stored dtype.
    """
    names, shape = mapped.hf_names, mapped.parameter.shape
    start, end = rank * shape[0], (rank + 1) * shape[0]
    match mapped.kind:
        case "copy":
            return checkpoint.whole(names[0])
        case "row":
            return checkpoint.columns(names[0], rank * shape[1], (rank + 1) * shape[1])
        case "vocab":
            stored = checkpoint.tensors[names[0]].shape[0]
            rows = checkpoint.rows(names[0], min(start, stored), min(end, stored))
            return torch.cat((rows, rows.new_zeros(shape[0] - rows.shape[0], shape[1])))
        case "glu":
            half = shape[0] // 2
            return torch.cat([checkpoint.rows(name, rank * half, (rank + 1) * half) for name in names])
        case "qkv":
            return torch.cat([checkpoint.rows(names[i], a, b) for i, a, b in _qkv_runs(start, end, heads)])


def _qkv_runs(start: int, end: int, heads: Heads) -> Iterator[tuple[int, int, int]]:
    """Rows [start, end) of the interleaved parameter as runs (0 query | 1 key | 2 value, first row, last row + 1)."""
    query_rows = heads.queries_per_group * heads.size
    position = 0
    for group in range(heads.groups):
        for index, length in ((0, query_rows), (1, heads.size), (2, heads.size)):
            a, b = max(start, position), min(end, position + length)
            if a < b:
                yield index, group * length + a - position, group * length + b - position
            position += length


def join_shards(kind: Kind, shards: list[Tensor], heads: Heads, vocab_size: int) -> list[Tensor]:
    """Turns the shards of all tensor-parallel ranks into the HF tensors, in the order of ``hf_names``.

    Args:
        kind: See ``families/family.py``.
        shards: By tensor-parallel rank; for ``copy`` only the first counts.
        heads: Attention geometry.
        vocab_size: Of the HF model: padded rows beyond it are dropped.
    """
    match kind:
        case "copy":
            return [shards[0]]
        case "row":
            return [torch.cat(shards, dim=1)]
        case "vocab":
            return [torch.cat(shards)[:vocab_size]]
        case "glu":
            gates_and_ups = [shard.chunk(2) for shard in shards]
            return [torch.cat([pair[i] for pair in gates_and_ups]) for i in (0, 1)]
        case "qkv":
            joined = torch.cat(shards)
            runs = list(_qkv_runs(0, joined.shape[0], heads))
            pieces = joined.split([b - a for _, a, b in runs])
            return [
                torch.cat([piece for piece, (i, _, _) in zip(pieces, runs, strict=True) if i == index])
                for index in range(3)
            ]
