"""The metrics by which models are judged on preference pairs and on their own answers."""

import argparse
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from megatron_tgdpo.console import progress
from megatron_tgdpo.data.tokenizers import load_tokenizer
from megatron_tgdpo.guidance.monitor import guide_warning
from megatron_tgdpo.intervals import Estimate, mean_interval, ratio_interval, wilson
from tgdpo.generation.logps import PromptAndResponse, batch_divergences, batch_logps, in_batches
from tgdpo.generation.models import default_device, dtype_of, load_causal_lm, tokenizer_directory
from tgdpo.generation.roles import REFERENCE
from tgdpo.generation.sampling import Answer, Request, request_seed
from tgdpo.generation.transformers_sampler import TransformersSampler
from tgdpo.generation.workers import Workers

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


class ComparedModels:
    """The reference, which stays loaded, and one other model at a time, in one process.

    Args:
        given: The options of ``tgdpo evaluate``.
    """

    def __init__(self, given: argparse.Namespace) -> None:
        self._given = given
        self._device = default_device()
        directory = str(tokenizer_directory(given.reference))
        self._tokenizer = load_tokenizer(directory, given.chat_template, given.template_kwargs)
        self._reference: PreTrainedModel | None = None
        self._model: PreTrainedModel | None = None

    def load(self, directory: Path) -> None:
        """Takes an HF directory's model in place of the last one; the first is the reference."""
        if self._model is not self._reference:
            self._model = None  # before the next is loaded
        dtype = dtype_of(self._given.dtype, self._device)
        self._model = load_causal_lm(directory, dtype, self._device)
        self._reference = self._reference or self._model
        self._sampler = TransformersSampler(
            self._model, self._tokenizer, top_p=1.0, max_new_tokens=self._given.max_new_tokens
        )

    def score(self, rows: Sequence[PromptAndResponse]) -> list[tuple[float, int]]:
        """Of each row of a batch the sum of the model's log-probs (nats) and the number of scored tokens."""
        return [(values.double().sum().item(), len(values)) for values in batch_logps(self._loaded, rows)]

    def answer(self, requests: Sequence[Request]) -> list[Answer]:
        """The model's answers to a batch of prompts."""
        return self._sampler.sample(requests)

    def diverge(self, rows: Sequence[PromptAndResponse]) -> list[float]:
        """Of each row of a batch the sum of the model's divergence from the reference over the response (nats)."""
        assert self._reference is not None
        return [values.double().sum().item() for values in batch_divergences(self._loaded, self._reference, rows)]

    @property
    def _loaded(self) -> PreTrainedModel:
        assert self._model is not None
        return self._model


def score_pairs(workers: Workers[ComparedModels], name: str, rows: Sequence[PromptAndResponse]) -> PairScores:
    """Scores :func:`pair_rows` under the loaded model, whose ``name`` the bar shows."""
    scores = in_batches(f"{name}: log-probs", rows, lambda batches: workers.map(ComparedModels.score, batches))
    sums, tokens = zip(*scores, strict=True)
    return PairScores(torch.tensor(sums, dtype=torch.float64), torch.tensor(tokens, dtype=torch.float64))


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
    workers: Workers[ComparedModels],
    name: str,
    prompts: Sequence[list[int]],
    *,
    temperature: float,
    seed: int,
    batch: int,
) -> list[Answer]:
    """The loaded model's answers, one a prompt; ``batch`` of them are made together."""
    requests = [
        Request(ids, request_seed(seed, index), temperature, f"prompt {index + 1}") for index, ids in enumerate(prompts)
    ]
    answers: list[Answer] = []
    with progress(f"{name}: answers", len(prompts), "prompt") as bar:
        batches = [requests[start : start + batch] for start in range(0, len(requests), batch)]
        for made in workers.map(ComparedModels.answer, batches):
            answers += made
            bar.update(len(made))
    return answers


def answer_metrics(
    workers: Workers[ComparedModels], name: str, prompts: Sequence[list[int]], answers: Sequence[Answer]
) -> dict[str, Any]:
    """Length of a model's own answers, and its divergence from the reference along them.

    KL per token is the sum over all tokens of all answers of KL(pi || pi_ref) of the next token's distribution, exact
    over the vocabulary, divided by the number of tokens. Where answers are sampled at temperature 1, its numerator's
    expectation is the KL divergence of the two models' distributions of whole answers (cut at the length limit), with
    less variance than the mean of log pi - log pi_ref has.

    Args:
        workers: With the model loaded that made the answers.
        name: The model's.
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
    if name != REFERENCE:
        rows = [(prompt, answer.ids) for prompt, answer in zip(prompts, answers, strict=True)]
        sums = in_batches(f"{name}: KL", rows, lambda batches: workers.map(ComparedModels.diverge, batches))
        metrics["kl_per_token"] = ratio_interval(sums, lengths)
    return metrics


def as_json(metrics: dict[str, Any]) -> dict[str, Any]:
    """Estimates as dictionaries of value, low and high."""
    return {name: asdict(value) if isinstance(value, Estimate) else value for name, value in metrics.items()}
