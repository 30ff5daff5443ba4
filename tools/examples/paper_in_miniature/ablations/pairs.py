"""Preference pairs as token ids. Legend: N pairs, T tokens of a row, W tokens of the longest response."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from tools.examples.paper_in_miniature.base import SPECIAL
from tools.examples.paper_in_miniature.language import LENGTHS, Lengths, Request, token_credits, words
from tools.examples.quickstart.tokenizer import ASSISTANT, USER

VOCABULARY = [*SPECIAL, *words()]
IDS = {word: number for number, word in enumerate(VOCABULARY)}
BOS, EOS = IDS["<s>"], IDS["</s>"]


@dataclass(frozen=True)
class Pairs:
    """Preference pairs as rows of equal length.

    Attributes:
        ids: [N, 2, T] int64, prompt and response, chosen before rejected, zeros behind.
        lengths: [N, 2] int64, response tokens, the end among them.
        prompt_tokens: Those of every prompt: all are equally long.
    """

    ids: Tensor
    lengths: Tensor
    prompt_tokens: int

    def __len__(self) -> int:
        return len(self.ids)

    def swapped(self, share: float, seed: int) -> tuple[Pairs, Tensor]:
        """With that share of the labels wrong, drawn by the seed; and [N] bool, which."""
        count = round(share * len(self))
        wrong = torch.zeros(len(self), dtype=torch.bool)
        wrong[torch.randperm(len(self), generator=torch.Generator().manual_seed(seed))[:count]] = True
        return replace(self, ids=turned(self.ids, wrong), lengths=turned(self.lengths, wrong)), wrong

    def credits(self, lengths: Lengths = LENGTHS) -> Tensor:
        """[N, 2, W] float32, the oracle's credit of each response token, zeros behind."""
        found = torch.zeros(len(self), 2, self.ids.shape[2] - self.prompt_tokens)
        for pair in range(len(self)):
            for side in range(2):
                length = int(self.lengths[pair, side])
                text = [VOCABULARY[token] for token in self.ids[pair, side, : self.prompt_tokens + length].tolist()]
                answer = text[self.prompt_tokens :]
                finished = answer[-1] == "</s>"
                shown = token_credits(" ".join(text[2 : self.prompt_tokens - 2]), " ".join(answer[: length - finished]),
                                      finished, lengths)  # fmt: skip
                found[pair, side, :length] = torch.tensor(shown)
        return found


def turned(values: Tensor, wrong: Tensor) -> Tensor:
    """[N, 2, ...] with chosen and rejected changing places where ``wrong`` [N]."""
    result = values.clone()
    result[wrong] = values[wrong].flip(1)
    return result


def encode_prompts(requests: Sequence[Request]) -> Tensor:
    """[prompts, tokens] int64, in the chat template of quickstart/tokenizer.py, ready for an answer."""
    start, end = [BOS, IDS[USER]], [EOS, IDS[ASSISTANT]]
    return torch.tensor([start + [IDS[word] for word in request.prompt.split()] + end for request in requests])


def as_pairs(chosen: Sequence[list[int]], rejected: Sequence[list[int]], prompts: Tensor) -> Pairs:
    """Pairs of responses, as token ids with their ends, to prompts [N, tokens]."""
    lengths = torch.tensor([[len(a), len(b)] for a, b in zip(chosen, rejected, strict=True)])
    ids = torch.zeros(len(prompts), 2, prompts.shape[1] + int(lengths.max()), dtype=torch.int64)
    ids[:, :, : prompts.shape[1]] = prompts[:, None]
    for side, responses in enumerate((chosen, rejected)):
        for row, response in enumerate(responses):
            ids[row, side, prompts.shape[1] : prompts.shape[1] + len(response)] = torch.tensor(response)
    return Pairs(ids, lengths, prompts.shape[1])
