"""Clipping the gradients that an optimizer owns, wherever it keeps them."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from megatron_tgdpo.training.step import clip_gradients


def optimizer(parameters: list[torch.Tensor], *, decoupled: bool, clip: float) -> Any:
    config = SimpleNamespace(clip_grad=clip, use_precision_aware_optimizer_no_fp8_or_ds_fp8=decoupled)
    # One of experts beside it; a rank may own none of their parameters.
    chained = [SimpleNamespace(get_parameters=lambda part=part: part) for part in (parameters[:1], parameters[1:], [])]
    return SimpleNamespace(config=config, chained_optimizers=chained)


@pytest.mark.parametrize("decoupled", [False, True])
@pytest.mark.parametrize(("clip", "left"), [(1.0, 0.2), (10.0, 1.0), (0.0, 1.0)])
def test_gradients_are_clipped_where_the_optimizer_keeps_them(
    monkeypatch: pytest.MonkeyPatch, decoupled: bool, clip: float, left: float
) -> None:
    """offload.optimizer keeps them beside the parameters: nothing there was clipped, and the fused kernel crashed."""
    scaled = []

    def scale(chunk: int, overflow: torch.Tensor, lists: list[list[torch.Tensor]], factor: float) -> None:
        del chunk, overflow
        scaled.extend(lists[0])
        for source, target in zip(*lists, strict=True):
            target.copy_(source * factor)

    zeros = torch.zeros
    monkeypatch.setattr("megatron.core.optimizer.clip_grads.multi_tensor_scale_impl", scale)
    monkeypatch.setattr("megatron.core.optimizer.clip_grads.multi_tensor_applier", lambda run, *rest: run(0, *rest))
    monkeypatch.setattr(torch, "zeros", lambda *sizes, **options: zeros(*sizes, **{**options, "device": "cpu"}))
    monkeypatch.setattr(torch.Tensor, "type", lambda self: "torch.cuda.FloatTensor")
    parameter: Any = torch.nn.Parameter(torch.zeros(2))
    gradient = torch.tensor([3.0, 4.0])
    setattr(parameter, "decoupled_grad" if decoupled else "grad", gradient)
    clip_gradients(optimizer([parameter], decoupled=decoupled, clip=clip), 5.0)
    assert bool(scaled) == (left < 1)
    assert torch.allclose(gradient, torch.tensor([3.0, 4.0]) * left, rtol=1e-5)


def test_a_rank_without_parameters_clips_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """The fused kernel crashes on empty lists."""
    monkeypatch.setattr("megatron_tgdpo.training.step.clip_grad_by_total_norm_fp32", pytest.fail)
    clip_gradients(optimizer([], decoupled=False, clip=1.0), 5.0)
