"""Answers of a model to prompts of equal length, all at once. Legend: N prompts, V vocabulary."""

from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import DynamicCache, LlamaForCausalLM


@dataclass(frozen=True)
class Answer:
    """An answer.

    Attributes:
        tokens: Its ids, the end among them if it came to one.
        finished: Whether it did.
    """

    tokens: list[int]
    finished: bool


@torch.inference_mode()
def sample(
    model: LlamaForCausalLM, prompts: Tensor, temperature: float, most_words: int, end: int, seed: int
) -> list[Answer]:
    """An answer to each of the prompts [N, tokens], of ``most_words`` tokens at most, its end not counted.

    Every token is the largest of logit / temperature + Gumbel noise, which draws it from the softmax; the noise follows
    from the seed, the prompt's place and the token's, so all models are asked with the same random numbers.
    """
    generator = torch.Generator().manual_seed(seed)
    cache = DynamicCache()
    shown, alive = prompts, torch.ones(len(prompts), dtype=torch.bool)
    drawn = []
    for _ in range(most_words + 1):
        logits = model(shown, past_key_values=cache, use_cache=True, logits_to_keep=1).logits[:, -1]
        noise = -torch.empty_like(logits).exponential_(generator=generator).log()
        shown = (logits / temperature + noise).argmax(-1, keepdim=True)
        drawn.append(shown[:, 0])
        alive &= shown[:, 0] != end
        if not alive.any():
            break
    return [_cut(row, most_words, end) for row in torch.stack(drawn, 1).tolist()]


def _cut(row: list[int], most_words: int, end: int) -> Answer:
    if end in row:
        return Answer(row[: row.index(end) + 1], True)
    return Answer(row[:most_words], False)
