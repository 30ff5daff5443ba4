"""Token log-probs of responses under Hugging Face models, and the divergence between two models along them."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TypeVar

import torch
from torch import Tensor
from transformers import PreTrainedModel

from megatron_tgdpo.console import progress

# Bounds the logits of a batch: for a vocabulary of 128,256 in bf16, 8,192 tokens have 2.1 GB of them.
TOKENS_PER_BATCH = 8192
# Rows of the vocabulary-wide fp32 buffers.
_CHUNK = 512

PromptAndResponse = tuple[list[int], list[int]]
Result = TypeVar("Result")


def response_logps(
    model: PreTrainedModel, rows: Sequence[PromptAndResponse], tokens_per_batch: int = TOKENS_PER_BATCH
) -> list[Tensor]:
    """log p of each response token given all before it.

    Args:
        model: A causal language model.
        rows: Ids of prompt and response, neither empty; ``~id`` in a response is read and not scored.
        tokens_per_batch: Upper bound for the padded tokens of a batch of several rows.

    Returns:
        One fp32 CPU tensor [scored response tokens] a row, in nats.
    """
    return in_batches(
        "log-probs", rows, lambda batches: (batch_logps(model, batch) for batch in batches), tokens_per_batch
    )


def in_batches(
    label: str,
    rows: Sequence[PromptAndResponse],
    score: Callable[[Sequence[list[PromptAndResponse]]], Iterable[list[Result]]],
    tokens_per_batch: int = TOKENS_PER_BATCH,
) -> list[Result]:
    """What ``score`` makes of each row, with a progress bar.

    Args:
        label: Of the bar.
        rows: As for :func:`response_logps`.
        score: Takes batches of rows of similar length to the results of each, in their order.
        tokens_per_batch: As for :func:`response_logps`.
    """
    found: dict[int, Result] = {}
    batches = list(_batches(rows, tokens_per_batch))
    with progress(label, len(rows), "response") as bar:
        for batch, values in zip(batches, score([[rows[i] for i in batch] for batch in batches]), strict=True):
            found.update(zip(batch, values, strict=True))
            bar.update(len(batch))
    return [found[index] for index in range(len(rows))]


@torch.inference_mode()
def batch_logps(model: PreTrainedModel, rows: Sequence[PromptAndResponse]) -> list[Tensor]:
    """:func:`response_logps` of rows that are one batch."""
    results = []
    scored = [torch.tensor(response) >= 0 for _, response in rows]
    rows = [(prompt, [max(token, ~token) for token in response]) for prompt, response in rows]
    for (_, response), kept, logits in zip(rows, scored, _response_logits(model, rows), strict=True):
        targets = torch.tensor(response, device=logits.device)
        parts = [
            chunk.float().log_softmax(-1).gather(-1, ids[:, None])[:, 0]
            for chunk, ids in zip(logits.split(_CHUNK), targets.split(_CHUNK), strict=True)
        ]
        results.append(torch.cat(parts).cpu()[kept])
    return results


@torch.inference_mode()
def batch_divergences(
    model: PreTrainedModel, reference: PreTrainedModel, rows: Sequence[PromptAndResponse]
) -> list[Tensor]:
    """KL(model || reference) of the next token's distribution at each place of a response, over the whole vocabulary.

    Args:
        model: A causal language model.
        reference: Another with the same vocabulary.
        rows: One batch of ids of prompt and response, neither empty.

    Returns:
        One fp32 CPU tensor [response tokens] a row, in nats.
    """
    results = []
    for ours, theirs in zip(_response_logits(model, rows), _response_logits(reference, rows), strict=True):
        parts = []
        for mine, other in zip(ours.split(_CHUNK), theirs.split(_CHUNK), strict=True):
            log_p = mine.float().log_softmax(-1)
            log_q = other.float().log_softmax(-1)
            parts.append((log_p.exp() * (log_p - log_q)).sum(-1))
        results.append(torch.cat(parts).cpu())
    return results


def _response_logits(model: PreTrainedModel, rows: Sequence[PromptAndResponse]) -> list[Tensor]:
    """[response tokens, vocabulary] a row: what predicts each response token."""
    tokens = [torch.tensor(prompt + response) for prompt, response in rows]
    # Padding is on the right, where causal attention cannot see it from a real token.
    ids = torch.nn.utils.rnn.pad_sequence(tokens, batch_first=True).to(model.device)
    first = min(len(prompt) for prompt, _ in rows) - 1
    kept = torch.arange(first, ids.shape[1] - 1, device=model.device)
    logits = model(input_ids=ids, use_cache=False, logits_to_keep=kept).logits
    return [
        logits[row, len(prompt) - 1 - first : len(prompt) - 1 - first + len(response)]
        for row, (prompt, response) in enumerate(rows)
    ]


def _batches(rows: Sequence[PromptAndResponse], tokens_per_batch: int) -> Iterator[list[int]]:
    """Indices of rows of similar length, the longest first, so that a batch that does not fit fails at once."""
    length = [len(prompt) + len(response) for prompt, response in rows]
    order = sorted(range(len(rows)), key=length.__getitem__, reverse=True)
    start = 0
    while start < len(order):
        size = max(1, tokens_per_batch // length[order[start]])
        yield order[start : start + size]
        start += size
