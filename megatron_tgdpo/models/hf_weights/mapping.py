"""Which HF tensors make which megatron-core parameter, and how each splits over tensor-parallel ranks.

Legend: tp ranks of the tensor group, r this rank, D head size. A parameter of kind ``qkv`` is, for each key/value
group, the group's query heads, its key head, its value head; with tp > groups a rank holds an equal run of those rows.
"""

import itertools
import math
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PretrainedConfig

from megatron_tgdpo.models.families import family_of, settings_of
from megatron_tgdpo.models.families.family import STACKED, Dimension, Kind, Weight
from megatron_tgdpo.models.families.latent import LatentSizes
from megatron_tgdpo.models.hf_config import padded_vocab_size
from megatron_tgdpo.models.hf_weights.reader import HfCheckpoint
from megatron_tgdpo.models.rotary import head_dim

EMBEDDING = "embedding.word_embeddings.weight"
OUTPUT = "output_layer.weight"
# A layer's norms before attention and MLP: modules of their own in the local layer spec, whose names families use; in
# Transformer Engine's fused with the linear that follows. Checkpoints of both hold the fused names: the local spec's
# layers are mapped to them by megatron-core (``sharded_state_dict_keys_map``). Prefixes, relative to a layer. Before
# experts, and before latent attention, the norm is a module of its own in both.
FUSED_NORMS = {
    "input_layernorm.": "self_attention.linear_qkv.layer_norm_",
    "pre_mlp_layernorm.": "mlp.linear_fc1.layer_norm_",
}
_LAYERS = "decoder.layers."
_UNFUSED: dict[Kind, Kind] = {"fused_glu": "glu", "fused_qkv": "qkv"}


def local_name(name: str) -> str:
    """The local spec's name of a layer's parameter, given either spec's; relative to the layer."""
    for local, fused in FUSED_NORMS.items():
        if name.startswith(fused):
            return local + name.removeprefix(fused)
    return name


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

    @property
    def rows(self) -> tuple[int, int, int]:
        """Of the projections of query, key and value."""
        kv = self.groups * self.size
        return self.queries_per_group * kv, kv, kv


@dataclass(frozen=True)
class GlobalParameter:
    """One whole parameter of a model and the HF tensors it is made of.

    Attributes:
        key: megatron-core's name in the local spec's model, without the numbers of layer and expert.
        layer: 0-based layer, None for a parameter outside the layers.
        expert: 0-based expert, None for a parameter that not each has.
        checkpoint_key: Name of the tensor in a Megatron checkpoint, in which all layers are stacked if they are alike,
            and of each layer all experts.
        index: Where it lies on the first axes of that tensor: its numbers of layer and expert, as far as it has them
            and the tensor is of all.
        kind: See ``families/family.py``.
        shape: Of the whole parameter (of one layer), the vocabulary padded.
        hf_tensors: (name, shape) of each.
        fp32: Whether it is in fp32 whatever the others are in.
    """

    key: str
    layer: int | None
    expert: int | None
    checkpoint_key: str
    index: tuple[int, ...]
    kind: Kind
    shape: tuple[int, ...]
    hf_tensors: tuple[tuple[str, tuple[int, ...]], ...]
    fp32: bool = False

    def dtype(self, of_model: torch.dtype) -> torch.dtype:
        """Of its values, in files and in memory, of a model in a dtype."""
        return torch.float32 if self.fp32 else of_model

    @property
    def is_stacked(self) -> bool:
        """Whether its HF tensor has those of the layer's other experts, too."""
        return self.kind in STACKED


def _stored_names(*, experts: bool, latent: bool) -> dict[str, str]:
    """What names in a checkpoint begin with instead of their beginnings in the local spec's model, in a layer that has
    experts or not, and latent attention or not."""
    alone = {"input_layernorm.": latent, "pre_mlp_layernorm.": experts}
    fused = {name: stored for name, stored in FUSED_NORMS.items() if not alone[name]}
    return {**fused, "mlp.experts.": "mlp.experts.experts."}


def global_parameters(
    hf_config: PretrainedConfig, tensor: int = 1, *, every_expert: bool = True
) -> list[GlobalParameter]:
    """All parameters of a model in the order of a forward pass; no output weight if it is tied to the embedding.

    Args:
        hf_config: The HF config.
        tensor: Tensor-parallel size; it counts only for how far the vocabulary is padded.
        every_expert: Whether all experts are listed, or of each layer the first one.
    """
    family, with_experts = family_of(hf_config.architectures), expert_layers(hf_config)
    alike = are_alike(with_experts)
    in_layers = {kind: family.layer_weights(experts=kind) for kind in set(with_experts)}
    outside = {name: weight for name, weight in family.weights.items() if not weight.of_layer}
    if hf_config.tie_word_embeddings:
        del outside[OUTPUT]
    sizes, padded = dimension_sizes(hf_config), padded_vocab_size(hf_config, tensor)

    def make(name: str, weight: Weight, layer: int | None, expert: int | None = None) -> GlobalParameter:
        tensors = tuple(
            (hf_name.format(layer=layer, expert=expert), tuple(sizes[dimension] for dimension in dimensions))
            for hf_name, dimensions in weight.hf_tensors
        )
        rows = padded if weight.kind == "vocab" else sum(shape[0] for _, shape in tensors)
        # An expert's part of a stacked tensor, transposed.
        whole = tensors[0][1][:0:-1] if weight.kind in STACKED else (rows, *tensors[0][1][1:])
        if layer is None:
            return GlobalParameter(name, None, None, name, (), weight.kind, whole, tensors)
        renamed = _stored_names(experts=with_experts[layer], latent=family.has_latent_attention)
        stored = next((new + name.removeprefix(old) for old, new in renamed.items() if name.startswith(old)), name)
        prefix, index = stored_layer(layer, alike=alike)
        index += () if expert is None else (expert,)
        key, stored = _LAYERS + name, prefix + stored
        return GlobalParameter(key, layer, expert, stored, index, weight.kind, whole, tensors, weight.fp32)

    first = [make(EMBEDDING, outside.pop(EMBEDDING), None)]
    layers = [
        make(name, weight, layer, expert)
        for layer, has_experts in enumerate(with_experts)
        for name, weight in in_layers[has_experts].items()
        if weight.is_in(hf_config)
        for expert in (range(sizes["experts"] if every_expert else 1) if weight.of_expert else [None])
    ]
    return first + layers + [make(name, weight, None) for name, weight in outside.items()]


def stored_layer(layer: int, *, alike: bool) -> tuple[str, tuple[int, ...]]:
    """What a layer's names in a Megatron checkpoint begin with, and its place on the first axes of their tensors.

    Where not all layers are alike, megatron-core numbers their tensors (``transformer_block.py: sharded_state_dict``).
    """
    return (_LAYERS, (layer,)) if alike else (f"{_LAYERS}{layer}.", ())


def expected_shapes(hf_config: PretrainedConfig) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor that an HF checkpoint of this config holds (no lm_head if tied)."""
    return dict(tensor for parameter in global_parameters(hf_config) for tensor in parameter.hf_tensors)


def parameter_count(hf_config: PretrainedConfig) -> int:
    """Parameters of the HF model, tied ones once."""
    return sum(math.prod(shape) for shape in expected_shapes(hf_config).values())


def expert_layers(hf_config: PretrainedConfig) -> list[bool]:
    """Whether each layer of a model has experts in its MLP's place."""
    kwargs = settings_of(hf_config)
    layers: int = hf_config.num_hidden_layers
    return [bool(has) for has in kwargs.get("moe_layer_freq", [kwargs.get("num_moe_experts")] * layers)]


def kinds_of_layers(hf_config: PretrainedConfig, layers: Iterable[int] | None = None) -> dict[int, int]:
    """How many there are of each kind of layer, with experts or with a dense MLP, by the model's first layer of the
    kind; of all layers, or of some."""
    with_experts = expert_layers(hf_config)
    chosen = range(len(with_experts)) if layers is None else layers
    return dict(Counter(with_experts.index(with_experts[layer]) for layer in chosen))


def are_alike(with_experts: Sequence[bool]) -> bool:
    """Whether all layers have experts, or none; of :func:`expert_layers`."""
    return len(set(with_experts)) == 1


@dataclass(frozen=True)
class Experts:
    """The experts of each layer that has them: how many, their intermediate size, how many of them a token goes to, and
    the intermediate size of the one that all tokens go to (0 without), and whether by a gate."""

    count: int
    size: int
    top_k: int
    shared: int
    shared_gate: bool

    @classmethod
    def of(cls, hf_config: PretrainedConfig) -> "Experts | None":
        """Of a model; None if it has none."""
        kwargs = settings_of(hf_config)
        if not kwargs.get("num_moe_experts"):
            return None
        return cls(
            kwargs["num_moe_experts"],
            kwargs["moe_ffn_hidden_size"],
            kwargs["moe_router_topk"],
            kwargs.get("moe_shared_expert_intermediate_size", 0),
            kwargs.get("moe_shared_expert_gate", False),
        )

    @classmethod
    def of_layer(cls, hf_config: PretrainedConfig, layer: int) -> "Experts | None":
        """Of a layer, counted from 0; None if it has none."""
        return cls.of(hf_config) if expert_layers(hf_config)[layer] else None


def active_parameter_count(hf_config: PretrainedConfig) -> int:
    """Parameters that a token meets: of experts only those that it goes to."""
    experts, total = Experts.of(hf_config), 0
    for parameter in global_parameters(hf_config, every_expert=False):
        met = experts.top_k if experts is not None and parameter.expert is not None else 1
        tensors = [shape[1:] if parameter.is_stacked else shape for _, shape in parameter.hf_tensors]
        total += met * sum(map(math.prod, tensors))
    return total


def dimension_sizes(hf_config: PretrainedConfig) -> dict[Dimension, int]:
    """What the dimensions of a model's weights are."""
    heads = Heads.of(hf_config)
    query, kv, _ = heads.rows
    kwargs = settings_of(hf_config)
    latent: LatentSizes | None = kwargs.get("latent")
    # Some configs of models with experts in every layer have none.
    dense_mlp = getattr(hf_config, "intermediate_size", 0)
    return {
        **({} if latent is None else _latent_sizes(latent, hf_config.num_attention_heads)),
        "vocab": hf_config.vocab_size,
        "hidden": hf_config.hidden_size,
        "mlp": dense_mlp,
        "experts": kwargs.get("num_moe_experts", 0),
        "expert_mlp": kwargs.get("moe_ffn_hidden_size", 0),
        "expert_gate_up": 2 * kwargs.get("moe_ffn_hidden_size", 0),
        "shared_mlp": kwargs.get("moe_shared_expert_intermediate_size", 0),
        "one": 1,
        "query": query,
        "kv": kv,
        "head": heads.size,
        "heads": hf_config.num_attention_heads,
        "gate_up": 2 * dense_mlp,
        "qkv": query + 2 * kv,
    }


def _latent_sizes(sizes: LatentSizes, heads: int) -> dict[Dimension, int]:
    return {
        "query_rank": sizes.query_rank or 0,
        "rank": sizes.rank,
        "latent": sizes.rank + sizes.rotated,
        "latent_query": heads * sizes.query,
        "latent_kv": heads * (sizes.plain + sizes.value),
        "latent_value": heads * sizes.value,
    }


def read_shard(
    checkpoint: HfCheckpoint,
    kind: Kind,
    names: Sequence[str],
    shape: Sequence[int],
    heads: Heads,
    rank: int,
    expert: int | None = None,
) -> Tensor:
    """Reads from HF files exactly what one tensor-parallel rank (of an expert, one of the ranks that share it) holds of
    a parameter.

    Args:
        checkpoint: The open HF checkpoint.
        kind: See ``families/family.py``.
        names: Of the HF tensors.
        shape: Of the shard.
        heads: Attention geometry.
        rank: The tensor-parallel rank.
        expert: Of an expert's parameter, its number.

    Returns:
        The shard, in the stored dtype.
    """
    start, end = rank * shape[0], (rank + 1) * shape[0]
    match kind:
        case "copy":
            return checkpoint.whole(names[0])
        case "row":
            return checkpoint.columns(names[0], rank * shape[1], (rank + 1) * shape[1])
        case "vocab":
            stored = checkpoint.tensors[names[0]].shape[0]
            rows = checkpoint.rows(names[0], min(start, stored), min(end, stored))
            return torch.cat((rows, rows.new_zeros(shape[0] - rows.shape[0], shape[1])))
        case "column":
            return checkpoint.rows(names[0], start, end)
        case "stacked_copy":
            return _of_expert(checkpoint, names[0], expert)
        case "stacked_row":
            return _of_expert(checkpoint, names[0], expert)[rank * shape[1] : (rank + 1) * shape[1]].T.contiguous()
        case "stacked_glu":
            half, both = shape[0] // 2, _of_expert(checkpoint, names[0], expert)
            return torch.cat([both[..., first::2][..., rank * half : (rank + 1) * half].t() for first in (0, 1)])
        case "glu":
            half = shape[0] // 2
            return torch.cat([checkpoint.rows(name, rank * half, (rank + 1) * half) for name in names])
        case "fused_glu":
            half, up = shape[0] // 2, checkpoint.tensors[names[0]].shape[0] // 2
            gate_and_up = (rank * half, up + rank * half)
            return torch.cat([checkpoint.rows(names[0], first, first + half) for first in gate_and_up])
        case "qkv":
            return torch.cat([checkpoint.rows(names[i], a, b) for i, a, b in qkv_runs(start, end, heads)])
        case "fused_qkv":
            firsts = (0, *itertools.accumulate(heads.rows))
            runs = qkv_runs(start, end, heads)
            return torch.cat([checkpoint.rows(names[0], firsts[i] + a, firsts[i] + b) for i, a, b in runs])


def _of_expert(checkpoint: HfCheckpoint, name: str, expert: int | None) -> Tensor:
    """An expert's part of a tensor that has those of all experts."""
    assert expert is not None
    return checkpoint.rows(name, expert, expert + 1)[0]


def qkv_runs(start: int, end: int, heads: Heads) -> Iterator[tuple[int, int, int]]:
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

    Returns:
        Of a stacked HF tensor the expert's part, [1, ...].
    """
    match kind:
        case "copy":
            return [shards[0]]
        case "row":
            return [torch.cat(shards, dim=1)]
        case "column":
            return [torch.cat(shards)]
        case "stacked_copy":
            return [shards[0][None]]
        case "stacked_row":
            return [torch.cat(shards, dim=1).T[None]]
        case "stacked_glu":
            return [torch.stack(join_shards("glu", shards, heads, vocab_size), dim=1).flatten(0, 1).t()[None]]
        case "fused_glu" | "fused_qkv":
            return [torch.cat(join_shards(_UNFUSED[kind], shards, heads, vocab_size))]
        case "vocab":
            return [torch.cat(shards)[:vocab_size]]
        case "glu":
            gates_and_ups = [shard.chunk(2) for shard in shards]
            return [torch.cat([pair[i] for pair in gates_and_ups]) for i in (0, 1)]
        case "qkv":
            joined = torch.cat(shards)
            runs = list(qkv_runs(0, joined.shape[0], heads))
            pieces = joined.split([b - a for _, a, b in runs])
            return [
                torch.cat([piece for piece, (i, _, _) in zip(pieces, runs, strict=True) if i == index])
                for index in range(3)
            ]
