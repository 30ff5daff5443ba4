"""TGDPO, DPO, SimPO, ORPO and SFT training in plain PyTorch and transformers, written from the papers' equations.

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
    """What a run is defined by; options that the method does not use are unused."""

    global_pairs: int
    steps: int
    lr: float
    method: str = "tgdpo"
    beta: float = 0.1
    alpha: float = 0.5
    label_smoothing: float = 0.0
    sft_weight: float = 0.0
    gamma: float = 0.0
    form: str = "sigmoid"  # or sigmoid_norm, ipo
    guide_beta: float | None = None
    weights: str = "tgdpo"  # or sepo, confpo; without a guide tgdpo is none
    select_share: float = 0.3
    reference_free: bool = False
    sentences: bool = False  # of one sentence a response
    eps: float = 1e-8
    weight_decay: float = 0.0
    clip_grad: float = 1.0
    aux_loss: float = 0.0  # coefficients of the routers' losses
    z_loss: float = 0.0


@dataclass(frozen=True)
class Result:
    """Each step's loss and gradient norm before clipping; then the mean loss of validation, and weights by HF name."""

    losses: list[float]
    grad_norms: list[float]
    final_loss: float
    weights: dict[str, Tensor]
    router_losses: list[tuple[float, float]]  # each step's, load balancing and z, means over sequences and layers


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
    """The loss of one pair; for SFT the negative log-likelihood of its chosen response."""
    chosen = response_logps(policy, pair.prompt, pair.chosen)
    if settings.method == "sft":
        return -chosen.sum()
    rejected = response_logps(policy, pair.prompt, pair.rejected)
    if settings.method == "simpo":
        margin = settings.beta * (chosen.mean() - rejected.mean()) - settings.gamma
        return -torch.log(torch.sigmoid(margin))
    if settings.method == "orpo":
        odds = [torch.exp(mean) / (1 - torch.exp(mean)) for mean in (chosen.mean(), rejected.mean())]
        return -chosen.mean() - settings.beta * torch.log(torch.sigmoid(torch.log(odds[0] / odds[1])))
    scores = []
    for response, log_pi, sign in ((pair.chosen, chosen, 1.0), (pair.rejected, rejected, -1.0)):
        with torch.no_grad():
            log_ref = response_logps(reference, pair.prompt, response)
            weights = torch.ones_like(log_ref)
            if guide is not None:
                guide_beta = settings.beta if settings.guide_beta is None else settings.guide_beta
                rewards = guide_beta * (response_logps(guide, pair.prompt, response) - log_ref)
                if settings.sentences:
                    rewards = rewards.mean().expand_as(rewards)
                weights = 1 + sign * settings.alpha * rewards
        if settings.weights == "sepo":
            best = (sign * rewards).topk(max(1, int(settings.select_share * len(rewards)))).indices
            weights = torch.zeros_like(log_ref).index_fill(0, best, 1.0)
        if settings.weights == "confpo":
            weights = (log_pi.exp() <= log_pi.exp().mean()).float().detach()
        weighted = weights * (log_pi if settings.reference_free else log_pi - log_ref)
        terms = len(log_ref) if settings.weights == "tgdpo" else weights.sum()
        scores.append(settings.beta * (weighted.sum() / (1 if settings.form == "sigmoid" else terms)))
    if settings.form == "ipo":
        distance = (scores[0] - scores[1]) / settings.beta - 1 / (2 * settings.beta)
        return distance**2 - settings.sft_weight * chosen.mean()
    right = torch.sigmoid(scores[0] - scores[1] - settings.gamma)
    smoothed = (1 - settings.label_smoothing) * torch.log(right) + settings.label_smoothing * torch.log(1 - right)
    return -smoothed - settings.sft_weight * chosen.mean()


class Routers:
    """The losses of a model's routers for one sequence, from what goes into them.

    Linear layers whose name ends in gate or router, with the keys that transformers gives them.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self.top_k = model.config.num_experts_per_tok
        self.logits: list[Tensor] = []
        # Of routers that choose by more than their logits, whose scores are sigmoids: their choices.
        self.chosen: list[Tensor] = []
        self._hooks = [
            module.register_forward_hook(self._record)
            for name, module in model.named_modules()
            if name.endswith(("mlp.gate", "mlp.router"))
        ]
        assert self._hooks

    def _record(self, module: torch.nn.Module, args: tuple[Tensor, ...], output: object) -> None:
        hidden = args[0].reshape(-1, args[0].shape[-1])
        logits = hidden @ module.weight.T
        self.logits.append(logits if getattr(module, "bias", None) is None else logits + module.bias)
        if hasattr(module, "e_score_correction_bias"):
            self.chosen.extend(part for part in output if not part.is_floating_point())

    def close(self) -> None:
        for hook in self._hooks:
            hook.remove()

    def take(self) -> tuple[Tensor, Tensor]:
        """Load balancing and z, each the mean over layers; forgets the sequence."""
        aux, z = [], []
        for number, logits in enumerate(self.logits):
            probabilities = logits.softmax(dim=-1)
            choices = logits.topk(self.top_k).indices
            if self.chosen:
                scores = logits.sigmoid()
                probabilities, choices = scores / scores.sum(dim=-1, keepdim=True), self.chosen[number]
            tokens, experts = probabilities.shape
            loads = torch.zeros(experts)
            for chosen in choices:
                loads[chosen] += 1 / (self.top_k * tokens)
            aux.append(experts * (loads * probabilities.mean(dim=0)).sum())
            z.append((logits.logsumexp(dim=-1) ** 2).mean())
        self.logits.clear()
        self.chosen.clear()
        return torch.stack(aux).mean(), torch.stack(z).mean()


def router_loss(policy: PreTrainedModel, pair: Tokens, settings: Settings) -> tuple[Tensor, tuple[float, float]]:
    """What a pair adds to the loss, layers summed, and load balancing and z, layers averaged; of both sequences."""
    routers, found = Routers(policy), []
    responses = [pair.chosen] if settings.method == "sft" else [pair.chosen, pair.rejected]
    for response in responses:
        policy(torch.tensor([pair.prompt + response]))
        layers = len(routers.logits)
        found.append(routers.take())
    routers.close()
    aux, z = (torch.stack(each).mean() for each in zip(*found, strict=True))
    # SFT counts tokens, not pairs.
    weight = len(pair.chosen) if settings.method == "sft" else 1
    return weight * layers * (settings.aux_loss * aux + settings.z_loss * z), (weight * aux.item(), weight * z.item())


def divisor(pairs: Sequence[Tokens], method: str) -> int:
    """What the sum of the pairs' losses is divided by."""
    return sum(len(pair.chosen) for pair in pairs) if method == "sft" else len(pairs)


def train(
    policy_dir: Path,
    reference_dir: Path,
    guide_dir: Path | None,
    pairs: Sequence[Tokens],
    settings: Settings,
    validation: int | None = None,
) -> Result:
    """Trains with AdamW and a constant learning rate, taking the pairs in order, again from the first after the last.

    Weight decay spares norms and biases, as usual. The final loss is that of the first ``validation`` pairs; None is
    all of them.
    """
    guide = load(guide_dir).eval() if guide_dir is not None else None
    return train_models(load(policy_dir).train(), load(reference_dir).eval(), guide, pairs, settings, validation)


def train_models(
    policy: PreTrainedModel,
    reference: PreTrainedModel,
    guide: PreTrainedModel | None,
    pairs: Sequence[Tokens],
    settings: Settings,
    validation: int | None = None,
) -> Result:
    """As :func:`train`, of loaded models; those parameters of the policy train that require a gradient."""
    named = {name: parameter for name, parameter in policy.named_parameters() if parameter.requires_grad}
    parameters = list(named.values())
    # Biases of all of a layer's experts may be in one tensor.
    decayed = [p for name, p in named.items() if p.dim() > 1 and not name.endswith("bias")]
    spared = [p for name, p in named.items() if p.dim() <= 1 or name.endswith("bias")]
    optimizer = torch.optim.AdamW(
        [
            {"params": decayed, "weight_decay": settings.weight_decay},
            {"params": spared, "weight_decay": 0.0},
        ],
        lr=settings.lr,
        eps=settings.eps,
    )
    losses, norms, routed = [], [], []
    for step in range(settings.steps):
        optimizer.zero_grad()
        total, aux, z = 0.0, 0.0, 0.0
        batch = [pairs[(step * settings.global_pairs + i) % len(pairs)] for i in range(settings.global_pairs)]
        for pair in batch:
            loss = pair_loss(policy, reference, guide, pair, settings) / divisor(batch, settings.method)
            loss.backward()
            total += loss.item()
            if settings.aux_loss or settings.z_loss:
                added, (one_aux, one_z) = router_loss(policy, pair, settings)
                (added / divisor(batch, settings.method)).backward()
                aux += one_aux / divisor(batch, settings.method)
                z += one_z / divisor(batch, settings.method)
        routed.append((aux, z))
        norms.append(torch.nn.utils.clip_grad_norm_(parameters, settings.clip_grad).item())
        optimizer.step()
        losses.append(total)
    with torch.no_grad():
        final = sum(pair_loss(policy, reference, guide, pair, settings).item() for pair in pairs[:validation])
        final /= divisor(pairs[:validation], settings.method)
    trained = {name: p.detach().clone() for name, p in policy.named_parameters() if p.requires_grad}
    return Result(losses, norms, final, trained, routed)
