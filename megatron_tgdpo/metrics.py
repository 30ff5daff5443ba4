"""What a step reports: sums and extremes per pack, reduced over micro batches and data-parallel ranks, then named.

Names follow TRL where TRL has one. Legend: P pairs, B = 2P sequences, R response tokens. All log-probs are in nats.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core.process_groups_config import ProcessGroupCollection
from torch import Tensor

from megatron_tgdpo.loss import PreferenceLoss, sum_per_sequence

_SUMS = (
    "pairs", "count", "loss", "rewards/chosen", "rewards/rejected", "rewards/accuracies", "logps/chosen",
    "logps/rejected", "logps/reference_chosen", "logps/reference_rejected", "margins/weighted", "guide_correct",
    "tokens", "weight", "weight_squared", "weight_negative",
)  # fmt: skip
_MAXIMA = ("weight_max", "negative_weight_min", "start_deviation", "negative_bad_pair")


@dataclass(frozen=True)
class PackMetrics:
    """One pack's contribution: ``sums`` [len(_SUMS)] and ``maxima`` [len(_MAXIMA)], float64."""

    sums: Tensor
    maxima: Tensor


@dataclass(frozen=True)
class StepMetrics:
    """The global batch, the same on every rank.

    Attributes:
        values: Named figures, without a ``train/`` or ``eval/`` in front of ``loss``.
        start_deviation: Largest distance from ln 2 of a pair's -log sigmoid(weighted margin).
        bad_pair: Smallest dataset index of a pair whose loss is not finite, or None.
    """

    values: dict[str, float]
    start_deviation: float
    bad_pair: int | None


@torch.no_grad()
def pack_metrics(loss: PreferenceLoss, reference_logps: Tensor, lengths: Tensor, pair_indices: Tensor) -> PackMetrics:
    """Sums what :func:`reduce_metrics` needs of one pack. Shapes as in :class:`~megatron_tgdpo.loss.PreferenceLoss`."""
    reference = sum_per_sequence(reference_logps, lengths)
    rewards, policy = loss.rewards, loss.logps
    guide_scores = sum_per_sequence(loss.token_rewards, lengths)
    weights = loss.token_weights.double()
    sums = [
        loss.losses.new_full((), loss.losses.numel()), loss.count, loss.losses.sum(), rewards[0::2].sum(),
        rewards[1::2].sum(), (rewards[0::2] > rewards[1::2]).sum(), policy[0::2].sum(), policy[1::2].sum(),
        reference[0::2].sum(), reference[1::2].sum(), loss.weighted_margins.sum(),
        (guide_scores[0::2] > guide_scores[1::2]).sum(), weights.new_full((), weights.numel()), weights.sum(),
        weights.square().sum(), (weights < 0).sum(),
    ]  # fmt: skip
    lowest = weights.new_full((), float("-inf"))
    maxima = torch.stack([lowest] * len(_MAXIMA))
    if weights.numel():
        # Without a boolean index, whose size a GPU would have to tell the host.
        bad = torch.where(torch.isfinite(loss.losses), float("inf"), pair_indices.double())
        maxima = torch.stack(
            [
                weights.max(),
                -weights.min(),
                (-F.logsigmoid(loss.weighted_margins.double()) - math.log(2)).abs().max(),
                -bad.min(),
            ]
        )
    return PackMetrics(torch.stack([value.double() for value in sums]), maxima)


def reduce_metrics(
    packs: Sequence[PackMetrics], pg: ProcessGroupCollection, device: torch.device, *, guided: bool
) -> StepMetrics:
    """Combines all packs of the global batch.

    Args:
        packs: This rank's packs on the last stage; empty elsewhere.
        pg: All-reduces (sum, max) over ``dp_cp`` on the last stage, then a broadcast over ``pp``. Every rank calls.
        device: Of the collectives.
        guided: Whether there is a guide, whose figures are otherwise left out.
    """
    sums = torch.zeros(len(_SUMS), dtype=torch.float64, device=device)
    maxima = torch.full((len(_MAXIMA),), float("-inf"), dtype=torch.float64, device=device)
    if packs:
        sums = torch.stack([pack.sums for pack in packs]).sum(dim=0)
        maxima = torch.stack([pack.maxima for pack in packs]).amax(dim=0)
        dist.all_reduce(sums, group=pg.dp_cp)
        dist.all_reduce(maxima, op=dist.ReduceOp.MAX, group=pg.dp_cp)
    if pg.pp.size() > 1:
        both = torch.cat([sums, maxima])
        dist.broadcast(both, src=dist.get_global_rank(pg.pp, pg.pp.size() - 1), group=pg.pp)
        sums, maxima = both.split([len(_SUMS), len(_MAXIMA)])
    metrics = _named(dict(zip(_SUMS, sums.tolist(), strict=True)), dict(zip(_MAXIMA, maxima.tolist(), strict=True)))
    if guided:
        return metrics
    values = {name: value for name, value in metrics.values.items() if not name.startswith("guidance/")}
    return replace(metrics, values=values)


def _named(sums: dict[str, float], maxima: dict[str, float]) -> StepMetrics:
    pairs, tokens = max(sums["pairs"], 1.0), max(sums["tokens"], 1.0)
    values = {"loss": sums["loss"] / max(sums["count"], 1.0)}
    for name in _SUMS[3:11]:
        values[name] = sums[name] / pairs
    values["rewards/margins"] = values["rewards/chosen"] - values["rewards/rejected"]
    mean = sums["weight"] / tokens
    values |= {
        "guidance/weight_mean": mean,
        "guidance/weight_std": math.sqrt(max(sums["weight_squared"] / tokens - mean**2, 0.0)),
        "guidance/weight_min": -maxima["negative_weight_min"],
        "guidance/weight_max": maxima["weight_max"],
        "guidance/negative_fraction": sums["weight_negative"] / tokens,
        "guidance/guide_accuracy": sums["guide_correct"] / pairs,
    }
    bad = maxima["negative_bad_pair"]
    return StepMetrics(values, maxima["start_deviation"], int(-bad) if math.isfinite(bad) else None)
