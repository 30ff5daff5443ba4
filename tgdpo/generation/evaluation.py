"""The metrics by which models are judged on preference pairs and on their own answers."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from megatron_tgdpo.console import progress
from megatron_tgdpo.guidance.monitor import guide_warning
from megatron_tgdpo.intervals import Estimate, mean_interval, ratio_interval, wilson
from tgdpo.generation.logps import PromptAndResponse, response_logps, token_divergences
from tgdpo.generation.sampling import Answer, Request, Sampler, request_seed

if TYPE_CHECKING:  # it imports megatron-core
    from megatron_tgdpo.data.dataset import PreferenceDataset


@dataclass(frozen=True)
class PairScores:
    """Sums over response tokens of one model's log-probs, and the tokens: [2 pairs] each, chosen and rejected in turn.

    Float64, nats.
    """

    logps: Tensor
    tokens: Tensor


def pair_rows(dataset: "PreferenceDataset", limit: int | None) -> list[PromptAndResponse]:
    """Prompt and response ids of chosen and rejected in turn, of the first ``limit`` pairs (None: of all).

    ``~id`` stands for a token that is not trained on.
    """
    rows = []
    for index in range(len(dataset) if limit is None else min(limit, len(dataset))):
        pair = dataset[index]
        prompt = pair.prompt.tolist()
        kept = np.where(pair.trained, *(np.concatenate([pair.chosen, pair.rejected]) ^ flip for flip in (0, -1)))
        rows += [(prompt, kept[: len(pair.chosen)].tolist()), (prompt, kept[len(pair.chosen) :].tolist())]
    return rows


def distinct_prompts(rows: Sequence[PromptAndResponse], limit: int) -> list[list[int]]:
    """The first ``limit`` different prompts, in order."""
    return [list(ids) for ids in dict.fromkeys(tuple(prompt) for prompt, _ in rows)][:limit]


def score_pairs(model: PreTrainedModel, rows: Sequence[PromptAndResponse]) -> PairScores:
    """Scores :func:`pair_rows` under a model."""
    scores = response_logps(model, rows)
    sums = [logps.double().sum() for logps in scores]
    return PairScores(torch.stack(sums), torch.tensor([len(logps) for logps in scores], dtype=torch.float64))


def preference_metrics(scores: PairScores, reference: PairScores | None, beta: float) -> dict[str, Any]:
    """Accuracies with Wilson's interval, means over pairs with the normal interval.

    Args:
        scores: Of the model.
        reference: Of the reference; None for the reference itself, which has no implicit reward.
        beta: Scale of the implicit reward, beta * (log pi - log pi_ref) summed over the response.

    Returns:
        ``accuracy`` (pairs whose chosen response has the higher implicit reward; the reference's own is by log-prob),
        ``accuracy_per_token`` (by mean log-prob of the model alone, as SimPO rewards), ``ties``, ``margin``,
        ``reward_chosen`` and ``reward_rejected`` (nats; None for the reference).
    """
    means = scores.logps / scores.tokens
    rewards = scores.logps if reference is None else beta * (scores.logps - reference.logps)
    margins = rewards[0::2] - rewards[1::2]
    pairs, correct = margins.numel(), int((margins > 0).sum())
    metrics: dict[str, Any] = {
        "pairs": pairs,
        "correct": correct,
        "ties": int((margins == 0).sum()),
        "accuracy": wilson(correct, pairs),
        "accuracy_per_token": wilson(int((means[0::2] > means[1::2]).sum()), pairs),
        "margin": None,
        "reward_chosen": None,
        "reward_rejected": None,
    }
    if reference is not None:
        metrics["margin"] = mean_interval(margins.tolist())
        metrics["reward_chosen"] = mean_interval(rewards[0::2].tolist())
        metrics["reward_rejected"] = mean_interval(rewards[1::2].tolist())
    return metrics


def swap_warning(metrics: dict[str, Any]) -> str | None:
    """What :func:`~megatron_tgdpo.guidance.monitor.guide_warning` says of a model's :func:`preference_metrics`."""
    return guide_warning(metrics["correct"], metrics["pairs"], ties=metrics["ties"])


def sample_answers(
    sampler: Sampler, prompts: Sequence[list[int]], *, temperature: float, seed: int, batch: int
) -> list[Answer]:
    """One answer a prompt."""
    answers: list[Answer] = []
    with progress("answers", len(prompts), "prompt") as bar:
        for start in range(0, len(prompts), batch):
            requests = [
                Request(ids, request_seed(seed, index), temperature, f"prompt {index + 1}")
                for index, ids in enumerate(prompts[start : start + batch], start)
            ]
            answers += sampler.sample(requests)
            bar.update(len(requests))
    return answers


def answer_metrics(
    model: PreTrainedModel, reference: PreTrainedModel | None, prompts: Sequence[list[int]], answers: Sequence[Answer]
) -> dict[str, Any]:
    """Length of a model's own answers, and its divergence from the reference along them.

    KL per token is the sum over all tokens of all answers of KL(pi || pi_ref) of the next token's distribution, exact
    over the vocabulary, divided by the number of tokens. Where answers are sampled at temperature 1, its numerator's
    expectation is the KL divergence of the two models' distributions of whole answers (cut at the length limit), with
    less variance than the mean of log pi - log pi_ref has.

    Args:
        model: Which made the answers.
        reference: None for the reference itself.
        prompts: Of the answers.
        answers: Made by the model.

    Returns:
        ``answers``, ``tokens`` (a mean, normal interval), ``finished`` (share that ended before the limit, Wilson) and
        ``kl_per_token`` (nats; a ratio with the delta method's interval over answers; None for the reference).
    """
    lengths = [len(answer.ids) for answer in answers]
    metrics: dict[str, Any] = {
        "answers": len(answers),
        "tokens": mean_interval(lengths),
        "finished": wilson(sum(answer.finished for answer in answers), len(answers)),
        "kl_per_token": None,
    }
    if reference is not None:
        rows = [(prompt, answer.ids) for prompt, answer in zip(prompts, answers, strict=True)]
        sums = [values.double().sum().item() for values in token_divergences(model, reference, rows)]
        metrics["kl_per_token"] = ratio_interval(sums, lengths)
    return metrics


def as_json(metrics: dict[str, Any]) -> dict[str, Any]:
    """Estimates as dictionaries of value, low and high."""
    return {name: asdict(value) if isinstance(value, Estimate) else value for name, value in metrics.items()}
