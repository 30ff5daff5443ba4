"""Token log-probs against a full log-softmax: values, gradients, chunking, padded vocabulary, precision, memory."""

from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from megatron_tgdpo.loss import vocab_parallel_logps
from megatron_tgdpo.loss.vocab_chunks import CHUNK_ELEMENTS, chunk_rows
from megatron_tgdpo.loss.vocab_parallel_logps import token_logps

VOCABULARY, PADDED, HIDDEN, TOKENS = 131, 256, 24, 37


def inputs(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(TOKENS, HIDDEN, generator=generator).to(dtype).requires_grad_()
    weight = torch.randn(PADDED, HIDDEN, generator=generator).to(dtype)
    weight[VOCABULARY:] = 50.0  # a padded row that took part would win every softmax
    targets = torch.randint(VOCABULARY, (TOKENS,), generator=generator)
    grads = torch.randn(TOKENS, generator=generator)
    return hidden, weight.requires_grad_(), targets, grads


def expected(
    hidden: Tensor, weight: Tensor, targets: Tensor, grads: Tensor, softcap: float | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    hidden, weight = (t.detach().double().requires_grad_() for t in (hidden, weight))
    logits = hidden @ weight[:VOCABULARY].t()
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    logps = logits.log_softmax(1).gather(1, targets[:, None])[:, 0]
    grad_hidden, grad_weight = torch.autograd.grad(logps, (hidden, weight), grads.double())
    return logps.detach(), grad_hidden, grad_weight


@pytest.mark.parametrize("softcap", [None, 4.0])
@pytest.mark.parametrize("chunk_elements", [1, VOCABULARY * 5, 2**25])
@pytest.mark.parametrize("keep_bytes", [0, 4 * TOKENS * VOCABULARY // 2, 2**20])
def test_values_and_gradients(
    single_rank_group: dist.ProcessGroup, chunk_elements: int, softcap: float | None, keep_bytes: int
) -> None:
    hidden, weight, targets, grads = inputs()
    logps = token_logps(
        hidden,
        weight,
        targets,
        vocab_size=VOCABULARY,
        tp_group=single_rank_group,
        softcap=softcap,
        chunk_elements=chunk_elements,
        keep_bytes=keep_bytes,
    )
    grad_hidden, grad_weight = torch.autograd.grad(logps, (hidden, weight), grads)
    want, want_hidden, want_weight = expected(hidden, weight, targets, grads, softcap)
    assert logps.dtype == torch.float32
    torch.testing.assert_close(logps.double(), want, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(grad_hidden.double(), want_hidden, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(grad_weight.double(), want_weight, rtol=1e-4, atol=1e-5)
    assert not grad_weight[VOCABULARY:].any()


def test_a_frozen_weight_gets_no_product_of_its_own(single_rank_group: dist.ProcessGroup) -> None:
    hidden, weight, targets, grads = inputs()
    products = {}
    for trains in (True, False):
        weight.requires_grad_(trains)
        with mock.patch.object(vocab_parallel_logps, "_add_product", wraps=vocab_parallel_logps._add_product) as made:
            logps = token_logps(hidden, weight, targets, vocab_size=VOCABULARY, tp_group=single_rank_group)
            (grad_hidden,) = torch.autograd.grad(logps, (hidden,), grads)
        products[trains] = made.call_count
        torch.testing.assert_close(
            grad_hidden.double(), expected(hidden, weight, targets, grads)[1], rtol=1e-4, atol=1e-5
        )
    assert products[True] == 2 * products[False] > 0


def test_bf16_inputs_are_not_rounded_on_the_way_to_float32(single_rank_group: dist.ProcessGroup) -> None:
    hidden, weight, targets, grads = inputs(torch.bfloat16)
    logps = token_logps(hidden, weight, targets, vocab_size=VOCABULARY, tp_group=single_rank_group)
    want, want_hidden, _ = expected(hidden, weight, targets, grads)
    torch.testing.assert_close(logps.double(), want, rtol=1e-5, atol=1e-4)
    (grad_hidden,) = torch.autograd.grad(logps, (hidden,), grads)
    assert grad_hidden.dtype == torch.bfloat16
    torch.testing.assert_close(grad_hidden.double(), want_hidden, rtol=2e-2, atol=2e-2)


def test_no_tokens(single_rank_group: dist.ProcessGroup) -> None:
    hidden, weight, targets, _ = inputs()
    logps = token_logps(hidden[:0], weight, targets[:0], vocab_size=VOCABULARY, tp_group=single_rank_group)
    logps.sum().backward()
    assert logps.shape == (0,)
    assert weight.grad is not None
    assert not weight.grad.any()


def test_large_logits_do_not_overflow(single_rank_group: dist.ProcessGroup) -> None:
    hidden, weight, targets, _ = inputs()
    logps = token_logps(hidden * 1e4, weight, targets, vocab_size=VOCABULARY, tp_group=single_rank_group)
    assert torch.isfinite(logps).all()


@pytest.mark.parametrize("tokens", [1, 77, 1000, 4095, 200_000])
@pytest.mark.parametrize("vocabulary", [128_256, 50_257, 32_003])
def test_chunks_on_a_gpu_have_aligned_rows(tokens: int, vocabulary: int) -> None:
    """A product whose leading dimension is odd takes a kernel of a third of the speed."""
    rows = chunk_rows(tokens, vocabulary, "cuda")
    assert rows % 64 == 0
    assert 0 < rows <= vocabulary
    assert rows * tokens <= max(CHUNK_ELEMENTS["cuda"], 256 * tokens)
