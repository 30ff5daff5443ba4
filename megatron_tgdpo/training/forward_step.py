"""The contract between megatron-core's schedule and the loss: one pack forward, and every scaling factor.

Scaling, from loss to gradient (megatron-core 0.16.1). Wanted: d/dtheta [ sum over pairs of the global batch of loss /
pairs in the global batch ], whatever the packing, accumulation and layout.

1. ``loss_func`` returns three values: the SUM of this pack's losses, its part of the divisor (pairs; for SFT chosen
   tokens) in the token slot, and the metrics. With ``calculate_per_token_loss=True``, ``schedules.py:
   forward_step_calc_loss`` divides a three-value loss by nothing (neither token count nor num_microbatches, and no
   context-parallel factor).
2. ``distributed_data_parallel.py`` then uses a gradient scaling factor of 1.0 and sums, not averages, over data ranks.
3. ``finalize_model_grads.py`` broadcasts the accumulated token slot from the last stage, sums it over dp x cp, and
   multiplies all gradients by its inverse: that is 1 / pairs (or tokens) in the global batch.

Under context parallelism every rank of a ``cp`` group computes the losses of all pairs of its pack, from sums over the
group whose backward is the identity: the gradients of the group's ranks then add up (step 2) to that of the pack. Only
the group's first rank reports its pairs, so that step 3 counts each once.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import partial

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import reduce_from_tensor_model_parallel_region
from torch import Tensor

from megatron_tgdpo.batching.collate import PreferenceBatch
from megatron_tgdpo.config.schema import LossConfig
from megatron_tgdpo.frozen.colocated import TokenLogps
from megatron_tgdpo.loss.preference import OverRanks, PreferenceLoss
from megatron_tgdpo.output.metrics import PackMetrics, pack_metrics

LossFunction = Callable[[TokenLogps], tuple[Tensor, Tensor, PackMetrics]]


def forward_step(
    batches: Iterator[PreferenceBatch], model: torch.nn.Module, *, loss_config: LossConfig, pg: ProcessGroupCollection
) -> tuple[Tensor | TokenLogps, LossFunction]:
    """One pack through this stage, as megatron-core's schedule calls it.

    Args:
        batches: This data rank's packs of the step, the same on all its tensor and pipeline ranks.
        model: The (wrapped) :class:`~megatron_tgdpo.frozen.colocated.ColocatedModel`.
        loss_config: Method and its options.
        pg: Process groups. The loss runs one all-reduce of a few [B] over ``cp``.

    Returns:
        The stage's output, and the function that the last stage applies to it: see the module's scaling notes.
    """
    batch = next(batches)

    def loss_func(logps: TokenLogps) -> tuple[Tensor, Tensor, PackMetrics]:
        loss = method_loss(logps, batch, loss_config, partial(reduce_from_tensor_model_parallel_region, group=pg.cp))
        first = pg.cp.rank() == 0
        metrics = pack_metrics(loss, batch.pair_indices, count_pairs=first)
        return loss.losses.sum(), loss.count if first else torch.zeros_like(loss.count), metrics

    return model(batch), loss_func


def method_loss(logps: TokenLogps, batch: PreferenceBatch, config: LossConfig, over_ranks: OverRanks) -> PreferenceLoss:
    """The loss of ``config.method``, from the log-probs that it uses."""
    method = config.row
    frozen = frozen_logps(logps, batch, method.frozen)
    return method.loss_function(logps.policy, frozen, batch.response_lengths, config.options, over_ranks)


def frozen_logps(logps: TokenLogps, batch: PreferenceBatch, roles: Sequence[str]) -> dict[str, Tensor]:
    """Token log-probs [R] of the frozen models by role: from those that ran in the pipeline, or else from the cache."""
    if logps.frozen:
        return dict(zip(roles, logps.frozen, strict=True))
    cached = {"reference": batch.reference_logps, "guide": batch.guide_logps}
    found = {role: values for role, values in cached.items() if role in roles and values is not None}
    assert len(found) == len(roles), f"log-probs of {roles} are wanted, {list(found)} are there"
    return found
