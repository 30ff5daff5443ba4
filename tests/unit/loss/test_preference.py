"""The losses against golden values, and the identities they must satisfy, on loss and gradient."""

import json
import math
from pathlib import Path

import pytest
import torch
from torch import Tensor

from megatron_tgdpo.loss.methods import METHODS
from megatron_tgdpo.loss.preference import PreferenceLoss, on_one_rank, sum_per_sequence
from megatron_tgdpo.loss.token_weights import toward_label

GOLDEN = json.loads((Path(__file__).parents[2] / "golden" / "losses.json").read_text())
LENGTHS = torch.tensor([3, 5, 7, 1])
NONE = torch.zeros(0)


def random_logps(seed: int) -> Tensor:
    return -5 * torch.rand(16, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def compute(
    method: str, policy: Tensor, reference: Tensor, guide: Tensor, lengths: Tensor = LENGTHS, **options: float
) -> PreferenceLoss:
    """The loss of any method, as training calls it: with the models that it uses, and the defaults of its options."""
    row = METHODS[method]
    frozen = {role: values for role, values in (("reference", reference), ("guide", guide)) if role in row.frozen}
    return row.loss_function(policy, frozen, lengths, {**row.options, **options}, on_one_rank)


def loss_and_gradient(
    policy: Tensor, reference: Tensor, guide: Tensor | None, alpha: float = 0.5, beta: float = 0.1
) -> tuple[Tensor, Tensor]:
    policy = policy.clone().requires_grad_()
    if guide is None:
        losses = compute("dpo", policy, reference, NONE, beta=beta).losses
    else:
        losses = compute("tgdpo", policy, reference, guide, beta=beta, alpha=alpha).losses
    (gradient,) = torch.autograd.grad(losses.sum(), policy)
    return losses.detach(), gradient


@pytest.mark.parametrize("name", GOLDEN)
def test_golden(name: str) -> None:
    case = GOLDEN[name]
    policy = torch.tensor(case["policy"], dtype=torch.float64, requires_grad=True)
    frozen = [torch.tensor(case[model] or [], dtype=torch.float64) for model in ("reference", "guide")]
    lengths = torch.tensor(case["lengths"])
    loss: PreferenceLoss = compute(case["method"], policy, *frozen, lengths, **case["options"])
    loss.losses.sum().backward()
    torch.testing.assert_close(loss.losses.detach(), torch.tensor(case["losses"], dtype=torch.float64))
    torch.testing.assert_close(policy.grad, torch.tensor(case["gradient"], dtype=torch.float64))
    sides = policy.detach().split(case["lengths"])
    torch.testing.assert_close(loss.logps, torch.stack([side.sum() for side in sides]))
    expected_count = sum(case["lengths"][0::2]) if case["method"] == "sft" else len(case["losses"])
    assert loss.count.item() == expected_count
    assert loss.count.dtype == torch.int32


def test_alpha_zero_is_dpo() -> None:
    policy, reference, guide = (random_logps(seed) for seed in (1, 2, 3))
    dpo = loss_and_gradient(policy, reference, None)
    unguided = loss_and_gradient(policy, reference, guide, alpha=0.0)
    guided = loss_and_gradient(policy, reference, guide, alpha=0.5)
    assert torch.equal(unguided[0], dpo[0])
    assert torch.equal(unguided[1], dpo[1])
    assert not torch.allclose(guided[0], dpo[0])


def test_guide_equal_to_reference_is_dpo() -> None:
    policy, reference = random_logps(1), random_logps(2)
    dpo = loss_and_gradient(policy, reference, None)
    same = loss_and_gradient(policy, reference, reference.clone(), alpha=3.0)
    assert torch.equal(same[0], dpo[0])
    assert torch.equal(same[1], dpo[1])


@pytest.mark.parametrize(("alpha", "beta"), [(0.0, 0.1), (0.5, 0.1), (4.0, 2.0)])
def test_policy_equal_to_reference_gives_ln_2(alpha: float, beta: float) -> None:
    reference, guide = random_logps(2), random_logps(3)
    losses, gradient = loss_and_gradient(reference, reference, guide, alpha, beta)
    torch.testing.assert_close(losses, torch.full((2,), math.log(2), dtype=torch.float64), rtol=1e-12, atol=0)
    weights = 1 + alpha * toward_label(beta * (guide - reference), LENGTHS)
    signs = torch.tensor([1.0, -1.0, 1.0, -1.0], dtype=torch.float64).repeat_interleave(LENGTHS)
    torch.testing.assert_close(gradient, -0.5 * beta * weights * signs)


def test_shared_tokens_do_not_cancel_under_guidance() -> None:
    """Both responses end with the same token and log-probs: it drops out of DPO, not of TGDPO."""
    lengths = torch.tensor([2, 2])
    reference = torch.tensor([-1.0, -2.0, -3.0, -2.0])
    guide = torch.tensor([-1.0, -1.0, -3.0, -1.0])
    policy = torch.tensor([-1.0, -2.5, -3.0, -2.5])
    dpo = compute("dpo", policy, reference, NONE, lengths, beta=0.1)
    tgdpo = compute("tgdpo", policy, reference, guide, lengths, beta=0.1, alpha=0.5)
    assert dpo.weighted_margins.item() == pytest.approx(0.0, abs=1e-7)
    # weights differ by 2 * alpha * reward = 2 * 0.5 * 0.1 * 1; times beta and the log-ratio of -0.5
    assert tgdpo.weighted_margins.item() == pytest.approx(0.1 * 0.1 * -0.5, rel=1e-5)


def test_rewards_of_each_method() -> None:
    """Two tokens against one: log-ratios -0.5 and 1 sum to 0.5; log-probs -1.5 and -2 have mean -1.75."""
    policy, reference = torch.tensor([-1.5, -2.0, -4.0]), torch.tensor([-1.0, -3.0, -2.0])
    lengths = torch.tensor([2, 1])
    dpo = compute("dpo", policy, reference, NONE, lengths, beta=0.1, label_smoothing=0.3, sft_weight=1.0)
    assert dpo.rewards.tolist() == pytest.approx([0.05, -0.2])
    assert dpo.weighted_margins.tolist() == pytest.approx([0.25])
    simpo = compute("simpo", policy, NONE, NONE, lengths, beta=2.0, gamma=0.5)
    assert simpo.rewards.tolist() == pytest.approx([-3.5, -8.0])
    assert simpo.weighted_margins.tolist() == pytest.approx([4.5 - 0.5])
    assert compute("sft", policy, NONE, NONE, lengths).rewards.tolist() == pytest.approx([-1.75, -4.0])


def test_sft_without_rejected_responses() -> None:
    with_rejected = compute("sft", torch.tensor([-1.5, -2.0, -4.0]), NONE, NONE, torch.tensor([2, 1]))
    alone = compute("sft", torch.tensor([-1.5, -2.0]), NONE, NONE, torch.tensor([2, 0]))
    assert alone.losses.tolist() == with_rejected.losses.tolist() == [3.5]
    assert alone.count.item() == with_rejected.count.item() == 2
    assert alone.rewards.tolist() == [-1.75, 0.0]


def test_no_gradient_reaches_reference_or_guide() -> None:
    policy, reference, guide = (random_logps(seed).requires_grad_() for seed in (1, 2, 3))
    loss = compute("tgdpo", policy, reference, guide, beta=0.1, alpha=0.5)
    loss.losses.sum().backward()
    assert policy.grad is not None
    assert reference.grad is None
    assert guide.grad is None


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("tgdpo", {"beta": 0.1, "alpha": 0.5}),
        ("dpo", {"beta": 0.1, "sft_weight": 1.0}),
        ("simpo", {"beta": 2.0, "gamma": 1.0}),
        ("sft", {}),
    ],
)
def test_a_pack_without_pairs_is_zero_and_differentiable(method: str, options: dict[str, float]) -> None:
    empty = torch.zeros(0, requires_grad=True)
    none = torch.zeros(0)
    loss = compute(method, empty, none, none, torch.zeros(0, dtype=torch.int64), **options)
    loss.losses.sum().backward()
    assert loss.losses.shape == (0,)
    assert loss.count.item() == 0
    assert empty.grad is not None


def test_sum_per_sequence() -> None:
    sums = sum_per_sequence(torch.arange(16, dtype=torch.float64), LENGTHS)
    assert sums.tolist() == [0 + 1 + 2, 3 + 4 + 5 + 6 + 7, 8 + 9 + 10 + 11 + 12 + 13 + 14, 15]
