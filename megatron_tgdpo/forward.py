"""The contract between megatron-core's schedule and the loss: one pack forward, and every scaling factor.

Scaling, from loss to gradient (megatron-core 0.16.1). Wanted: d/dtheta [ sum over pairs of the global batch of loss /
pairs in the global batch ], whatever the packing, accumulation and layout.

1. ``loss_func`` returns three values: the SUM of this pack's losses, this pack's number of pairs in the token slot, and
   the metrics. With ``calculate_per_token_loss=True``, ``schedules.py: forward_step_calc_loss`` divides a three-value
   loss by nothing (neither token count nor num_microbatches, and no context-parallel factor).
2. ``distributed_data_parallel.py`` then uses a gradient scaling factor of 1.0 and sums, not averages, over data ranks.
3. ``finalize_model_grads.py`` broadcasts the accumulated token slot from the last stage, sums it over dp x cp, and
   multiplies all gradients by its inverse: that is 1 / pairs in the global batch.
"""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from megatron_tgdpo.batch import PreferenceBatch
from megatron_tgdpo.colocated import TokenLogps
from megatron_tgdpo.config import LossConfig
from megatron_tgdpo.loss import PreferenceLoss, dpo_loss, tgdpo_loss
from megatron_tgdpo.metrics import PackMetrics, pack_metrics

LossFunction = Callable[[TokenLogps], tuple[Tensor, Tensor, PackMetrics]]


def forward_step(
    batches: Iterator[PreferenceBatch], model: torch.nn.Module, *, loss_config: LossConfig
) -> tuple[Tensor | TokenLogps, LossFunction]:
    """One pack through this stage, as megatron-core's schedule calls it.

    Args:
        batches: This data rank's packs of the step, the same on all its tensor and pipeline ranks.
        model: The (wrapped) :class:`~megatron_tgdpo.colocated.ColocatedModel`.
        loss_config: Method, beta and alpha.

    Returns:
        The stage's output, and the function that the last stage applies to it: see the module's scaling notes.
    """
    batch = next(batches)

    def loss_func(logps: TokenLogps) -> tuple[Tensor, Tensor, PackMetrics]:
        loss = _loss(logps, batch.response_lengths, loss_config)
        metrics = pack_metrics(loss, logps.reference, batch.response_lengths, batch.pair_indices)
        return loss.losses.sum(), loss.count, metrics

    return model(batch), loss_func


def _loss(logps: TokenLogps, lengths: Tensor, config: LossConfig) -> PreferenceLoss:
    if logps.guide is None:
        return dpo_loss(logps.policy, logps.reference, lengths, beta=config.beta)
    return tgdpo_loss(logps.policy, logps.reference, logps.guide, lengths, beta=config.beta, alpha=config.alpha)
