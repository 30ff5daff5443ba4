"""The demonstration language: prompts, answers with known bad words, and the oracle that judges any answer.

A prompt asks for a number of sentences about one or two topics. An answer is good as far as its content words belong
to the topics asked for, its sentences follow the grammar, and there are as many of them as asked. All randomness comes
from the `random.Random` that the caller passes, so a seed fixes everything.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from random import Random

from tools.examples.quickstart.lexicon import FUNCTION_WORDS, NUMBERS, PARTS, PATTERNS, REQUESTS, RUDE, TOPICS

# Share of an answer's content slots that slip to a bad word: one of these is drawn per answer.
SLIP_RATES = (0.1, 0.4, 0.6)
# A sentence's grammar is broken at this share of the answer's slip rate.
BREAK_SHARE = 0.6
# Of the slips, this share is rude; the others are words of the topic that the answer strays to.
RUDE_SHARE = 0.15
# Share of answers whose number of sentences is not the one asked for.
MISCOUNT_RATE = 0.15

_WORD = re.compile(r"[^\s.]+")


@dataclass(frozen=True)
class Request:
    """What a prompt asks for: the topics an answer may draw its words from, and how many sentences."""

    topics: tuple[str, ...]
    sentences: int


@dataclass(frozen=True)
class Verdict:
    """The oracle's judgement of one answer; every figure is a fraction from 0 to 1 except the two counts.

    quality is good_content * well_formed, halved when the number of sentences is not the one asked for.
    """

    quality: float
    good_content: float
    well_formed: float
    right_count: bool
    content_words: int
    bad_words: int


def draw_prompt(rng: Random) -> str:
    """Returns a random prompt about one topic (half of the time) or two."""
    topics = rng.sample(sorted(TOPICS), rng.choice((1, 2)))
    return rng.choice(REQUESTS).format(number=rng.choice(sorted(NUMBERS)), topics=" and the ".join(topics))


def parse_prompt(prompt: str) -> Request:
    """Reads topics and number of sentences back from a prompt; raises ValueError if it names none."""
    words = prompt.split()
    topics = tuple(word for word in words if word in TOPICS)
    numbers = [NUMBERS[word] for word in words if word in NUMBERS]
    if not topics or len(numbers) != 1:
        raise ValueError(f"not a prompt of the demonstration language: {prompt!r}")
    return Request(topics, numbers[0])


def draw_answer(rng: Random, prompt: str) -> str:
    """Returns a random answer to `prompt`, with slips at a rate drawn from SLIP_RATES and the odd miscount.

    An answer strays to one topic only, so its bad words are no rarer, each by itself, than its good ones.
    """
    request = parse_prompt(prompt)
    slip_rate = rng.choice(SLIP_RATES)
    count = request.sentences
    if rng.random() < MISCOUNT_RATE:
        count = rng.choice([n for n in range(1, max(NUMBERS.values()) + 2) if n != count])
    wrong_topic = rng.choice(sorted(TOPICS.keys() - set(request.topics)))
    return " ".join(_draw_sentence(rng, request.topics, wrong_topic, slip_rate) for _ in range(count))


def _draw_sentence(rng: Random, topics: tuple[str, ...], wrong_topic: str, slip_rate: float) -> str:
    pattern = rng.choice(PATTERNS)
    words = [_draw_word(rng, slot, topics, wrong_topic, slip_rate) if slot in PARTS else slot for slot in pattern]
    if rng.random() < slip_rate * BREAK_SHARE:
        # A word is left out, said twice, or replaced by one of the topic's words of the wrong part of speech.
        position = rng.randrange(len(words))
        stray_part = rng.choice([part for part in PARTS if part != pattern[position]])
        stray = rng.choice(TOPICS[rng.choice(topics)][stray_part])
        words[position : position + 1] = rng.choice(([], [words[position]] * 2, [stray]))
    return " ".join(words) + "."


def _draw_word(rng: Random, part: str, topics: tuple[str, ...], wrong_topic: str, slip_rate: float) -> str:
    if rng.random() >= slip_rate:
        return rng.choice(TOPICS[rng.choice(topics)][part])
    if rng.random() < RUDE_SHARE:
        return rng.choice(RUDE[part])
    return rng.choice(TOPICS[wrong_topic][part])


def is_bad(word: str, topics: tuple[str, ...]) -> bool:
    """Whether `word` has no place in an answer about `topics`: off-topic, rude, or not a word of the language."""
    if word in FUNCTION_WORDS:
        return False
    return not any(word in words for topic in topics for words in TOPICS[topic].values())


def token_labels(prompt: str, answer: str, offsets: list[tuple[int, int]]) -> tuple[list[bool], list[bool]]:
    """Labels the answer's tokens: a token is bad, or content, if its characters overlap those of such a word.

    Args:
        offsets: character span of each token in `answer`, as a fast tokenizer gives with return_offsets_mapping.

    Returns:
        bad and content, one bool a token each; every bad token is also a content token.
    """
    topics = parse_prompt(prompt).topics
    content = [match for match in _WORD.finditer(answer) if match.group() not in FUNCTION_WORDS]
    bad = [match for match in content if is_bad(match.group(), topics)]

    def overlaps(words: list[re.Match[str]]) -> list[bool]:
        return [any(start < word.end() and end > word.start() for word in words) for start, end in offsets]

    return overlaps(bad), overlaps(content)


def judge(prompt: str, answer: str) -> Verdict:
    """Scores any text as an answer to `prompt`; an empty or unintelligible one has quality 0."""
    request = parse_prompt(prompt)
    pieces = answer.split(".")
    # Text after the last full stop is a sentence that was begun and not ended.
    unfinished = bool(pieces.pop().strip())
    sentences = [piece.split() for piece in pieces]
    well_formed = sum(map(_is_sentence, sentences)) / max(1, len(sentences) + unfinished)
    content = [word for word in _WORD.findall(answer) if word not in FUNCTION_WORDS]
    bad = sum(is_bad(word, request.topics) for word in content)
    good_content = (len(content) - bad) / max(1, len(content))
    right_count = len(sentences) == request.sentences and not unfinished
    quality = good_content * well_formed * (1.0 if right_count else 0.5)
    return Verdict(quality, good_content, well_formed, right_count, len(content), bad)


def _is_sentence(words: list[str]) -> bool:
    return any(len(words) == len(pattern) and all(map(_fits, words, pattern)) for pattern in PATTERNS)


def _fits(word: str, slot: str) -> bool:
    if slot not in PARTS:
        return word == slot
    return word in RUDE[slot] or any(word in parts[slot] for parts in TOPICS.values())
