"""A generated language whose oracle gives every token of an answer a credit of its own.

A word is a class and a number, such as ``c4``. A prompt names the class to begin with, a step, a length and a kind of
numbers: ``begin c step 2 length medium numbers odd``. Each word should be ``step`` classes after the word before it
(classes go round), have such a number, and not be one of the last ``MEMORY`` words. So what is good is decided word by
word, from the prompt and from the words before; two answers that differ in score differ in many small places. A fifth
of the prompts is held out. All randomness comes from the ``random.Random`` that the caller passes.
"""

import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from random import Random

CLASSES = "abcdef"
NUMBERS = "123456"
KINDS = {"low": "123", "high": "456", "odd": "135", "even": "246"}
STEPS = (1, 2, 3)
Lengths = Mapping[str, tuple[int, int]]
LENGTHS: Lengths = {"short": (4, 7), "medium": (9, 13), "long": (15, 20)}
MEMORY = 4
MAX_WORDS = 24

# How often a speaker takes a good word: drawn once an answer. The rest is half neutral words, half bad ones.
SKILLS = (0.4, 0.6, 0.8)
WRONG_LENGTH = 0.3

GOOD, NEUTRAL, BAD = 1.0, 0.0, -1.0


@dataclass(frozen=True)
class Request:
    """What a prompt asks for.

    Attributes:
        first: Class of the first word.
        step: Classes from each word to the next.
        length: Key of ``LENGTHS``: how many words.
        kind: Key of ``KINDS``: which numbers words should have.
    """

    first: str
    step: int
    length: str
    kind: str

    @property
    def prompt(self) -> str:
        return f"begin {self.first} step {self.step} length {self.length} numbers {self.kind}"

    @property
    def held_out(self) -> bool:
        """Whether nothing may be trained on it."""
        return zlib.crc32(self.prompt.encode()) % 5 == 0


def words() -> list[str]:
    """All words of answers and prompts."""
    content = [letter + number for letter in CLASSES for number in NUMBERS]
    return [*content, "begin", "step", "length", "numbers", *CLASSES, *map(str, STEPS), *LENGTHS, *KINDS]


def draw_request(rng: Random, *, held_out: bool) -> Request:
    """A random prompt, of those that are held out or of the others."""
    while True:
        request = Request(
            rng.choice(CLASSES), rng.choice(STEPS), rng.choice(sorted(LENGTHS)), rng.choice(sorted(KINDS))
        )
        if request.held_out == held_out:
            return request


def parse_prompt(prompt: str) -> Request:
    """Reads a prompt back.

    Raises:
        ValueError: It is not one.
    """
    match prompt.split():
        case ["begin", first, "step", step, "length", length, "numbers", kind] if (
            first in CLASSES and step in map(str, STEPS) and length in LENGTHS and kind in KINDS
        ):
            return Request(first, int(step), length, kind)
    raise ValueError(f"not a prompt of this language: {prompt!r}")


def draw_answer(rng: Random, request: Request, lengths: Lengths = LENGTHS) -> str:
    """An answer by a speaker of random skill."""
    skill = rng.choice(SKILLS)
    length = request.length
    if rng.random() < WRONG_LENGTH:
        length = rng.choice([other for other in lengths if other != length])
    answer: list[str] = []
    for _ in range(rng.randint(*lengths[length])):
        answer.append(_draw_word(rng, request, answer, skill))
    return " ".join(answer)


def _draw_word(rng: Random, request: Request, before: list[str], skill: float) -> str:
    right = _right_class(request, before)
    good: list[str] = []
    neutral: list[str] = []
    for word in (right + number for number in NUMBERS):
        (good if _credit(request, before, word) == GOOD else neutral).append(word)
    if good and rng.random() < skill:
        return rng.choice(good)
    if rng.random() < 0.5:
        return rng.choice(neutral)
    return rng.choice([letter for letter in CLASSES if letter != right]) + rng.choice(NUMBERS)


def _right_class(request: Request, before: list[str]) -> str:
    if not before or before[-1][0] not in CLASSES:
        return request.first
    return CLASSES[(CLASSES.index(before[-1][0]) + request.step) % len(CLASSES)]


def _credit(request: Request, before: list[str], word: str) -> float:
    if len(word) != 2 or word[0] != _right_class(request, before) or word[1] not in NUMBERS:
        return BAD
    return GOOD if word[1] in KINDS[request.kind] and word not in before[-MEMORY:] else NEUTRAL


def token_credits(prompt: str, answer: str, finished: bool = True, lengths: Lengths = LENGTHS) -> list[float]:
    """The oracle's credit of each word, and of the end: 1 good, 0 neutral, -1 bad.

    A word of the right class is good, or neutral where its number is of another kind or one of the last ``MEMORY``
    words comes again; any other is bad. The end is good after as many words as asked for, else bad.

    Args:
        prompt: A prompt of this language.
        answer: Any text; a token is a word.
        finished: Whether the answer came to an end; if not, there is no end to credit and the last word is bad.
        lengths: Least and most words of each length that a prompt may ask for.
    """
    request = parse_prompt(prompt)
    before: list[str] = []
    found: list[float] = []
    for word in answer.split():
        found.append(_credit(request, before, word))
        before.append(word)
    least, most = lengths[request.length]
    if finished:
        found.append(GOOD if least <= len(before) <= most else BAD)
    elif found:
        found[-1] = BAD
    return found


def score(prompt: str, answer: str, finished: bool = True, lengths: Lengths = LENGTHS) -> float:
    """The oracle's score of an answer, from -1 to 1: the mean of its credits; an empty one has the lowest."""
    found = token_credits(prompt, answer, finished, lengths)
    return sum(found) / len(found) if answer.strip() else BAD


def score_answers(prompt: str | list[dict[str, str]], answers: list[str]) -> list[float]:
    """For ``tgdpo.build_preferences --score tools.examples.paper_in_miniature.language:score_answers``.

    Whether an answer came to an end is told by its length: one of ``MAX_WORDS`` words was cut.
    """
    text = prompt if isinstance(prompt, str) else prompt[-1]["content"]
    return [score(text, answer, finished=len(answer.split()) < MAX_WORDS) for answer in answers]
