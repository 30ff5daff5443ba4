"""Step metrics against values worked out directly from the log-probs."""

import math
from collections.abc import Callable
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.distributed as dist

from megatron_tgdpo.loss.methods import METHODS
from megatron_tgdpo.loss.preference import PreferenceLoss, sft_loss, tgdpo_loss
from megatron_tgdpo.models.logp_tolerance import LogpDifference
from megatron_tgdpo.output import metrics as tables
from megatron_tgdpo.output.metrics import WEIGHT_EDGES, StepMetrics, pack_metrics, reduce_metrics

BETA, ALPHA = 0.2, 1.5
OPTIONS = {**METHODS["tgdpo"].options, "beta": BETA, "alpha": ALPHA}


def reduced(
    group: dist.ProcessGroup, packs: list[tuple[torch.Tensor, ...]], without: tuple[str, ...] = ()
) -> StepMetrics:
    metrics = []
    for policy, reference, guide, lengths, indices in packs:
        loss = tgdpo_loss(policy, {"reference": reference, "guide": guide}, lengths, OPTIONS)
        metrics.append(pack_metrics(loss, indices))
    pg = SimpleNamespace(dp_cp=group, pp=group)
    return reduce_metrics(metrics, pg, torch.device("cpu"), without=without)  # type: ignore[arg-type]


def pack(seed: int, lengths: list[int], indices: list[int]) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(seed)
    logps = [-9 * torch.rand(sum(lengths), generator=generator) for _ in range(3)]
    return (*logps, torch.tensor(lengths, dtype=torch.int64), torch.tensor(indices, dtype=torch.int64))


def test_metrics_do_not_depend_on_packing_and_are_right(single_rank_group: dist.ProcessGroup) -> None:
    packs = [pack(1, [2, 3, 4, 1], [0, 1]), pack(2, [5, 6], [2]), pack(3, [], [])]
    joined = tuple(torch.cat(parts) for parts in zip(*packs, strict=True))
    split = reduced(single_rank_group, packs).values
    whole = reduced(single_rank_group, [joined]).values
    assert split.keys() == whole.keys()
    for name, value in split.items():
        assert value == pytest.approx(whole[name], rel=1e-5, abs=1e-5), name
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
    counts = reduced(single_rank_group, packs).weight_counts
    assert counts == reduced(single_rank_group, [joined]).weight_counts
    expected = np.histogram(weights.double().numpy(), [-np.inf, *WEIGHT_EDGES, np.inf])[0]
    assert counts == expected.tolist()
    assert sum(counts[: WEIGHT_EDGES.index(0.0) + 1]) == int((weights < 0).sum())
    guide_sums = [float(x.sum() - y.sum()) for x, y in zip(sums[2], sums[1], strict=True)]
    correct = sum(c > r for c, r in zip(guide_sums[0::2], guide_sums[1::2], strict=True))
    assert split["guidance/guide_accuracy"] == pytest.approx(correct / 3)
    assert split["guidance/guide_ties"] == 0
    tied = reduced(single_rank_group, [(policy, reference, reference, *joined[3:])]).values
    assert (tied["guidance/guide_accuracy"], tied["guidance/guide_ties"]) == (0, 1)


def test_the_order_of_the_tables_means_nothing(
    single_rank_group: dist.ProcessGroup, monkeypatch: pytest.MonkeyPatch
) -> None:
    packs = [pack(1, [2, 3, 4, 1], [0, 1]), pack(2, [5, 6], [2])]
    before = reduced(single_rank_group, packs)
    for table in ("_PAIR_SUMS", "_TOKEN_SUMS", "_MAXIMA"):
        monkeypatch.setattr(tables, table, dict(reversed(getattr(tables, table).items())))
    monkeypatch.setattr(tables, "_PAIR_MEANS", tables._PAIR_MEANS[::-1])
    assert reduced(single_rank_group, packs) == before


def test_bad_pairs_and_difference_from_the_reference(single_rank_group: dist.ProcessGroup) -> None:
    good, bad = pack(1, [2, 3], [40]), pack(2, [2, 3, 4, 1], [12, 31])
    assert reduced(single_rank_group, [good]).bad_pair is None
    bad[0][6] = math.nan
    bad[0][0] = math.nan
    assert reduced(single_rank_group, [good, bad]).bad_pair == 12
    same = (good[1], *good[1:])
    assert reduced(single_rank_group, [same]).difference == LogpDifference(0.0, 0.0, 0.0)
    other = pack(3, [4, 1], [7])
    apart = [found[0] - found[1] for found in (good, other)]
    sums = [part.sum() for found in zip(apart, ([2, 3], [4, 1]), strict=True) for part in found[0].split(found[1])]
    difference = reduced(single_rank_group, [good, other]).difference
    assert difference.token == pytest.approx(float(torch.cat(apart).square().mean().sqrt()), rel=1e-5)
    assert difference.largest == pytest.approx(float(torch.cat(apart).abs().max()), rel=1e-5)
    assert difference.response == pytest.approx(float(torch.stack(sums).square().mean().sqrt()), rel=1e-5)


def test_without_a_guide_its_metrics_are_left_out(single_rank_group: dist.ProcessGroup) -> None:
    values = reduced(single_rank_group, [pack(1, [2, 3], [0])], without=("guidance/",)).values
    assert "loss" in values
    assert not any(name.startswith("guidance/") for name in values)


def test_context_ranks_count_their_tokens_and_one_of_them_the_pairs(single_rank_group: dist.ProcessGroup) -> None:
    policy, reference, guide, lengths, indices = pack(1, [2, 3, 4, 1], [0, 1])
    whole = reduced(single_rank_group, [(policy, reference, guide, lengths, indices)]).values
    firsts = torch.zeros(10, dtype=torch.bool)
    firsts[[0, 2, 5, 9]] = True
    ones = torch.ones(4, dtype=torch.int64)

    def share(held: torch.Tensor, own: torch.Tensor, over_ranks: Callable[..., torch.Tensor]) -> PreferenceLoss:
        frozen = {"reference": reference[held], "guide": guide[held]}
        return tgdpo_loss(policy[held], frozen, own, OPTIONS, over_ranks)

    # Rank 0 holds the first token of every sequence, rank 1 the rest; both know the sums of both.
    shares = ((firsts, ones), (~firsts, lengths - ones))
    partial_sums: list[torch.Tensor] = []
    for held, own in shares:
        share(held, own, lambda sums: partial_sums.append(sums) or sums)  # type: ignore[func-returns-value]
    losses = [share(*of_rank, lambda _: partial_sums[0] + partial_sums[1]) for of_rank in shares]
    parts = [pack_metrics(loss, indices, count_pairs=rank == 0) for rank, loss in enumerate(losses)]
    pg = SimpleNamespace(dp_cp=single_rank_group, pp=single_rank_group)
    joined = reduce_metrics(parts, pg, torch.device("cpu")).values  # type: ignore[arg-type]
    assert joined == pytest.approx(whole, rel=1e-5, abs=1e-5)


def test_sft_loss_is_a_mean_over_tokens(single_rank_group: dist.ProcessGroup) -> None:
    packs = [pack(1, [2, 3, 4, 1], [0, 1]), pack(2, [5, 6], [2])]
    metrics = [pack_metrics(sft_loss(policy, {}, lengths, {}), indices) for policy, _, _, lengths, indices in packs]
    pg = SimpleNamespace(dp_cp=single_rank_group, pp=single_rank_group)
    values = reduce_metrics(metrics, pg, torch.device("cpu")).values  # type: ignore[arg-type]
    chosen = torch.cat([packs[0][0][:2], packs[0][0][5:9], packs[1][0][:5]])
    assert values["loss"] == pytest.approx(float(-chosen.mean()), rel=1e-5)
