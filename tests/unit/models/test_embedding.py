"""The embedding without a GPU is megatron-core's to the bit, without a gradient as large as the vocabulary."""

import copy
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from megatron.core.tensor_parallel.layers import VocabParallelEmbedding

from megatron_tgdpo.models.embedding import RowGradientEmbedding
from tests.live_storages import LiveStorages

VOCABULARY, HIDDEN = 5000, 8


@pytest.fixture
def theirs(single_rank_group: dist.ProcessGroup) -> VocabParallelEmbedding:
    config: Any = SimpleNamespace(
        perform_initialization=False, use_cpu_initialization=True, params_dtype=torch.float32, deterministic_mode=False
    )
    embedding = VocabParallelEmbedding(VOCABULARY, HIDDEN, init_method=torch.nn.init.ones_, config=config)
    embedding.tp_group = single_rank_group
    torch.nn.init.normal_(embedding.weight, generator=torch.Generator().manual_seed(0))
    return embedding


def copied(theirs: VocabParallelEmbedding) -> RowGradientEmbedding:
    """Ours, with a weight of its own."""
    other = copy.copy(theirs)
    other._parameters = {"weight": torch.nn.Parameter(theirs.weight.detach().clone())}
    return RowGradientEmbedding.in_place_of(other)


def step(embedding: VocabParallelEmbedding, tokens: torch.Tensor, upstream: torch.Tensor) -> torch.Tensor:
    output = embedding(tokens)
    output.backward(upstream)
    return output.detach()


@pytest.mark.parametrize("shared", [False, True])
def test_passes_over_two_packs_to_the_bit(theirs: VocabParallelEmbedding, shared: bool) -> None:
    """As megatron-core's data-parallel wrapper accumulates: into main_grad, from grad or by the function itself."""
    ours = copied(theirs)
    random = torch.Generator().manual_seed(1)
    for embedding in (theirs, ours):
        weight: Any = embedding.weight
        weight.main_grad = torch.zeros_like(weight)
        weight.zero_out_wgrad, weight.grad_added_to_main_grad = shared, False
    for _ in range(2):
        tokens = torch.randint(0, 40, (1, 64), generator=random)  # most of them several times
        upstream = torch.randn(1, 64, HIDDEN, generator=random)
        assert torch.equal(step(theirs, tokens, upstream), step(ours, tokens, upstream))
        for embedding in (theirs, ours):
            weight = embedding.weight
            if not weight.grad_added_to_main_grad or weight.zero_out_wgrad:
                weight.main_grad.add_(weight.grad)
            weight.grad = None
    assert theirs.weight.main_grad.count_nonzero() > 0
    assert torch.equal(theirs.weight.main_grad, ours.weight.main_grad)


def test_without_a_buffer_the_gradient_is_returned(theirs: VocabParallelEmbedding) -> None:
    ours = copied(theirs)
    tokens, upstream = torch.tensor([[3, 1, 3]]), torch.ones(1, 3, HIDDEN)
    step(theirs, tokens, upstream)
    step(ours, tokens, upstream)
    assert torch.equal(theirs.weight.grad, ours.weight.grad)


def test_a_frozen_weight_has_none(theirs: VocabParallelEmbedding) -> None:
    ours = RowGradientEmbedding.in_place_of(theirs.requires_grad_(False))
    assert not ours(torch.tensor([[3, 1, 3]])).requires_grad
    with LiveStorages([ours.weight]) as live:
        ours(torch.tensor([[3, 1, 3]]))
    assert live.peak < VOCABULARY
