"""A plain training loop around the project's own loss functions, data order and learning-rate formula.

Legend: P pairs of a step, B = 2P rows, T tokens of a row, W tokens of the longest response, R response tokens.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaForCausalLM

from megatron_tgdpo.batching.sampler import DatasetPart, Sampler, make_sampler
from megatron_tgdpo.loss.methods import Method
from megatron_tgdpo.loss.preference import PreferenceLoss, on_one_rank
from tools.examples.paper_in_miniature.ablations.forward import response_logps
from tools.examples.paper_in_miniature.ablations.pairs import Pairs


@dataclass(frozen=True)
class Recipe:
    """How a model is trained; the defaults are those of ``preference.yaml``.

    Attributes:
        epochs: Passes over the pairs.
        rate: Peak learning rate.
        schedule: ``cosine`` or ``constant``, after the warm-up.
        warmup: Share of all steps in which the rate rises from 0.
        global_pairs: Pairs of a step.
    """

    epochs: int = 2
    rate: float = 1e-3
    schedule: str = "cosine"
    warmup: float = 0.1
    global_pairs: int = 32

    def rate_of(self, done: int, steps: int) -> float:
        """Learning rate of the step after ``done`` of ``steps``, as megatron_tgdpo/setup/learning_rate.py has it."""
        warmup = min(math.ceil(self.warmup * steps), steps - 1)
        if done <= warmup and warmup:
            return self.rate * done / warmup
        if self.schedule == "constant":
            return self.rate
        return self.rate * 0.5 * (1.0 + math.cos(math.pi * (done - warmup) / (steps - warmup)))


class Diverged(Exception):
    """The loss is not a finite number."""


def order_of(pairs: int, recipe: Recipe, seed: int) -> Sampler:
    """The project's data order."""
    return make_sampler([DatasetPart(pairs)], recipe.global_pairs, None, recipe.epochs, True, seed)


def within(lengths: Tensor, width: int) -> Tensor:
    """[B, width] bool: whether a place is before its row's length."""
    return torch.arange(width) < lengths[:, None]


@torch.no_grad()
def shown_logps(model: LlamaForCausalLM, pairs: Pairs) -> Tensor:
    """[N, 2, W] float32 token log-probs of all responses, zeros behind."""
    found = torch.zeros(len(pairs), 2, pairs.ids.shape[2] - pairs.prompt_tokens)
    for start in range(0, len(pairs), 128):
        rows = list(range(start, min(start + 128, len(pairs))))
        logps, lengths = response_logps(model, pairs, rows)
        part = found[rows].flatten(0, 1)
        part[within(lengths, part.shape[1])] = logps
        found[rows] = part.unflatten(0, (-1, 2))
    return found


def losses_of(
    model: LlamaForCausalLM,
    pairs: Pairs,
    rows: list[int],
    method: Method,
    options: Mapping[str, Any],
    frozen: Mapping[str, Tensor],
) -> PreferenceLoss:
    """The project's loss of some pairs. ``frozen``: [N, 2, W] log-probs by role."""
    logps, lengths = response_logps(model, pairs, rows)
    inside = within(lengths, int(lengths.max()))
    shown = {role: table[rows].flatten(0, 1)[:, : inside.shape[1]][inside] for role, table in frozen.items()}
    row = method.given(options)
    return row.loss_function(logps, shown, lengths, {**row.options, **options}, on_one_rank)


def train(
    model: LlamaForCausalLM,
    pairs: Pairs,
    method: Method,
    options: Mapping[str, Any],
    frozen: Mapping[str, Tensor],
    recipe: Recipe,
    order: Sampler,
    after_epoch: Callable[[int, float], None] | None = None,
) -> list[float]:
    """Trains in place and returns the loss of every step.

    Args:
        frozen: [N, 2, W] token log-probs of the frozen models that the method uses, by role.
        after_epoch: Called with the epochs done and the mean loss of the last of them.

    Raises:
        Diverged: A loss is not finite.
    """
    # As the project's: without decay, momenta 0.9 and 0.999, eps 1e-8, gradients clipped to norm 1.
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.0, fused=True)
    model.train()
    per_epoch = math.ceil(len(pairs) / recipe.global_pairs)
    losses: list[float] = []
    for step in range(1, order.steps + 1):
        for group in optimizer.param_groups:
            group["lr"] = recipe.rate_of(step - 1, order.steps)
        found = losses_of(model, pairs, order.step_indices(step), method, options, frozen)
        loss = found.losses.sum() / found.count
        losses.append(loss.item())
        if not math.isfinite(losses[-1]):
            raise Diverged
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if after_epoch is not None and order.consumed_pairs(step) // len(pairs) > order.consumed_pairs(step - 1) // len(
            pairs
        ):
            epoch = order.consumed_pairs(step) // len(pairs)
            model.eval()
            after_epoch(epoch, sum(losses[-per_epoch:]) / len(losses[-per_epoch:]))
            model.train()
    model.eval()
    return losses
