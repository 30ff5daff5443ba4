"""The contract between megatron-core's schedule and the loss: one pack forward, and every scaling factor.

Scaling, from loss to gradient (megatron-core 0.16.1). Wanted: d/dtheta [ sum over pairs of the global batch of loss /
pairs in the global batch ], whatever the packing, accumulation and layout.

1. ``loss_func`` returns three values: the SUM of this pack's losses, this pack's number of pairs in the token slot, and
   the metrics. With ``calculate_per_token_loss=True``, ``schedules.py: forward_step_calc_loss`` divides a three-value
   loss by nothing (neither token count nor num_microbatches, and no context-parallel factor).
2. ``distributed_data_parallel.py`` then uses a gradient scaling factor of 1.0 and sums, not averages, over data ranks.
3. ``finalize_model_grads.py`` broadcasts the accumulated token slot from the last stage, sums it over dp x cp, and
   multiplies all gradients by its inverse: that is 1 / pairs in the global batch.

Under context parallelism every rank of a ``cp`` group computes the losses of all pairs of its row, from sums over the
group whose backward is the identity: the gradients of the group's ranks then add up (step 2) to that of the row. Only
the group's first rank reports its pairs, so that step 3 counts each once.
"""

from collections.abc import Callable, Iterator
from functools import partial

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import reduce_from_tensor_model_parallel_region
from torch import Tensor

from megatron_tgdpo.batch import PreferenceBatch
from megatron_tgdpo.colocated import TokenLogps
from megatron_tgdpo.config import LossConfig
from megatron_tgdpo.loss import preference_loss
from megatron_tgdpo.metrics import PackMetrics, pack_metrics

LossFunction = Callable[[TokenLogps], tuple[Tensor, Tensor, PackMetrics]]


def forward_step(
    batches: Iterator[PreferenceBatch], model: torch.nn.Module, *, loss_config: LossConfig, pg: ProcessGroupCollection
) -> tuple[Tensor | TokenLogps, LossFunction]:
    """One pack through this stage, as megatron-core's schedule calls it.

    Args:
        batches: This data rank's packs of the step, the same on all its tensor and pipeline ranks.
        model: The (wrapped) :class:`~megatron_tgdpo.colocated.ColocatedModel`.
        loss_config: Method, beta and alpha.
        pg: Process groups. The loss runs one all-reduce of [4, B] over ``cp``.

    Returns:
        The stage's output, and the function that the last stage applies to it: see the module's scaling notes.
    """
    batch = next(batches)

    def loss_func(logps: TokenLogps) -> tuple[Tensor, Tensor, PackMetrics]:
        reference, guide = frozen_logps(logps, batch)
        loss = preference_loss(
            logps.policy,
            reference,
            guide,
            batch.response_lengths,
            beta=loss_config.beta,
            alpha=loss_config.alpha,
            over_ranks=partial(reduce_from_tensor_model_parallel_region, group=pg.cp),
        )
        first = pg.cp.rank() == 0
        num_pairs = torch.tensor(loss.losses.numel() if first else 0, dtype=torch.int, device=loss.losses.device)
        metrics = pack_metrics(loss, batch.pair_indices, loss_config.beta, count_pairs=first)
        return loss.losses.sum(), num_pairs, metrics

    return model(batch), loss_func


def frozen_logps(logps: TokenLogps, batch: PreferenceBatch) -> tuple[Tensor, Tensor | None]:
    """Token log-probs [R] of reference and guide: from the models that ran along, or else from the cache."""
    if logps.frozen:
        reference, *guide = logps.frozen
        return reference, guide[0] if guide else None
    assert batch.reference_logps is not None, "neither a reference nor a guidance cache"
    return batch.reference_logps, batch.guide_logps
