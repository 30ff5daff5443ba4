"""What a step reports: sums and extremes per pack, reduced over micro batches and data-parallel ranks, then named.

Names follow TRL where TRL has one. Legend: P pairs, B = 2P sequences, R response tokens. All log-probs are in nats.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
import torch.distributed as dist
from megatron.core.process_groups_config import ProcessGroupCollection
from torch import Tensor

from megatron_tgdpo.loss.preference import PreferenceLoss
from megatron_tgdpo.models.logp_tolerance import LogpDifference

# Bounds of the bins in which token weights are counted: finer near 1, as far as 10 from it. 0 is one of them, so that
# negative weights have bins of their own.
_OFFSETS = [10 ** (k / 8 - 2.5) for k in range(29)]
WEIGHT_EDGES = (*(1 - offset for offset in reversed(_OFFSETS)), *(1 + offset for offset in _OFFSETS))

_Formula = Callable[[PreferenceLoss], Tensor]


def _largest(values: Tensor) -> Tensor:
    """The largest of some values, -inf if there are none."""
    return values.max() if values.numel() else values.new_full((), float("-inf"))


# What is added up over packs and ranks, by name: of pairs, then of tokens, with their weights in float64.
_PAIR_SUMS: dict[str, _Formula] = {
    "pairs": lambda loss: loss.losses.new_full((), loss.losses.numel()),
    "count": lambda loss: loss.count,
    "loss": lambda loss: loss.losses.sum(),
    "rewards/chosen": lambda loss: loss.rewards[0::2].sum(),
    "rewards/rejected": lambda loss: loss.rewards[1::2].sum(),
    "rewards/accuracies": lambda loss: (loss.rewards[0::2] > loss.rewards[1::2]).sum(),
    "logps/chosen": lambda loss: loss.logps[0::2].sum(),
    "logps/rejected": lambda loss: loss.logps[1::2].sum(),
    "logps/reference_chosen": lambda loss: loss.reference_logps[0::2].sum(),
    "logps/reference_rejected": lambda loss: loss.reference_logps[1::2].sum(),
    "margins/weighted": lambda loss: loss.weighted_margins.sum(),
    "guide_correct": lambda loss: (loss.guide_rewards[0::2] > loss.guide_rewards[1::2]).sum(),
    "guide_tied": lambda loss: (loss.guide_rewards[0::2] == loss.guide_rewards[1::2]).sum(),
    "responses_difference": lambda loss: loss.logratios.double().square().sum(),
}
_TOKEN_SUMS: dict[str, Callable[[PreferenceLoss, Tensor], Tensor]] = {
    "tokens": lambda loss, weights: weights.new_full((), weights.numel()),
    "weight": lambda loss, weights: weights.sum(),
    "weight_squared": lambda loss, weights: weights.square().sum(),
    "weight_negative": lambda loss, weights: (weights < 0).sum(),
    "tokens_difference": lambda loss, weights: loss.token_logratios.double().square().sum(),
}
# The sums of pairs that are reported as means over pairs, under their own names.
_PAIR_MEANS = (
    "rewards/chosen", "rewards/rejected", "rewards/accuracies", "logps/chosen", "logps/rejected",
    "logps/reference_chosen", "logps/reference_rejected", "margins/weighted",
)  # fmt: skip
# What the largest is taken of over packs and ranks, by name; -inf where a pack has none.
_MAXIMA: dict[str, Callable[[PreferenceLoss, Tensor, Tensor], Tensor]] = {
    "weight_max": lambda loss, weights, pairs: _largest(weights),
    "negative_weight_min": lambda loss, weights, pairs: _largest(-weights),
    "largest_difference": lambda loss, weights, pairs: _largest(loss.token_logratios.double().abs()),
    # Without a boolean index, whose size a GPU would have to tell the host.
    "negative_bad_pair": lambda loss, weights, pairs: _largest(
        torch.where(torch.isfinite(loss.losses), float("-inf"), -pairs.double())
    ),
}


def eval_group(name: str) -> str:
    """In front of the metrics of a validation set; one without a name has ``""``."""
    return f"eval/{name}" if name else "eval"


def shortened(values: Mapping[str, float]) -> dict[str, float]:
    """Metrics with the digits that they are worth: six where time, memory or speed was measured; else twelve, in which
    a last bit of one pair's loss in float32 still shows."""
    return {name: float(f"{value:.{6 if name.startswith('perf/') else 12}g}") for name, value in values.items()}


@dataclass(frozen=True)
class PackMetrics:
    """One pack's contribution.

    Attributes:
        sums: By the names of ``_PAIR_SUMS`` and ``_TOKEN_SUMS``, a number each.
        weight_counts: [len(WEIGHT_EDGES) + 1] float64, tokens by their weight.
        maxima: By the names of ``_MAXIMA``, a number each.
    """

    sums: Mapping[str, Tensor]
    weight_counts: Tensor
    maxima: Mapping[str, Tensor]


@dataclass(frozen=True)
class StepMetrics:
    """The global batch, the same on every rank.

    Attributes:
        values: Metrics by name, without a ``train/`` or ``eval/`` in front of ``loss``.
        difference: Of the log-probs of policy and reference; zeros without a reference.
        bad_pair: Smallest dataset index of a pair whose loss is not finite, or None.
        count: What the losses' sum is divided by: pairs, or for SFT chosen tokens.
        weight_counts: Tokens whose weight is below the first of ``WEIGHT_EDGES``, from it up to the next, and so on.
    """

    values: dict[str, float]
    difference: LogpDifference
    bad_pair: int | None
    count: float
    weight_counts: list[int]


def metric_names(without: Sequence[str]) -> tuple[str, ...]:
    """Names of ``StepMetrics.values``; ``without`` as for :func:`reduce_metrics`."""
    none = _step_metrics(dict.fromkeys((*_PAIR_SUMS, *_TOKEN_SUMS), 0.0), dict.fromkeys(_MAXIMA, -math.inf))
    return tuple(name for name in none.values if not name.startswith(tuple(without)))


@torch.no_grad()
def pack_metrics(loss: PreferenceLoss, pair_indices: Tensor, *, count_pairs: bool = True) -> PackMetrics:
    """Sums what :func:`reduce_metrics` needs of one pack.

    Args:
        loss: Of the pack; its tokens are this rank's, its pairs those of all context-parallel ranks.
        pair_indices: [P] int64, each pair's index in the dataset.
        count_pairs: False on all but one of the context-parallel ranks, which all know the same pairs.
    """
    zero, weights = loss.losses.new_zeros(()), loss.token_weights.double()
    sums = {name: formula(loss) if count_pairs else zero for name, formula in _PAIR_SUMS.items()}
    sums |= {name: formula(loss, weights) for name, formula in _TOKEN_SUMS.items()}
    maxima = {name: formula(loss, weights, pair_indices) for name, formula in _MAXIMA.items()}
    return PackMetrics(sums, _weight_counts(weights), maxima)


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
        without: Beginnings of the names of metrics that mean nothing for the method, and are left out.
    """
    names, bins = [*_PAIR_SUMS, *_TOKEN_SUMS], len(WEIGHT_EDGES) + 1
    sums = torch.zeros(len(names) + bins, dtype=torch.float64, device=device)
    maxima = torch.full((len(_MAXIMA),), float("-inf"), dtype=torch.float64, device=device)
    if packs:
        sums = torch.stack([torch.cat([_vector(pack.sums, names), pack.weight_counts]) for pack in packs]).sum(dim=0)
        maxima = torch.stack([_vector(pack.maxima, _MAXIMA) for pack in packs]).amax(dim=0)
        dist.all_reduce(sums, group=pg.dp_cp)
        dist.all_reduce(maxima, op=dist.ReduceOp.MAX, group=pg.dp_cp)
    if pg.pp.size() > 1:
        both = torch.cat([sums, maxima])
        dist.broadcast(both, src=dist.get_global_rank(pg.pp, pg.pp.size() - 1), group=pg.pp)
        sums, maxima = both.split([len(sums), len(_MAXIMA)])
    named, counts = sums.split([len(names), bins])
    metrics = _step_metrics(
        dict(zip(names, named.tolist(), strict=True)), dict(zip(_MAXIMA, maxima.tolist(), strict=True))
    )
    values = {name: value for name, value in metrics.values.items() if not name.startswith(tuple(without))}
    return replace(metrics, values=values, weight_counts=[int(count) for count in counts.tolist()])


def _vector(numbers: Mapping[str, Tensor], names: Iterable[str]) -> Tensor:
    """[len(names)] float64, for a collective."""
    return torch.stack([numbers[name].double() for name in names])


def _step_metrics(sums: Mapping[str, float], maxima: Mapping[str, float]) -> StepMetrics:
    pairs, tokens = max(sums["pairs"], 1.0), max(sums["tokens"], 1.0)
    values = {"loss": sums["loss"] / max(sums["count"], 1.0)}
    values |= {name: sums[name] / pairs for name in _PAIR_MEANS}
    values["rewards/margins"] = values["rewards/chosen"] - values["rewards/rejected"]
    mean = sums["weight"] / tokens
    values |= {
        "guidance/weight_mean": mean,
        "guidance/weight_std": math.sqrt(max(sums["weight_squared"] / tokens - mean**2, 0.0)),
        "guidance/weight_min": -maxima["negative_weight_min"],
        "guidance/weight_max": maxima["weight_max"],
        "guidance/negative_fraction": sums["weight_negative"] / tokens,
        "guidance/guide_accuracy": sums["guide_correct"] / pairs,
        "guidance/guide_ties": sums["guide_tied"] / pairs,
    }
    bad = maxima["negative_bad_pair"]
    difference = LogpDifference.of_sums(
        sums["tokens"],
        sums["tokens_difference"],
        2 * sums["pairs"],
        sums["responses_difference"],
        maxima["largest_difference"],
    )
    return StepMetrics(values, difference, int(-bad) if math.isfinite(bad) else None, sums["count"], [])
