"""Batched generation by transformers, with a seed an answer."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList, PreTrainedModel, TopPLogitsWarper

from megatron_tgdpo.data.tokenizers import Tokenizer
from tgdpo.generation.models import plain_generation, stop_ids
from tgdpo.generation.sampling import Answer, Request, check_context, context_limit, make_answer


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
        """See :class:`~tgdpo.generation.sampling.Sampler`."""
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
