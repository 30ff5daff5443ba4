"""What megatron-core and Transformer Engine make of a layer's experts in FP8, beside a plain computation of it."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.fp8_utils import get_fp8_context
from torch import Tensor

from megatron_tgdpo.setup.engine import policy_chunks
from tests.emulation.runs import Runs

# Few, none, more than a block, and as many as need no padding.
TOKENS = (5, 0, 133, 32)
_LARGEST = {torch.float8_e4m3fn: 448.0, torch.float8_e5m2: 57344.0}


def rounded(x: Tensor, height: int, width: int, dtype: torch.dtype, power_of_2: bool) -> Tensor:
    """[M, K] -> the same in fp32 as FP8 holds it, scaled by the largest value of each block."""
    rows, columns = x.shape
    padded = F.pad(x.float(), (0, -columns % width, 0, -rows % height))
    blocks = padded.view(padded.shape[0] // height, height, padded.shape[1] // width, width)
    largest = blocks.abs().amax((1, 3), keepdim=True)
    scale = torch.where(largest > 0, _LARGEST[dtype] / largest, 1.0)
    if power_of_2:
        scale = scale.log2().floor().exp2()
    return ((blocks * scale).to(dtype).float() / scale).view_as(padded)[:rows, :columns]


def tensorwise(x: Tensor, dtype: torch.dtype, along: int | None) -> Tensor:
    del along
    return rounded(x, *x.shape, dtype, False)


def blockwise(x: Tensor, dtype: torch.dtype, along: int | None) -> Tensor:
    """Blocks of 128 values that are added up, over rows or columns; of weights (None) squares."""
    return rounded(x, *{0: (128, 1), 1: (1, 128), None: (128, 128)}[along], dtype, True)


class _Linear(torch.autograd.Function):
    """A bf16 product whose operands are rounded, forward and backward; by ``rounding``, as above."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, rounding: Callable[..., Tensor]) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.rounding = rounding
        e4m3 = torch.float8_e4m3fn
        return (rounding(x, e4m3, 1) @ rounding(weight, e4m3, None).t()).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None]:
        (x, weight), rounding = ctx.saved_tensors, ctx.rounding
        e4m3, e5m2 = torch.float8_e4m3fn, torch.float8_e5m2
        of_input = rounding(gradient, e5m2, 1) @ rounding(weight, e4m3, None)
        of_weight = rounding(gradient, e5m2, 0).t() @ rounding(x, e4m3, 0)
        return of_input.to(x.dtype), of_weight, None


def plain(
    tokens: Tensor, shares: Tensor, weights: list[tuple[Tensor, Tensor]], linear: Callable[..., Tensor]
) -> Tensor:
    """One expert after another, without padding."""
    outputs = []
    for x, share, (first, second) in zip(tokens.split(TOKENS), shares.split(TOKENS), weights, strict=True):
        if len(x):
            gate, up = linear(x, first).chunk(2, -1)
            outputs.append(linear((F.silu(gate) * up * share[:, None]).to(x.dtype), second))
    return torch.cat(outputs)


def beside_plain(runs: Runs) -> dict[str, dict[str, list[float]]]:
    """By recipe, how far outputs and gradients are from a plain computation in FP8, and that from one in bf16."""
    found: dict[str, dict[str, list[float]]] = {}
    # With PyTorch's SwiGLU.
    plainly = {"steps": 1, "check_start": False, "fused": "off"}
    for name, rounding in (("tensorwise", tensorwise), ("blockwise", blockwise)):
        (policy,) = policy_chunks(runs.engine(runs.config(precision={"fp8": name}, train=plainly)))
        experts = policy.decoder.layers[0].mlp.experts
        given = [getattr(linear, f"weight{n}") for linear in (experts.linear_fc1, experts.linear_fc2) for n in range(4)]
        random = torch.Generator().manual_seed(3)
        tokens = torch.randn(sum(TOKENS), policy.config.hidden_size, generator=random).bfloat16().requires_grad_()
        shares = torch.rand(sum(TOKENS), generator=random).requires_grad_()
        upstream = torch.randn(tokens.shape, generator=random).bfloat16()
        for weight in given:
            weight.main_grad.zero_()
        with get_fp8_context(policy.config, 0):
            output, _ = experts(tokens, torch.tensor(TOKENS), shares)
        output.backward(upstream)
        ours = [output, tokens.grad, shares.grad, *(weight.main_grad.clone() for weight in given)]
        results = []
        for linear in (lambda x, w, r=rounding: _Linear.apply(x, w, r), F.linear):
            inputs = [each.detach().clone().requires_grad_() for each in (tokens, shares, *given)]
            made = plain(inputs[0], inputs[1], list(zip(inputs[2:6], inputs[6:], strict=True)), linear)
            made.backward(upstream)
            results.append([made, *(torch.zeros_like(each) if each.grad is None else each.grad for each in inputs)])
        found[name] = {
            "to plain": [_distance(*pair) for pair in zip(ours, results[0], strict=True)],
            "plain to bf16": [_distance(*pair) for pair in zip(*results, strict=True)],
        }
    return found


def _distance(ours: Tensor, theirs: Tensor) -> float:
    return float((ours.float() - theirs.float()).norm() / theirs.float().norm().clamp(min=1e-30))
