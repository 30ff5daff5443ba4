"""Losses of routers: evenness over experts (load balancing), and small logits (z-loss). Both are off by default.

Their unit is a sequence, a prompt and its response, as in DeepSeek-V2 and V3: so they depend neither on what else a
pack has, nor on accumulation, layout, padding or shared prompts, whose tokens count in both sequences. Over a
sequence of n tokens that each go to k of E experts, with probabilities p and logits l,

    aux = E * sum over experts of [tokens that go there / (k n)] * [mean over tokens of p]
    z   = mean over tokens of logsumexp(l)^2

A layer's losses are means over the sequences of the global batch, weighted as the method's loss weighs them;
those of all layers are added. An even router has an ``aux`` of 1. Shares of tokens carry no gradient.

Sources: Switch Transformers (arXiv 2101.03961) eq. 4, ST-MoE (arXiv 2202.08906) eq. 5, DeepSeek-V2 (arXiv 2405.04434)
eq. 23; megatron-core 0.16.1 ``transformer/moe/moe_utils.py``.

Legend: T tokens of this rank, E experts, B sequences of the pack.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler
from torch import Tensor

from megatron_tgdpo.batching.packed_sequence import SequenceMembers


@dataclass
class RouterLosses:
    """The losses of one router of a model that trains.

    Args:
        aux_coefficient: Of ``aux``.
        z_coefficient: Of ``z``.
        top_k: k.
        group: Ranks that have parts of the same pack: tensor and context.
        first_token: The place of this rank's part in its context rank's, in parts; under sequence parallelism its
            tensor rank.

    Attributes:
        sequences: Of the pack that comes next, see :func:`follow_packs`.
        sums: [2] float64, ``aux`` and ``z`` times the sequences' weights, as far as they are of this rank's tokens,
            over all packs since :func:`collect`.
    """

    aux_coefficient: float
    z_coefficient: float
    top_k: int
    group: dist.ProcessGroup
    first_token: int
    sequences: SequenceMembers | None = None
    sums: Tensor | None = None

    def attach(self, weights: Tensor, logits: Tensor, routed: Tensor, scores: Tensor) -> Tensor:
        """Has the backward of a pack add the gradient of its losses.

        All-reduces [B, E + 1] over ``group``.

        Args:
            weights: [T, E] float32, of the experts' outputs; returned unchanged.
            logits: [T, E] float32.
            routed: [T, E] bool, whether a token goes to an expert.
            scores: [T, E] float32, p.
        """
        assert self.sequences is not None, "a router's losses need to know the sequences of a pack"
        count = len(self.sequences.weights)
        of_token = self.sequences.of_token.narrow(0, self.first_token * len(logits), len(logits))
        numbers = torch.arange(count, device=logits.device)
        members = (of_token.unsqueeze(2) == numbers).any(dim=1).to(logits.dtype)  # [T, B]
        # Whole numbers, exact in any order.
        totals = members.T @ torch.cat([routed.to(logits.dtype), torch.ones_like(logits[:, :1])], dim=1)
        if dist.get_world_size(self.group) > 1:
            dist.all_reduce(totals, group=self.group)
        tokens = totals[:, -1].clamp(min=1)
        shares = totals[:, :-1] / tokens.unsqueeze(1) * (logits.shape[1] / self.top_k)
        aux = (members.T @ scores * shares).sum(dim=1) / tokens
        z = members.T @ logits.logsumexp(dim=1).square() / tokens
        both = torch.stack([(each * self.sequences.weights).sum() for each in (aux, z)])
        found = both.detach().double()
        self.sums = found if self.sums is None else self.sums + found
        loss = self.aux_coefficient * both[0] + self.z_coefficient * both[1]
        result: Tensor = MoEAuxLossAutoScaler.apply(weights, loss)
        return result


def follow_packs(layer: torch.nn.Module, losses: RouterLosses) -> None:
    """Tells a layer's router, at each of its forwards, those that recompute included, which pack it sees."""

    def tell(layer: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        packing = kwargs.get("packed_seq_params")
        losses.sequences = None if packing is None else packing.sequences

    layer.register_forward_pre_hook(tell, with_kwargs=True)


def collect(found: Iterable[RouterLosses], pg: ProcessGroupCollection, device: torch.device, count: float) -> Tensor:
    """Means over layers and over the sequences of the global batch, and forgets what they are made of.

    Args:
        found: Of this rank's layers.
        pg: All-reduces over ``tp_dp_cp`` and ``pp``; every rank calls.
        device: Of the collectives.
        count: What the loss is divided by.

    Returns:
        [2] float64 on the CPU: ``aux`` and ``z``, without their coefficients.
    """
    totals = torch.zeros(3, dtype=torch.float64, device=device)
    for losses in found:
        totals[2] += 1 / pg.tp_dp_cp.size()
        if losses.sums is not None:
            totals[:2] += losses.sums
        losses.sums = None
    for group in (pg.tp_dp_cp, pg.pp):
        dist.all_reduce(totals, group=group)
    return (totals[:2] / totals[2].clamp(min=1) / max(count, 1.0)).cpu()
