"""What a step reports: sums and extremes per pack, reduced over micro batches and data-parallel ranks, then named.

Names follow TRL where TRL has one. Legend: P pairs, B = 2P sequences, R response tokens. All log-probs are in nats.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
import torch.distributed as dist
from megatron.core.process_groups_config import ProcessGroupCollection
from torch import Tensor

from megatron_tgdpo.loss.preference import PreferenceLoss
from megatron_tgdpo.models.rounding import LogpDifference

_SUMS = (
    "pairs", "count", "loss", "rewards/chosen", "rewards/rejected", "rewards/accuracies", "logps/chosen",
    "logps/rejected", "logps/reference_chosen", "logps/reference_rejected", "margins/weighted", "guide_correct",
    "responses_difference", "tokens", "weight", "weight_squared", "weight_negative", "tokens_difference",
)  # fmt: skip
# Bounds of the bins in which token weights are counted: finer near 1, as far as 10 from it. 0 is one of them, so that
# negative weights have bins of their own.
_OFFSETS = [10 ** (k / 8 - 2.5) for k in range(29)]
WEIGHT_EDGES = (*(1 - offset for offset in reversed(_OFFSETS)), *(1 + offset for offset in _OFFSETS))
_MAXIMA = ("weight_max", "negative_weight_min", "largest_difference", "negative_bad_pair")


def eval_group(name: str) -> str:
    """In front of the metrics of a validation set; one without a name has ``""``."""
    return f"eval/{name}" if name else "eval"


@dataclass(frozen=True)
class PackMetrics:
    """One pack's contribution, float64.

    Attributes:
        sums: [len(_SUMS) + len(WEIGHT_EDGES) + 1], the last of which are tokens by weight.
        maxima: [len(_MAXIMA)].
    """

    sums: Tensor
    maxima: Tensor


@dataclass(frozen=True)
class StepMetrics:
    """The global batch, the same on every rank.

    Attributes:
        values: Named figures, without a ``train/`` or ``eval/`` in front of ``loss``.
        difference: Of the log-probs of policy and reference; zeros without a reference.
        bad_pair: Smallest dataset index of a pair whose loss is not finite, or None.
        weight_counts: Tokens whose weight is below the first of ``WEIGHT_EDGES``, from it up to the next, and so on.
    """

    values: dict[str, float]
    difference: LogpDifference
    bad_pair: int | None
    weight_counts: list[int]


@torch.no_grad()
def pack_metrics(loss: PreferenceLoss, pair_indices: Tensor, *, count_pairs: bool = True) -> PackMetrics:
    """Sums what :func:`reduce_metrics` needs of one pack.

    Args:
        loss: Of the pack; its tokens are this rank's, its pairs those of all context-parallel ranks.
        pair_indices: [P] int64, each pair's index in the dataset.
        count_pairs: False on all but one of the context-parallel ranks, which all know the same pairs.
    """
    rewards, logps, reference = loss.rewards, loss.logps, loss.reference_logps
    weights = loss.token_weights.double()
    of_pairs = [
        loss.losses.new_full((), loss.losses.numel()), loss.count, loss.losses.sum(), rewards[0::2].sum(),
        rewards[1::2].sum(), (rewards[0::2] > rewards[1::2]).sum(), logps[0::2].sum(), logps[1::2].sum(),
        reference[0::2].sum(), reference[1::2].sum(), loss.weighted_margins.sum(),
        (loss.guide_rewards[0::2] > loss.guide_rewards[1::2]).sum(), loss.logratios.double().square().sum(),
    ]  # fmt: skip
    of_tokens = [
        weights.new_full((), weights.numel()), weights.sum(), weights.square().sum(), (weights < 0).sum(),
        loss.token_logratios.double().square().sum(),
    ]  # fmt: skip
    sums = torch.cat([torch.stack([value.double() for value in (*of_pairs, *of_tokens)]), _weight_counts(weights)])
    if not count_pairs:
        sums[: len(of_pairs)] = 0.0
    lowest = weights.new_full((), float("-inf"))
    maxima = [lowest] * len(_MAXIMA)
    if weights.numel():
        maxima[:3] = [weights.max(), -weights.min(), loss.token_logratios.double().abs().max()]
    if pair_indices.numel():
        # Without a boolean index, whose size a GPU would have to tell the host.
        bad = torch.where(torch.isfinite(loss.losses), float("inf"), pair_indices.double())
        maxima[3] = -bad.min()
    return PackMetrics(sums, torch.stack(maxima))


def _weight_counts(weights: Tensor) -> Tensor:
    edges = torch.tensor(WEIGHT_EDGES, dtype=weights.dtype, device=weights.device)
    # Whole numbers add up exactly in any order; torch.bincount would make the host wait for a GPU.
    bins = torch.bucketize(weights, edges, right=True)
    return weights.new_zeros(len(WEIGHT_EDGES) + 1).index_add_(0, bins, torch.ones_like(weights))


def reduce_metrics(
    packs: Sequence[PackMetrics], pg: ProcessGroupCollection, device: torch.device, *, without: Sequence[str] = ()
) -> StepMetrics:
    """Combines all packs of the global batch.

    Args:
        packs: This rank's packs on the last stage; empty elsewhere.
        pg: All-reduces (sum, max) over ``dp_cp`` on the last stage, then a broadcast over ``pp``. Every rank calls.
        device: Of the collectives.
        without: Beginnings of the names of figures that mean nothing for the method, and are left out.
    """
    sums = torch.zeros(len(_SUMS) + len(WEIGHT_EDGES) + 1, dtype=torch.float64, device=device)
    maxima = torch.full((len(_MAXIMA),), float("-inf"), dtype=torch.float64, device=device)
    if packs:
        sums = torch.stack([pack.sums for pack in packs]).sum(dim=0)
        maxima = torch.stack([pack.maxima for pack in packs]).amax(dim=0)
        dist.all_reduce(sums, group=pg.dp_cp)
        dist.all_reduce(maxima, op=dist.ReduceOp.MAX, group=pg.dp_cp)
    if pg.pp.size() > 1:
        both = torch.cat([sums, maxima])
        dist.broadcast(both, src=dist.get_global_rank(pg.pp, pg.pp.size() - 1), group=pg.pp)
        sums, maxima = both.split([len(sums), len(_MAXIMA)])
    figures, counts = sums.tolist()[: len(_SUMS)], sums.tolist()[len(_SUMS) :]
    metrics = _named(dict(zip(_SUMS, figures, strict=True)), dict(zip(_MAXIMA, maxima.tolist(), strict=True)))
    values = {name: value for name, value in metrics.values.items() if not name.startswith(tuple(without))}
    return replace(metrics, values=values, weight_counts=[int(count) for count in counts])


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
    difference = LogpDifference.of_sums(
        sums["tokens"],
        sums["tokens_difference"],
        2 * sums["pairs"],
        sums["responses_difference"],
        maxima["largest_difference"],
    )
    return StepMetrics(values, difference, int(-bad) if math.isfinite(bad) else None, [])
