"""Clipping the gradients that an optimizer owns, wherever it keeps them."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from megatron.core.optimizer.clip_grads import clip_grad_by_total_norm_fp32

from megatron_tgdpo.training.step import clip_gradients


def optimizer(parameters: list[torch.Tensor], *, decoupled: bool, clip: float) -> Any:
    config = SimpleNamespace(clip_grad=clip, use_precision_aware_optimizer_no_fp8_or_ds_fp8=decoupled)
    # One of experts beside it; a rank may own none of their parameters.
    chained = [SimpleNamespace(get_parameters=lambda part=part: part) for part in (parameters[:1], parameters[1:], [])]
    return SimpleNamespace(config=config, chained_optimizers=chained)


@pytest.mark.parametrize("decoupled", [False, True])
@pytest.mark.parametrize(("clip", "left"), [(1.0, 0.2), (10.0, 1.0), (0.0, 1.0)])
def test_gradients_are_clipped_where_the_optimizer_keeps_them(decoupled: bool, clip: float, left: float) -> None:
    """offload.optimizer keeps them beside the parameters, where nothing was clipped."""
    first, second = (torch.nn.Parameter(torch.zeros(2)) for _ in range(2))
    gradient = torch.tensor([3.0, 4.0])
    setattr(first, "decoupled_grad" if decoupled else "grad", gradient)
    clip_gradients(optimizer([first, second], decoupled=decoupled, clip=clip), 5.0)
    # In place: the gradient is a part of the buffer.
    assert torch.allclose(gradient, torch.tensor([3.0, 4.0]) * left, rtol=1e-5)


def test_clipping_is_megatron_cores_to_the_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also of its own: the same factor, in the same order of roundings."""
    zeros = torch.zeros
    monkeypatch.setattr(torch, "zeros", lambda *sizes, **options: zeros(*sizes, **{**options, "device": "cpu"}))
    monkeypatch.setattr(torch.Tensor, "type", lambda self: "torch.cuda.FloatTensor")
    parameters = [torch.nn.Parameter(torch.zeros(size)) for size in (1000, 3)]
    for parameter in parameters:
        parameter.grad = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(len(parameter)))
    wanted = [torch.nn.Parameter(torch.zeros(1)) for _ in parameters]
    for theirs, ours in zip(wanted, parameters, strict=True):
        theirs.data, theirs.grad = ours.data, ours.grad.clone()
    clip_grad_by_total_norm_fp32(wanted, max_norm=0.7, total_norm=31.6)
    clip_gradients(optimizer(parameters, decoupled=False, clip=0.7), 31.6)
    assert all(torch.equal(a.grad, b.grad) for a, b in zip(parameters, wanted, strict=True))


def test_a_rank_without_parameters_clips_nothing() -> None:
    clip_gradients(optimizer([], decoupled=False, clip=1.0), 5.0)
