"""The learning-rate schedule: warm-up, then constant, linear or cosine."""

import math

from megatron.core.optimizer import ChainedOptimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

from megatron_tgdpo.config.schema import OptimizerSettings


def build_scheduler(
    optimizer: ChainedOptimizer, settings: OptimizerSettings, total_steps: int
) -> OptimizerParamScheduler:
    """Linear warm-up from 0, then constant, linear or cosine to 0 after ``total_steps``.

    As in transformers' schedules, the first step of a warm-up has learning rate 0, and warm-up takes ``warmup_steps``,
    or else ``ceil(warmup_ratio * total_steps)``, steps.
    """
    warmup = _warmup_steps(settings, total_steps)
    return OptimizerParamScheduler(
        optimizer,
        init_lr=0.0,
        max_lr=settings.lr,
        min_lr=0.0,
        lr_warmup_steps=warmup,
        lr_decay_steps=total_steps,
        lr_decay_style=settings.schedule,
        start_wd=settings.weight_decay,
        end_wd=settings.weight_decay,
        wd_incr_steps=total_steps,
        wd_incr_style="constant",
    )


def describe_schedule(settings: OptimizerSettings, total_steps: int) -> str:
    """The schedule in words, for the log."""
    warmup = _warmup_steps(settings, total_steps)
    peak = f"from 0 to {settings.lr:g} in {warmup} step{'s' * (warmup > 1)}" if warmup else f"{settings.lr:g}"
    return f"learning rate {peak}, then {settings.schedule}{'' if settings.schedule == 'constant' else ' to 0'}"


def _warmup_steps(settings: OptimizerSettings, total_steps: int) -> int:
    asked = settings.warmup_steps
    return min(math.ceil(settings.warmup_ratio * total_steps) if asked is None else asked, total_steps - 1)
