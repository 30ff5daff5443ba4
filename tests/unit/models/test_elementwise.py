"""Norm and gate of the local layer spec beside PyTorch's own operators: values, gradients, and what they keep."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megatron_tgdpo.models.norm import RMSNorm
from megatron_tgdpo.models.swiglu import SwiGLU

TOKENS, SIZE = 37, 24


def config(**values: bool) -> TransformerConfig:
    sizes = {"num_layers": 1, "hidden_size": SIZE, "num_attention_heads": 2}
    return TransformerConfig(**sizes, use_cpu_initialization=True, normalization="RMSNorm", **values)


def kept(function: Callable[[Tensor], Tensor], hidden: Tensor, known: list[Tensor]) -> int:
    """Elements that wait for backward in memory of their own."""
    found: dict[int, int] = {}

    def save(tensor: Tensor) -> Tensor:
        found[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes() // tensor.element_size()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(save, lambda tensor: tensor):
        result = function(hidden)
    del result
    for tensor in (hidden, *known):
        found.pop(tensor.untyped_storage().data_ptr(), None)
    return sum(found.values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_swiglu_has_the_digits_of_the_plain_form_and_keeps_its_input_alone(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    hidden, grad = torch.randn(TOKENS, 1, 2 * SIZE, dtype=dtype), torch.randn(TOKENS, 1, SIZE, dtype=dtype)
    module = SwiGLU(config())

    def plain(wide: Tensor) -> Tensor:
        gate, up = wide.chunk(2, dim=-1)
        return F.silu(gate) * up

    results = []
    for function in (module, plain):
        leaf = hidden.clone().requires_grad_()
        result = function(leaf)
        result.backward(grad)
        assert leaf.grad is not None
        results.append((result.detach(), leaf.grad))
        assert kept(function, leaf, []) == (0 if function is module else TOKENS * SIZE)
    assert torch.equal(results[0][0], results[1][0])
    assert torch.equal(results[0][1], results[1][1])


@pytest.mark.parametrize("zero_centered", [False, True])
@pytest.mark.parametrize(("dtype", "limit"), [(torch.float32, 1e-6), (torch.bfloat16, 1e-2)])
def test_rms_norm_is_that_of_pytorch_and_keeps_a_number_a_row(
    zero_centered: bool, dtype: torch.dtype, limit: float
) -> None:
    """Beside PyTorch's own in float64; Gemma's works on an fp32 copy."""
    torch.manual_seed(0)
    module = RMSNorm(config(layernorm_zero_centered_gamma=zero_centered), SIZE, eps=1e-3)
    module = module.to(dtype)
    hidden, grad = 3 * torch.randn(TOKENS, 1, 2, SIZE, dtype=dtype), torch.randn(TOKENS, 1, 2, SIZE, dtype=dtype)
    with torch.no_grad():
        module.weight.copy_(torch.randn(SIZE))
    leaf = hidden.clone().requires_grad_()
    module(leaf).backward(grad)
    wide, weight = hidden.double().requires_grad_(), module.weight.detach().double().requires_grad_()
    expected = F.rms_norm(wide, (SIZE,), weight + 1 if zero_centered else weight, 1e-3)
    expected.backward(grad.double())
    for ours, theirs in (
        (module(leaf), expected), (leaf.grad, wide.grad), (module.weight.grad, weight.grad)
    ):  # fmt: skip
        assert ours is not None
        assert theirs is not None
        assert (ours.double() - theirs).norm() < limit * theirs.norm()
    copies = TOKENS * 2 * SIZE if zero_centered and dtype != torch.float32 else 0
    numbers = TOKENS * 2 + (SIZE if zero_centered else 0)  # the weight and one
    assert kept(module, leaf, [module.weight]) == numbers + copies
    if not zero_centered:
        assert torch.equal(module(leaf), F.rms_norm(leaf, (SIZE,), module.weight, 1e-3))


def test_a_frozen_weight_of_a_norm_has_no_gradient() -> None:
    module = RMSNorm(config(), SIZE)
    module.weight.requires_grad_(False)
    hidden = torch.randn(TOKENS, SIZE, requires_grad=True)
    module(hidden).sum().backward()
    assert module.weight.grad is None
    assert hidden.grad is not None
