"""Answers sampled in batches, where each answer's randomness is its own: a seed an answer, not one a batch."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList, PreTrainedModel, TopPLogitsWarper

from megatron_tgdpo.data.tokenizers import Tokenizer
from megatron_tgdpo.errors import UserError
from tgdpo.generation.models import load_causal_lm, plain_generation, stop_ids


@dataclass(frozen=True)
class Request:
    """One answer to make.

    Attributes:
        prompt_ids: Ids up to where the answer begins.
        seed: Of its random numbers.
        temperature: 0 takes the likeliest token each time.
        place: How errors name the prompt.
    """

    prompt_ids: list[int]
    seed: int
    temperature: float
    place: str


@dataclass(frozen=True)
class Answer:
    """What came out.

    Attributes:
        text: Without the end-of-turn token; white space as sampled.
        ids: Response ids, with the end-of-turn token where there is one.
        finished: Whether it ended by itself, not at the limit.
    """

    text: str
    ids: list[int]
    finished: bool


class Sampler(Protocol):
    """Makes answers; the same requests in the same batch give the same answers."""

    def sample(self, requests: Sequence[Request]) -> list[Answer]:
        """Answers in the order of the requests, made as one batch.

        Raises:
            UserError: A prompt with its answer could be longer than the model's context; starts with its place.
        """
        ...


def request_seed(seed: int, *key: object) -> int:
    """A seed that depends on nothing but the run's seed and a key, such as a prompt's number and a sample's."""
    digest = hashlib.sha256(":".join(map(str, (seed, *key))).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def check_context(requests: Sequence[Request], max_new_tokens: int, limit: int | None) -> None:
    """Refuses prompts that leave less than ``max_new_tokens`` of a context of ``limit`` tokens.

    Raises:
        UserError: There is one; starts with its place.
    """
    for request in requests:
        total = len(request.prompt_ids) + max_new_tokens
        if limit is not None and total > limit:
            raise UserError(
                f"{request.place}: the prompt has {len(request.prompt_ids)} tokens; with {max_new_tokens} new ones "
                f"that is more than the model's {limit} positions: lower --max-new-tokens or leave the prompt out"
            )


class TransformersSampler:
    """Batched generation by transformers.

    Args:
        model: A causal language model, whose generation config is replaced by a plain one.
        tokenizer: Of the same directory.
        top_p: Only the likeliest tokens that together have this probability are sampled; 1 for all.
        max_new_tokens: Limit of an answer.
    """

    def __init__(self, model: PreTrainedModel, tokenizer: Tokenizer, *, top_p: float, max_new_tokens: int) -> None:
        self._model = model
        self._tokenizer = tokenizer
        self._top_p = top_p
        self._max_new_tokens = max_new_tokens
        self._stops = stop_ids(model.generation_config, tokenizer)
        plain_generation(model, self._stops)

    @torch.inference_mode()
    def sample(self, requests: Sequence[Request]) -> list[Answer]:
        """See :class:`Sampler`."""
        check_context(requests, self._max_new_tokens, context_limit(self._model.config))
        width = max(len(request.prompt_ids) for request in requests)
        ids = torch.zeros(len(requests), width, dtype=torch.int64)
        mask = torch.zeros_like(ids)
        for row, request in enumerate(requests):
            ids[row, width - len(request.prompt_ids) :] = torch.tensor(request.prompt_ids)
            mask[row, width - len(request.prompt_ids) :] = 1
        device = self._model.device
        generate: Any = self._model.generate
        output = generate(
            input_ids=ids.to(device),
            attention_mask=mask.to(device),
            logits_processor=LogitsProcessorList([SeededSampling(requests, self._top_p, device)]),
            do_sample=False,  # the processor adds the randomness
            max_new_tokens=self._max_new_tokens,
        )
        rows = output[:, width:].tolist()
        return [
            make_answer(request.prompt_ids, row, self._stops, self._tokenizer)
            for request, row in zip(requests, rows, strict=True)
        ]


class SeededSampling(LogitsProcessor):
    """Makes the largest score of a row a sample from the row's distribution, with a generator for each row.

    The largest of logit - log(E) with E exponentially distributed is a sample from the softmax of the logits (the
    Gumbel-max trick); so a row's answer does not depend on which rows it is batched with, but for rounding.
    """

    def __init__(self, requests: Sequence[Request], top_p: float, device: torch.device) -> None:
        self._generators = [
            torch.Generator(device).manual_seed(request.seed) if request.temperature > 0 else None
            for request in requests
        ]
        temperatures = [request.temperature or 1.0 for request in requests]
        self._temperatures = torch.tensor(temperatures, device=device)[:, None]
        self._top_p = TopPLogitsWarper(top_p) if top_p < 1 else None

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:  # type: ignore[override]
        """[rows, vocabulary] scores whose largest is to be taken."""
        scores = scores.float() / self._temperatures
        if self._top_p is not None:
            scores = self._top_p(input_ids, scores)  # type: ignore[arg-type]
        for row, generator in zip(scores, self._generators, strict=True):
            if generator is not None:
                row -= torch.empty_like(row).exponential_(generator=generator).log()
        return scores


def make_answer(prompt_ids: list[int], ids: Sequence[int], stops: Sequence[int], tokenizer: Tokenizer) -> Answer:
    """Cuts generated ids behind the first that ends an answer, and decodes them as they follow their prompt."""
    end = next((index for index, number in enumerate(ids) if number in stops), None)
    kept = list(ids if end is None else ids[: end + 1])
    words = kept if end is None else kept[:-1]
    # Some tokenizers drop the space before a text that stands alone; behind its prompt it stays.
    before, whole = tokenizer.decode(prompt_ids), tokenizer.decode([*prompt_ids, *words])
    text = whole[len(before) :] if whole.startswith(before) else tokenizer.decode(words)
    return Answer(text, kept, end is not None)


def context_limit(config: Any) -> int | None:
    """Positions that a model was made for, None if its config does not say."""
    return getattr(config, "max_position_embeddings", None)


def make_sampler(
    backend: str,
    directory: Path,
    tokenizer: Tokenizer,
    *,
    top_p: float,
    max_new_tokens: int,
    dtype: torch.dtype,
    device: torch.device,
) -> Sampler:
    """Loads a model for one of the backends, ``transformers`` or ``vllm``.

    Raises:
        UserError: The model cannot be loaded, or the backend is not installed.
    """
    if backend == "vllm":
        from tgdpo.generation.vllm_sampler import VllmSampler

        return VllmSampler(directory, tokenizer, top_p=top_p, max_new_tokens=max_new_tokens, dtype=dtype)
    model = load_causal_lm(directory, dtype, device)
    return TransformersSampler(model, tokenizer, top_p=top_p, max_new_tokens=max_new_tokens)
