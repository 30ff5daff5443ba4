"""Step metrics against figures worked out directly from the log-probs."""

import math
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist

from megatron_tgdpo.loss import sft_loss, tgdpo_loss
from megatron_tgdpo.metrics import StepMetrics, pack_metrics, reduce_metrics

BETA, ALPHA = 0.2, 1.5


def reduced(group: dist.ProcessGroup, packs: list[tuple[torch.Tensor, ...]], *, guided: bool = True) -> StepMetrics:
    metrics = []
    for policy, reference, guide, lengths, indices in packs:
        loss = tgdpo_loss(policy, reference, guide, lengths, beta=BETA, alpha=ALPHA)
        metrics.append(pack_metrics(loss, reference, lengths, indices))
    pg = SimpleNamespace(dp_cp=group, pp=group)
    return reduce_metrics(metrics, pg, torch.device("cpu"), guided=guided)  # type: ignore[arg-type]


def pack(seed: int, lengths: list[int], indices: list[int]) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(seed)
    logps = [-9 * torch.rand(sum(lengths), generator=generator) for _ in range(3)]
    return (*logps, torch.tensor(lengths, dtype=torch.int64), torch.tensor(indices, dtype=torch.int64))


def test_figures_do_not_depend_on_packing_and_are_right(single_rank_group: dist.ProcessGroup) -> None:
    packs = [pack(1, [2, 3, 4, 1], [0, 1]), pack(2, [5, 6], [2]), pack(3, [], [])]
    joined = tuple(torch.cat(parts) for parts in zip(*packs, strict=True))
    split = reduced(single_rank_group, packs).values
    whole = reduced(single_rank_group, [joined]).values
    assert split.keys() == whole.keys()
    for name, value in split.items():
        assert value == pytest.approx(whole[name], rel=1e-6), name
    policy, reference, guide, lengths, _ = joined
    sums = [t.split(lengths.tolist()) for t in (policy, reference, guide)]
    chosen_rewards = [BETA * float((p - r).sum()) for p, r in zip(sums[0][0::2], sums[1][0::2], strict=True)]
    rejected_rewards = [BETA * float((p - r).sum()) for p, r in zip(sums[0][1::2], sums[1][1::2], strict=True)]
    assert split["rewards/chosen"] == pytest.approx(sum(chosen_rewards) / 3, rel=1e-5)
    assert split["rewards/rejected"] == pytest.approx(sum(rejected_rewards) / 3, rel=1e-5)
    wins = sum(c > r for c, r in zip(chosen_rewards, rejected_rewards, strict=True))
    assert split["rewards/accuracies"] == pytest.approx(wins / 3)
    assert split["logps/chosen"] == pytest.approx(sum(float(x.sum()) for x in sums[0][0::2]) / 3, rel=1e-5)
    assert split["logps/reference_rejected"] == pytest.approx(sum(float(x.sum()) for x in sums[1][1::2]) / 3, rel=1e-5)
    signs = torch.tensor([1.0, -1.0] * 3).repeat_interleave(lengths)
    weights = 1 + ALPHA * BETA * signs * (guide - reference)
    assert split["guidance/weight_mean"] == pytest.approx(float(weights.mean()), rel=1e-5)
    assert split["guidance/weight_std"] == pytest.approx(float(weights.std(correction=0)), rel=1e-5)
    assert split["guidance/weight_min"] == pytest.approx(float(weights.min()), rel=1e-5)
    assert split["guidance/weight_max"] == pytest.approx(float(weights.max()), rel=1e-5)
    assert split["guidance/negative_fraction"] == pytest.approx(float((weights < 0).float().mean()))
    assert 0 < split["guidance/negative_fraction"] < 1
    guide_sums = [float(x.sum() - y.sum()) for x, y in zip(sums[2], sums[1], strict=True)]
    correct = sum(c > r for c, r in zip(guide_sums[0::2], guide_sums[1::2], strict=True))
    assert split["guidance/guide_accuracy"] == pytest.approx(correct / 3)


def test_bad_pairs_and_start_deviation(single_rank_group: dist.ProcessGroup) -> None:
    good, bad = pack(1, [2, 3], [40]), pack(2, [2, 3, 4, 1], [12, 31])
    assert reduced(single_rank_group, [good]).bad_pair is None
    bad[0][6] = math.nan
    bad[0][0] = math.nan
    assert reduced(single_rank_group, [good, bad]).bad_pair == 12
    same = (good[1], *good[1:])
    assert reduced(single_rank_group, [same]).start_deviation < 1e-6
    assert reduced(single_rank_group, [good]).start_deviation > 1e-3


def test_without_a_guide_its_figures_are_left_out(single_rank_group: dist.ProcessGroup) -> None:
    values = reduced(single_rank_group, [pack(1, [2, 3], [0])], guided=False).values
    assert "loss" in values
    assert not any(name.startswith("guidance/") for name in values)


def test_sft_loss_is_a_mean_over_tokens(single_rank_group: dist.ProcessGroup) -> None:
    packs = [pack(1, [2, 3, 4, 1], [0, 1]), pack(2, [5, 6], [2])]
    metrics = []
    for policy, reference, _, lengths, indices in packs:
        metrics.append(pack_metrics(sft_loss(policy, lengths), reference, lengths, indices))
    pg = SimpleNamespace(dp_cp=single_rank_group, pp=single_rank_group)
    values = reduce_metrics(metrics, pg, torch.device("cpu"), guided=False).values  # type: ignore[arg-type]
    chosen = torch.cat([packs[0][0][:2], packs[0][0][5:9], packs[1][0][:5]])
    assert values["loss"] == pytest.approx(float(-chosen.mean()), rel=1e-6)
