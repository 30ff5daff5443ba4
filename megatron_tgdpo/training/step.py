"""One optimizer step, and one evaluation batch: forward, backward, guard, clip, update."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import tee

import torch
from megatron.core.optimizer import ChainedOptimizer
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch.profiler import record_function

from megatron_tgdpo.batching.collate import PreferenceBatch
from megatron_tgdpo.models.experts import router_losses
from megatron_tgdpo.models.router_losses import collect
from megatron_tgdpo.output.metrics import StepMetrics, reduce_metrics
from megatron_tgdpo.setup.engine import Engine, policy_chunks
from megatron_tgdpo.training.forward_step import forward_step


def forward_backward(
    engine: Engine, packs: Iterable[PreferenceBatch], count: int, *, forward_only: bool
) -> StepMetrics:
    """Runs this data rank's packs through the pipeline; with backward, leaves finished gradients in the buffers.

    Collective over all ranks; every data rank brings the same number ``count`` of packs, a multiple of the stages where
    they are interleaved.
    """
    interleaved = len(engine.chunks) > 1
    run = get_forward_backward_func(pp_size=engine.pg.pp.size(), vp_size=len(engine.chunks) if interleaved else None)
    batches = (batch.to(engine.device) for batch in packs)
    pipeline = {} if engine.communicator is None else {"p2p_communicator": engine.communicator}
    with torch.set_grad_enabled(not forward_only):
        metrics = run(
            forward_step_func=partial(forward_step, loss_config=engine.loss, pg=engine.pg),
            data_iterator=list(tee(batches, len(engine.chunks))) if interleaved else batches,
            model=list(engine.chunks),
            num_microbatches=count,
            seq_length=engine.pack_format.tokens,
            micro_batch_size=1,
            forward_only=forward_only,
            pg_collection=engine.pg,
            **pipeline,
        )
    reduced = reduce_metrics(metrics, engine.pg, engine.device, without=engine.loss.row.without)
    return reduced if forward_only else _with_router_losses(reduced, engine)


def _with_router_losses(metrics: StepMetrics, engine: Engine) -> StepMetrics:
    """With those of a policy that trains with them."""
    policy = policy_chunks(engine)
    config = policy[0].config
    if not (config.router_aux_loss or config.router_z_loss):
        return metrics
    aux, z = collect(router_losses(policy), engine.pg, engine.device, metrics.count).tolist()
    return replace(metrics, values={**metrics.values, "moe/aux_loss": aux, "moe/z_loss": z})


@dataclass(frozen=True)
class StepResult:
    """What one optimizer step did.

    Attributes:
        metrics: Of the global batch.
        grad_norm: Global norm of the gradient before clipping.
        lr: The learning rate of this step.
        updated: False where a loss or the norm is not finite; then no parameter has changed.
    """

    metrics: StepMetrics
    grad_norm: float
    lr: float
    updated: bool


def train_step(
    engine: Engine, packs: Sequence[PreferenceBatch], next_packs: Sequence[PreferenceBatch] = ()
) -> StepResult:
    """One optimizer step over a global batch; collective over all ranks, all of which see the same result.

    Args:
        engine: The models and their optimizer.
        packs: This data rank's.
        next_packs: Of the step that follows, for prefetching; empty if there is none.
    """
    lr = engine.optimizer.param_groups[0]["lr"]
    with record_function("tgdpo::zero_gradients"):
        for chunk in engine.chunks:
            chunk.zero_grad_buffer()
        engine.optimizer.zero_grad()
    metrics = _forward_backward_with_prefetch(engine, packs, next_packs)
    if metrics.bad_pair is not None:
        return StepResult(metrics, math.nan, lr, updated=False)
    # Named for profiles, as PyTorch's own optimizers name their steps.
    with record_function("tgdpo::clip"):
        engine.optimizer.prepare_grads()
        grad_norm = float(engine.optimizer.get_grad_norm())
        if not math.isfinite(grad_norm):
            return StepResult(metrics, grad_norm, lr, updated=False)
        clip_gradients(engine.optimizer, grad_norm)
    with record_function("tgdpo::update"):
        engine.optimizer.step_with_ready_grads()
    engine.scheduler.step(1)
    return StepResult(metrics, grad_norm, lr, updated=True)


def clip_gradients(optimizer: ChainedOptimizer, norm: float) -> None:
    """Scales this rank's gradients in place if their global norm is above ``clip_grad`` of the optimizer's config.

    In place, where megatron-core's own makes a scaled copy of each gradient if it has no fused kernel. Source:
    ``ChainedOptimizer.step`` and ``clip_grads.py`` of megatron-core 0.16.1.
    """
    settings = optimizer.config
    factor = settings.clip_grad / (norm + 1e-6) if settings.clip_grad > 0 else 1.0
    # An optimizer that is offloaded keeps gradients there.
    name = "decoupled_grad" if settings.use_precision_aware_optimizer_no_fp8_or_ds_fp8 else "grad"
    parameters = [parameter for each in optimizer.chained_optimizers for parameter in each.get_parameters()]
    gradients = [gradient for one in parameters if (gradient := getattr(one, name, None)) is not None]
    # A rank may own no parameter.
    if factor < 1 and gradients:
        torch._foreach_mul_(gradients, factor)


def _forward_backward_with_prefetch(
    engine: Engine, packs: Sequence[PreferenceBatch], next_packs: Sequence[PreferenceBatch]
) -> StepMetrics:
    if engine.prefetcher is None:
        return forward_backward(engine, packs, len(packs), forward_only=False)
    # Its during_exchange runs in the communicator's exchanges: see build_engine.
    batches = engine.prefetcher.begin_step(packs, next_packs)
    metrics = forward_backward(engine, batches, len(packs), forward_only=False)
    engine.prefetcher.end_step()
    return metrics


def evaluate_packs(engine: Engine, packs: Iterable[PreferenceBatch], count: int) -> StepMetrics:
    """Metrics of some packs, without gradients. Collective, as :func:`forward_backward`."""
    batches = packs if engine.prefetcher is None else engine.prefetcher.alongside(packs)
    return forward_backward(engine, batches, count, forward_only=True)
