"""The token weights of each method: by hand, with ties, and over ranks that hold parts of the responses."""

import math
from threading import Barrier, Thread
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_tgdpo.loss.choices import WEIGHTS
from megatron_tgdpo.loss.methods import METHODS
from megatron_tgdpo.loss.preference import PreferenceLoss, on_one_rank

LENGTHS = torch.tensor([3, 5, 7, 1])
SEPO: dict[str, Any] = {"weights": "sepo", "form": "sigmoid_norm", "reference_free": True, "beta": 2.0, "gamma": 0.5}
CONFPO: dict[str, Any] = {
    "weights": "confpo",
    "form": "sigmoid_norm",
    "reference_free": True,
    "beta": 1.5,
    "gamma": 1.6,
}


def weights_of(name: str, logps: Tensor, rewards: Tensor, lengths: Tensor, **options: float) -> list[float]:
    row = WEIGHTS[name]
    found: Tensor = row.weight_function(logps, rewards, lengths, {**row.options, **options}, on_one_rank)
    assert not found.requires_grad
    return found.tolist()


def loss_of(method: str, policy: Tensor, *frozen: Tensor, lengths: Tensor, **options: Any) -> PreferenceLoss:
    row = METHODS[method].given(options)
    roles = dict(zip(row.frozen, frozen, strict=True))
    return row.loss_function(policy, roles, lengths, {**row.options, **options}, on_one_rank)


def random_logps(seed: int) -> Tensor:
    return -5 * torch.rand(16, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_tgdpo_and_uniform() -> None:
    rewards, lengths = torch.tensor([0.5, -1.0, 0.5]), torch.tensor([2, 1])
    assert weights_of("tgdpo", rewards, rewards, lengths, alpha=2.0) == [2.0, -1.0, 0.0]
    assert weights_of("uniform", rewards, rewards, lengths) == [1.0, 1.0, 1.0]


def test_sepo_selects_the_highest_of_chosen_and_the_lowest_of_rejected() -> None:
    rewards = torch.tensor([0.3, -2.0, 0.1, 0.2, -0.1, 0.3, -2.0, 0.1, 0.2, -0.1, 7.0])
    lengths = torch.tensor([5, 5, 1, 0])
    assert weights_of("sepo", rewards, rewards, lengths, select_share=0.4) == [1, 0, 0, 1, 0, 0, 1, 0, 0, 1, 1]
    # Of five tokens a share of 0.5 is two, one of 0.1 none, but one at least; all of them is what it says.
    assert weights_of("sepo", rewards, rewards, lengths, select_share=0.5) == [1, 0, 0, 1, 0, 0, 1, 0, 0, 1, 1]
    assert weights_of("sepo", rewards, rewards, lengths, select_share=0.1) == [1, 0, 0, 0, 0, 0, 1, 0, 0, 0, 1]
    assert weights_of("sepo", rewards, rewards, lengths, select_share=1.0) == [1] * 11


def test_sepo_takes_all_that_are_equal_to_the_last() -> None:
    rewards = torch.tensor([0.0, -0.0, 1e-30, -1e-30, 0.0])
    lengths = torch.tensor([5, 0])
    assert weights_of("sepo", rewards, rewards, lengths, select_share=0.2) == [0, 0, 1, 0, 0]
    assert weights_of("sepo", rewards, rewards, lengths, select_share=0.4) == [1, 1, 1, 0, 1]


def test_the_share_of_ten_tokens_is_not_rounded_away() -> None:
    rewards, lengths = torch.arange(10.0), torch.tensor([10, 0])
    for tenths in range(1, 11):
        assert sum(weights_of("sepo", rewards, rewards, lengths, select_share=tenths / 10)) == tenths


def test_sepo_finds_the_same_as_sorting() -> None:
    rewards = torch.randn(16, generator=torch.Generator().manual_seed(3)) * torch.logspace(-20, 20, 16)
    expected = []
    for number, values in enumerate(rewards.split(LENGTHS.tolist())):
        ranked = (values if number % 2 == 0 else -values).sort(descending=True).values
        last = ranked[max(int(0.4 * len(values) + 1e-6), 1) - 1]
        expected += [float(value >= last) for value in (values if number % 2 == 0 else -values)]
    assert weights_of("sepo", rewards, rewards, LENGTHS, select_share=0.4) == expected


def test_a_reward_that_is_no_number_is_not_hidden() -> None:
    rewards = torch.tensor([0.1, math.nan, 0.2, 0.3])
    assert math.isnan(weights_of("sepo", rewards, rewards, torch.tensor([3, 1]))[1])


def test_confpo_selects_what_the_policy_is_less_sure_of() -> None:
    """Probabilities 0.5, 0.1 and 0.3 have the mean 0.3; of one token, and of equal ones, all count."""
    probabilities = torch.tensor([0.5, 0.1, 0.3, 0.2, 0.9, 0.7, 0.7, 0.7])
    weights = weights_of("confpo", probabilities.log(), torch.zeros(8), torch.tensor([3, 1, 1, 3]))
    assert weights == [0, 1, 1, 1, 1, 1, 1, 1]


@pytest.mark.parametrize("name", ["sepo", "confpo"])
def test_weights_do_not_depend_on_which_rank_has_a_token(name: str) -> None:
    """Two ranks, here threads, each with every other token of two responses of five and four."""
    logps = -3 * torch.rand(9, generator=torch.Generator().manual_seed(5))
    rewards = torch.randn(9, generator=torch.Generator().manual_seed(6))
    held, calls = [torch.arange(rank, 9, 2) for rank in range(2)], []
    lengths = [torch.stack([(mine < 5).sum(), (mine >= 5).sum()]) for mine in held]
    found, sums, barrier, row = torch.zeros(9), [torch.zeros(0)] * 2, Barrier(2, timeout=60), WEIGHTS[name]

    def rank(number: int) -> None:
        def over_ranks(values: Tensor) -> Tensor:
            sums[number] = values
            calls.append(number)
            barrier.wait()
            total = sums[0] + sums[1]
            barrier.wait()
            return total

        mine = held[number]
        found[mine] = row.weight_function(logps[mine], rewards[mine], lengths[number], row.options, over_ranks)

    threads = [Thread(target=rank, args=(number,)) for number in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found.tolist() == weights_of(name, logps, rewards, torch.tensor([5, 4]))
    # Each a collective.
    assert calls.count(0) == {"sepo": 5, "confpo": 1}[name]


def test_confpo_is_simpo_on_the_tokens_selected() -> None:
    """As the authors' ``cpo_loss_confpo`` computes it, on responses of several tokens."""
    lengths = torch.tensor([3, 5, 6, 2])
    policy = random_logps(1).requires_grad_()
    loss = loss_of("dpo", policy, lengths=lengths, **CONFPO)
    means = []
    for side in policy.split(lengths.tolist()):
        selected = side.detach().exp() < side.detach().exp().mean()
        means.append((side * selected).sum() / selected.sum())
    losses = [-torch.nn.functional.logsigmoid(1.5 * (means[k] - means[k + 1]) - 1.6) for k in (0, 2)]
    torch.testing.assert_close(loss.losses, torch.stack(losses))
    ours, theirs = (torch.autograd.grad(total, policy)[0] for total in (loss.losses.sum(), sum(losses)))
    torch.testing.assert_close(ours, theirs)


def test_sepo_is_simpo_on_the_tokens_selected() -> None:
    policy, reference, guide = (random_logps(seed) for seed in (1, 2, 3))
    policy.requires_grad_()
    loss = loss_of("tgdpo", policy, reference, guide, lengths=LENGTHS, select_share=0.4, **SEPO)
    means = []
    sides = zip(*(tensor.split(LENGTHS.tolist()) for tensor in (policy, guide - reference)), strict=True)
    for number, (side, scores) in enumerate(sides):
        count = max(int(0.4 * len(side)), 1)
        means.append(side[scores.topk(count, largest=number % 2 == 0).indices].mean())
    losses = [-torch.nn.functional.logsigmoid(2.0 * (means[k] - means[k + 1]) - 0.5) for k in (0, 2)]
    torch.testing.assert_close(loss.losses, torch.stack(losses))
    ours, theirs = (torch.autograd.grad(total, policy)[0] for total in (loss.losses.sum(), sum(losses)))
    torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize(("method", "options"), [("tgdpo", SEPO), ("dpo", CONFPO)])
def test_a_pack_without_pairs(method: str, options: dict[str, Any]) -> None:
    empty = torch.zeros(0, requires_grad=True)
    frozen = [torch.zeros(0)] * (2 if method == "tgdpo" else 0)
    loss = loss_of(method, empty, *frozen, lengths=torch.zeros(0, dtype=torch.int64), **options)
    loss.losses.sum().backward()
    assert loss.losses.shape == (0,)
