"""The forms of DPO's and TGDPO's loss: TRL's losses of the same log-probs, and what holds of each by hand."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_tgdpo.loss.choices import FORMS
from megatron_tgdpo.loss.forms import loss_at_reference
from megatron_tgdpo.loss.methods import METHODS
from megatron_tgdpo.loss.preference import PreferenceLoss, on_one_rank

TRL = json.loads((Path(__file__).parents[2] / "golden" / "trl_forms.json").read_text())
LENGTHS = torch.tensor([3, 5, 7, 1])
SMOOTHED = {"robust": 0.1, "exo_pair": 0.001}
PAIRWISE = [name for name, form in FORMS.items() if form.pairwise]


def random_logps(seed: int) -> Tensor:
    return -5 * torch.rand(16, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def compute(method: str, policy: Tensor, *frozen: Tensor, lengths: Tensor = LENGTHS, **options: Any) -> PreferenceLoss:
    row = METHODS[method].given(options)
    given = {"label_smoothing": SMOOTHED.get(options.get("form", ""), 0.0)} if "form" in row.options else {}
    options = {**row.options, **given, **options}
    roles = dict(zip(row.frozen, frozen, strict=True))
    return row.loss_function(policy, roles, lengths, options, on_one_rank)


def gradient_of(loss: PreferenceLoss, policy: Tensor) -> Tensor:
    return torch.autograd.grad(loss.losses.sum(), policy)[0]


def test_every_form_has_trl_s_values() -> None:
    assert set(TRL["forms"]) == set(FORMS)


@pytest.mark.parametrize("form", FORMS)
def test_losses_are_trl_s(form: str) -> None:
    """TRL computes in float32, and averages a batch of one pair."""
    policy, reference = (torch.tensor(TRL[role], dtype=torch.float64) for role in ("policy", "reference"))
    case = TRL["forms"][form]
    options = {"beta": TRL["beta"], "form": form, "label_smoothing": case["label_smoothing"]}
    loss = compute("dpo", policy, reference, lengths=torch.tensor(TRL["lengths"]), **options)
    assert loss.losses.tolist() == pytest.approx(case["losses"], rel=1e-5)


@pytest.mark.parametrize("form", PAIRWISE)
def test_without_guidance_tgdpo_is_dpo(form: str) -> None:
    policy, reference, guide = (random_logps(seed) for seed in (1, 2, 3))
    policy.requires_grad_()
    dpo = compute("dpo", policy, reference, form=form, sft_weight=0.3)
    unguided = compute("tgdpo", policy, reference, guide, form=form, sft_weight=0.3, alpha=0.0)
    guided = compute("tgdpo", policy, reference, guide, form=form, sft_weight=0.3)
    assert torch.equal(unguided.losses, dpo.losses)
    assert torch.equal(gradient_of(unguided, policy), gradient_of(dpo, policy))
    assert not torch.allclose(guided.losses, dpo.losses)


def test_weights_go_into_the_means_of_ipo() -> None:
    """beta 0.5, alpha 2: token rewards 0.5, -1 and 1, so weights 2 and -1 on chosen tokens, -1 on the rejected one."""
    policy, reference, guide = torch.tensor([[-1.0, -2.0, -3.0], [-2.0, -1.0, -5.0], [-1.0, -3.0, -3.0]]).double()
    loss = compute("tgdpo", policy, reference, guide, lengths=torch.tensor([2, 1]), form="ipo", beta=0.5, alpha=2.0)
    assert loss.token_weights.tolist() == [2.0, -1.0, -1.0]
    # Log-ratios are 1, -1 and 2; their weighted means (2 + 1) / 2 and -2.
    assert loss.losses.tolist() == pytest.approx([(1.5 + 2.0 - 1.0) ** 2])
    assert loss.weighted_margins.tolist() == pytest.approx([0.5 * 3.5])
    assert loss.rewards.tolist() == pytest.approx([0.0, 1.0])


AT_REFERENCE = {
    "sigmoid": math.log(2),
    "sigmoid_norm": math.log(2),
    "hinge": 1.0,
    "ipo": 1 / (4 * 0.3**2),
    "robust": math.log(2),
    "exo_pair": -math.log(2) - (math.log(0.999) + math.log(0.001)) / 2,
    "nca_pair": 2 * math.log(2),
    "sppo_hard": 1 / (2 * 0.3**2),
    "apo_zero": 1.0,
    "apo_down": 1.0,
}


@pytest.mark.parametrize("form", FORMS)
def test_the_loss_of_a_policy_that_is_the_reference(form: str) -> None:
    reference, guide = random_logps(2), random_logps(3)
    losses = [compute("dpo", reference, reference, form=form, beta=0.3).losses]
    if FORMS[form].pairwise:
        losses.append(compute("tgdpo", reference, reference, guide, form=form, beta=0.3).losses)
    for loss in losses:
        assert loss.tolist() == pytest.approx([AT_REFERENCE[form]] * 2, rel=1e-12)
    options = {**METHODS["dpo"].options, "form": form, "beta": 0.3, "label_smoothing": SMOOTHED.get(form, 0.0)}
    assert loss_at_reference(options) == pytest.approx(AT_REFERENCE[form], rel=1e-12)
    with_gamma = loss_at_reference({**options, "gamma": 0.5})
    assert with_gamma == pytest.approx(math.log1p(math.exp(0.5)) if FORMS[form].margin else AT_REFERENCE[form])
    assert loss_at_reference({**options, "sft_weight": 0.1}) is None
    assert loss_at_reference({**options, "reference_free": True}) is None


@pytest.mark.parametrize("form", PAIRWISE)
def test_reference_free_is_a_reference_that_likes_all_the_same(form: str) -> None:
    policy = random_logps(1).requires_grad_()
    free = compute("dpo", policy, form=form, reference_free=True)
    uniform = compute("dpo", policy, torch.zeros(16, dtype=torch.float64), form=form)
    assert torch.equal(free.losses, uniform.losses)
    assert torch.equal(gradient_of(free, policy), gradient_of(uniform, policy))
    assert torch.equal(free.rewards, uniform.rewards)
    # What does not exist is not compared.
    assert not free.logratios.any()
    assert not free.token_logratios.any()


@pytest.mark.parametrize("gamma", [0.0, 1.4])
def test_means_without_a_reference_are_simpo(gamma: float) -> None:
    policy = random_logps(1).requires_grad_()
    free = compute("dpo", policy, form="sigmoid_norm", reference_free=True, beta=2.0, gamma=gamma)
    simpo = compute("simpo", policy, beta=2.0, gamma=gamma)
    torch.testing.assert_close(free.weighted_margins, simpo.weighted_margins)
    torch.testing.assert_close(free.losses, simpo.losses)
    torch.testing.assert_close(gradient_of(free, policy), gradient_of(simpo, policy))


def test_a_guide_needs_the_reference_where_the_policy_does_not() -> None:
    policy, reference, guide = (random_logps(seed) for seed in (1, 2, 3))
    free = compute("tgdpo", policy, reference, guide, reference_free=True, beta=0.1, alpha=0.5)
    ratios = compute("tgdpo", policy, reference, guide, beta=0.1, alpha=0.5)
    assert torch.equal(free.token_weights, ratios.token_weights)
    assert torch.equal(free.logratios, ratios.logratios)
    scores = [0.1 * (side[0] * side[1]).sum().item() for side in _sides(free.token_weights, policy)]
    assert free.weighted_margins.tolist() == pytest.approx([scores[0] - scores[1], scores[2] - scores[3]])


def _sides(*tokens: Tensor) -> list[tuple[Tensor, ...]]:
    return list(zip(*(each.split(LENGTHS.tolist()) for each in tokens), strict=True))


def test_the_guide_s_beta_is_the_policy_s_unless_it_has_its_own() -> None:
    policy, reference, guide = (random_logps(seed).requires_grad_(seed == 1) for seed in (1, 2, 3))
    own = compute("tgdpo", policy, reference, guide, beta=0.1, alpha=0.5, guide_beta=0.4)
    stronger = compute("tgdpo", policy, reference, guide, beta=0.1, alpha=2.0)
    torch.testing.assert_close(own.losses, stronger.losses)
    torch.testing.assert_close(gradient_of(own, policy), gradient_of(stronger, policy))
    torch.testing.assert_close(own.token_rewards, 4 * stronger.token_rewards)
    same = compute("tgdpo", policy, reference, guide, beta=0.1, alpha=0.5, guide_beta=0.1)
    assert torch.equal(same.losses, compute("tgdpo", policy, reference, guide, beta=0.1, alpha=0.5).losses)


def test_orpo() -> None:
    """Mean token log-probs ln 0.5 and ln 0.2: odds 1 and 1 / 4."""
    policy = torch.tensor([math.log(0.25), 0.0, math.log(0.2)], dtype=torch.float64)
    loss = compute("orpo", policy, lengths=torch.tensor([2, 1]), beta=0.3)
    margin = math.log(1 / 0.25)
    assert loss.losses.tolist() == pytest.approx([math.log(2) + 0.3 * math.log1p(math.exp(-margin))])
    assert loss.weighted_margins.tolist() == pytest.approx([margin])
    assert loss.rewards.tolist() == pytest.approx([0.3 * math.log(0.5), 0.3 * math.log(0.2)])


def test_orpo_of_a_certain_response_is_finite() -> None:
    policy = torch.tensor([0.0, 0.0], requires_grad=True)
    loss = compute("orpo", policy, lengths=torch.tensor([1, 1]))
    assert loss.losses.isfinite().all()
    assert gradient_of(loss, policy).isfinite().all()


@pytest.mark.parametrize("form", FORMS)
def test_a_pack_without_pairs(form: str) -> None:
    empty = torch.zeros(0, requires_grad=True)
    loss = compute("dpo", empty, torch.zeros(0), lengths=torch.zeros(0, dtype=torch.int64), form=form)
    loss.losses.sum().backward()
    assert loss.losses.shape == (0,)
    assert empty.grad is not None
