"""Shards of every rank and back, against the layouts written out by hand."""

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from transformers import LlamaConfig

from megatron_tgdpo.models.families.family import Kind
from megatron_tgdpo.models.hf_weights.mapping import Heads, expected_shapes, join_shards, parameter_count, read_shard
from megatron_tgdpo.models.hf_weights.reader import TensorInfo

HEADS = Heads(groups=2, queries_per_group=3, size=4)
HIDDEN = 5


@dataclass
class Tensors:
    """Stands in for the files: the slices of an HfCheckpoint, from memory."""

    stored: dict[str, torch.Tensor]

    @property
    def tensors(self) -> dict[str, TensorInfo]:
        return {name: TensorInfo("f", tuple(tensor.shape), "F32") for name, tensor in self.stored.items()}

    def whole(self, name: str) -> torch.Tensor:
        return self.stored[name]

    def rows(self, name: str, start: int, end: int) -> torch.Tensor:
        return self.stored[name][start:end]

    def columns(self, name: str, start: int, end: int) -> torch.Tensor:
        return self.stored[name][:, start:end]


def shards(kind: Kind, stored: list[torch.Tensor], shape: tuple[int, ...], ranks: int) -> list[torch.Tensor]:
    names = "abc"[: len(stored)]
    files: Any = Tensors(dict(zip(names, stored, strict=True)))
    return [read_shard(files, kind, names, shape, HEADS, rank) for rank in range(ranks)]


def numbered(rows: int, columns: int, start: int) -> torch.Tensor:
    return torch.arange(start, start + rows * columns, dtype=torch.float32).view(rows, columns)


@pytest.mark.parametrize("ranks", [1, 2, 4, 8])
def test_qkv(ranks: int) -> None:
    q, k, v = numbered(24, HIDDEN, 0), numbered(8, HIDDEN, 1000), numbered(8, HIDDEN, 2000)
    # Group 0: heads q0 q1 q2 k0 v0; group 1: heads q3 q4 q5 k1 v1; each head has 4 rows.
    whole = torch.cat([q[:12], k[:4], v[:4], q[12:], k[4:], v[4:]])
    made = shards("qkv", [q, k, v], (40 // ranks, HIDDEN), ranks)
    for rank, shard in enumerate(made):
        assert torch.equal(shard, whole.chunk(ranks)[rank])
    for ours, theirs in zip(join_shards("qkv", made, HEADS, 0), (q, k, v), strict=True):
        assert torch.equal(ours, theirs)


def test_glu() -> None:
    gate, up = numbered(6, HIDDEN, 0), numbered(6, HIDDEN, 100)
    made = shards("glu", [gate, up], (4, HIDDEN), 3)
    assert torch.equal(made[1], torch.cat([gate[2:4], up[2:4]]))
    for ours, theirs in zip(join_shards("glu", made, HEADS, 0), (gate, up), strict=True):
        assert torch.equal(ours, theirs)


def test_row() -> None:
    weight = numbered(HIDDEN, 6, 0)
    made = shards("row", [weight], (HIDDEN, 2), 3)
    assert torch.equal(made[2], weight[:, 4:])
    assert torch.equal(join_shards("row", made, HEADS, 0)[0], weight)


def test_vocabulary_is_padded_with_zeros() -> None:
    weight = numbered(5, HIDDEN, 1)
    made = shards("vocab", [weight], (4, HIDDEN), 4)  # the last two ranks hold nothing but padding
    assert torch.equal(made[0], weight[:4])
    assert torch.equal(made[1], torch.cat([weight[4:], torch.zeros(3, HIDDEN)]))
    assert not made[2].any()
    assert not made[3].any()
    assert torch.equal(join_shards("vocab", made, HEADS, 5)[0], weight)


def test_copy() -> None:
    weight = torch.arange(5.0)
    assert torch.equal(shards("copy", [weight], (5,), 2)[1], weight)


@pytest.mark.parametrize("tied", [True, False])
def test_expected_shapes_are_those_of_transformers(tied: bool) -> None:
    from transformers import LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=131,
        hidden_size=24,
        intermediate_size=40,
        num_hidden_layers=3,
        num_attention_heads=6,
        num_key_value_heads=2,
        head_dim=8,
        tie_word_embeddings=tied,
        architectures=["LlamaForCausalLM"],
    )
    model = LlamaForCausalLM(config)
    assert expected_shapes(config) == {name: tuple(p.shape) for name, p in model.named_parameters()}
    assert parameter_count(config) == sum(p.numel() for p in model.parameters())
