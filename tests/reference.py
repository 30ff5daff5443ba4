"""TGDPO and DPO training in plain PyTorch and transformers, written from the paper's equations.

Independent of the code under test: one pair at a time, full logits, no packing, no parallelism, float32. It shares
nothing with ``megatron_tgdpo`` but the token ids of the pairs.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel


@dataclass(frozen=True)
class Tokens:
    """Token ids of one pair."""

    prompt: list[int]
    chosen: list[int]
    rejected: list[int]


@dataclass(frozen=True)
class Settings:
    """What a run is defined by; ``alpha`` and the guide are unused for DPO (no guide)."""

    global_pairs: int
    steps: int
    lr: float
    beta: float = 0.1
    alpha: float = 0.5
    eps: float = 1e-8
    weight_decay: float = 0.0
    clip_grad: float = 1.0


@dataclass(frozen=True)
class Result:
    """Each step's loss and gradient norm before clipping; then the mean loss over all pairs, and weights by HF name."""

    losses: list[float]
    grad_norms: list[float]
    final_loss: float
    weights: dict[str, Tensor]


def load(path: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, attn_implementation="eager")


def response_logps(model: PreTrainedModel, prompt: list[int], response: list[int]) -> Tensor:
    """log p of every response token given all before it: [len(response)]."""
    logits = model(torch.tensor([prompt + response])).logits[0].float()
    predictions = logits[len(prompt) - 1 : -1].log_softmax(dim=-1)
    return predictions[torch.arange(len(response)), torch.tensor(response)]


def pair_loss(
    policy: PreTrainedModel,
    reference: PreTrainedModel,
    guide: PreTrainedModel | None,
    pair: Tokens,
    settings: Settings,
) -> Tensor:
    """-log sigmoid of the difference of the two responses' scores."""
    scores = []
    for response, sign in ((pair.chosen, 1.0), (pair.rejected, -1.0)):
        log_pi = response_logps(policy, pair.prompt, response)
        with torch.no_grad():
            log_ref = response_logps(reference, pair.prompt, response)
            weights = torch.ones_like(log_ref)
            if guide is not None:
                rewards = settings.beta * (response_logps(guide, pair.prompt, response) - log_ref)
                weights = 1 + sign * settings.alpha * rewards
        scores.append(settings.beta * (weights * (log_pi - log_ref)).sum())
    return -torch.log(torch.sigmoid(scores[0] - scores[1]))


def train(policy_dir: Path, reference_dir: Path, guide_dir: Path | None, pairs: Sequence[Tokens], settings: Settings):
    """Trains with AdamW and a constant learning rate, taking the pairs in order, again from the first after the last.

    Weight decay spares norms, as usual.
    """
    policy, reference = load(policy_dir).train(), load(reference_dir).eval()
    guide = load(guide_dir).eval() if guide_dir is not None else None
    parameters = list(policy.parameters())
    optimizer = torch.optim.AdamW(
        [
            {"params": [p for p in parameters if p.dim() > 1], "weight_decay": settings.weight_decay},
            {"params": [p for p in parameters if p.dim() <= 1], "weight_decay": 0.0},
        ],
        lr=settings.lr,
        eps=settings.eps,
    )
    losses, norms = [], []
    for step in range(settings.steps):
        optimizer.zero_grad()
        total = 0.0
        for i in range(step * settings.global_pairs, (step + 1) * settings.global_pairs):
            loss = pair_loss(policy, reference, guide, pairs[i % len(pairs)], settings) / settings.global_pairs
            loss.backward()
            total += loss.item()
        norms.append(torch.nn.utils.clip_grad_norm_(parameters, settings.clip_grad).item())
        optimizer.step()
        losses.append(total)
    with torch.no_grad():
        final = sum(pair_loss(policy, reference, guide, pair, settings).item() for pair in pairs) / len(pairs)
    return Result(losses, norms, final, {name: p.detach().clone() for name, p in policy.named_parameters()})
