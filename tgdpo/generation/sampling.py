"""What samplers take and give: requests and answers, where each answer's randomness is its own, not its batch's."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from megatron_tgdpo.data.tokenizers import Tokenizer
from megatron_tgdpo.errors import UserError


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
