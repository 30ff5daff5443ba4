"""A generated language whose oracle gives every token of an answer a credit of its own.

A word is a class and a number, such as ``c4``. A prompt names the class to begin with, a step and a length:
``begin c step 2 length medium``. Each word should be ``step`` classes after the word before it (classes go round), and
none of the last ``MEMORY`` words should come again. So what is good is decided word by word, from the prompt and from
the words before; two answers that differ in score differ in many small places. All randomness comes from the
``random.Random`` that the caller passes.
"""

from dataclasses import dataclass
from random import Random

CLASSES = "abcdef"
NUMBERS = "12345"
STEPS = (1, 2, 3, 4, 5)
LENGTHS = {"short": (4, 7), "medium": (9, 13), "long": (15, 20)}
MEMORY = 4
MAX_WORDS = 24

# How often a speaker takes the good choice: drawn once an answer. The rest is half repetition, half wrong class.
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
    """

    first: str
    step: int
    length: str

    @property
    def prompt(self) -> str:
        return f"begin {self.first} step {self.step} length {self.length}"


def words() -> list[str]:
    """All words of answers and prompts."""
    content = [letter + number for letter in CLASSES for number in NUMBERS]
    return [*content, "begin", "step", "length", *CLASSES, *map(str, STEPS), *LENGTHS]


def draw_request(rng: Random) -> Request:
    """A random prompt."""
    return Request(rng.choice(CLASSES), rng.choice(STEPS), rng.choice(sorted(LENGTHS)))


def parse_prompt(prompt: str) -> Request:
    """Reads a prompt back.

    Raises:
        ValueError: It is not one.
    """
    match prompt.split():
        case ["begin", first, "step", step, "length", length] if (
            first in CLASSES and step in map(str, STEPS) and length in LENGTHS
        ):
            return Request(first, int(step), length)
    raise ValueError(f"not a prompt of this language: {prompt!r}")


def draw_answer(rng: Random, request: Request) -> str:
    """An answer by a speaker of random skill."""
    skill = rng.choice(SKILLS)
    length = request.length
    if rng.random() < WRONG_LENGTH:
        length = rng.choice([other for other in LENGTHS if other != length])
    answer: list[str] = []
    for _ in range(rng.randint(*LENGTHS[length])):
        answer.append(_draw_word(rng, request, answer, skill))
    return " ".join(answer)


def _draw_word(rng: Random, request: Request, before: list[str], skill: float) -> str:
    right, recent = _right_class(request, before), before[-MEMORY:]
    repeated = [word for word in recent if word[0] == right]
    if rng.random() < skill:
        return rng.choice([word for number in NUMBERS if (word := right + number) not in recent])
    if repeated and rng.random() < 0.5:
        return rng.choice(repeated)
    return rng.choice([letter for letter in CLASSES if letter != right]) + rng.choice(NUMBERS)


def _right_class(request: Request, before: list[str]) -> str:
    if not before or before[-1][0] not in CLASSES:
        return request.first
    return CLASSES[(CLASSES.index(before[-1][0]) + request.step) % len(CLASSES)]


def token_credits(prompt: str, answer: str, finished: bool = True) -> list[float]:
    """The oracle's credit of each word, and of the end: 1 good, 0 neutral, -1 bad.

    A word of the right class is good, neutral where one of the last ``MEMORY`` words comes again; any other is bad. The
    end is good after as many words as asked for, else bad.

    Args:
        prompt: A prompt of this language.
        answer: Any text; a token is a word.
        finished: Whether the answer came to an end; if not, there is no end to credit and the last word is bad.
    """
    request, before, found = parse_prompt(prompt), [], []
    for word in answer.split():
        right = len(word) == 2 and word[0] == _right_class(request, before) and word[1] in NUMBERS
        found.append((NEUTRAL if word in before[-MEMORY:] else GOOD) if right else BAD)
        before.append(word)
    least, most = LENGTHS[request.length]
    if finished:
        found.append(GOOD if least <= len(before) <= most else BAD)
    elif found:
        found[-1] = BAD
    return found


def score(prompt: str, answer: str, finished: bool = True) -> float:
    """The oracle's score of an answer, from -1 to 1: the mean of its credits; an empty one has the lowest."""
    found = token_credits(prompt, answer, finished)
    return sum(found) / len(found) if answer.strip() else BAD


def score_answers(prompt: str | list[dict[str, str]], answers: list[str]) -> list[float]:
    """For ``tools.build_preferences --score tools.reproduction.language:score_answers``.

    Whether an answer came to an end is told by its length: one of ``MAX_WORDS`` words was cut.
    """
    text = prompt if isinstance(prompt, str) else prompt[-1]["content"]
    return [score(text, answer, finished=len(answer.split()) < MAX_WORDS) for answer in answers]
