"""The miniature's language: credits computed by hand, and what its speakers may say."""

from random import Random

import pytest

from tools.reproduction.language import (
    LENGTHS,
    MAX_WORDS,
    draw_answer,
    draw_request,
    parse_prompt,
    score,
    score_answers,
    token_credits,
    words,
)

SHORT = "begin c step 2 length short"


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        # c, e, a, c, e: two classes on each time, round the end of the six; four words are short enough.
        ("c1 e2 a3 c4 e5", [1, 1, 1, 1, 1, 1]),
        # Each word is compared with the word before it, so one wrong class makes one bad word.
        ("c1 d2 f3 b4", [1, -1, 1, 1, 1]),
        # c1 comes again three words later; e2 after it is right, and four words are between c1 and its third time.
        ("c1 e2 a3 c1 e1 a1 c2", [1, 1, 1, 0, 1, 1, 1, 1]),
        ("b1 d1 f1 b2", [-1, 1, 1, 1, 1]),
        ("c1 e1 a1", [1, 1, 1, -1]),
        ("c1 e1 a1 c2 e2 a2 c3 e3", [1] * 8 + [-1]),
        # What is no word of the language is bad, and the class starts over behind it.
        ("c1 step c2 e1", [1, -1, 1, 1, 1]),
        ("c9 e1 a1 c1", [-1, 1, 1, 1, 1]),
        ("", [-1]),
    ],
)
def test_credits(answer: str, expected: list[int]) -> None:
    assert token_credits(SHORT, answer) == expected
    assert score(SHORT, answer) == pytest.approx(sum(expected) / len(expected))


def test_repetition_is_forgotten_after_four_words() -> None:
    prompt = "begin a step 1 length short"
    assert token_credits(prompt, "a1 b1 c1 d1 e1 f1 a1")[6] == 1  # six words on
    prompt = "begin a step 3 length short"
    assert token_credits(prompt, "a1 d1 a2 d2 a1 d1 a2") == [1, 1, 1, 1, 0, 0, 0, 1]


def test_an_answer_without_an_end() -> None:
    assert token_credits(SHORT, "c1 e2 a3 c4", finished=False) == [1, 1, 1, -1]
    whole = " ".join(["c1"] * MAX_WORDS)
    assert score_answers([{"role": "user", "content": SHORT}], [whole, "c1 e2 a3 c4"]) == [
        score(SHORT, whole, finished=False),
        1.0,
    ]


@pytest.mark.parametrize("prompt", ["begin g step 2 length short", "begin c step 0 length short", "write a poem"])
def test_no_prompt(prompt: str) -> None:
    with pytest.raises(ValueError, match="not a prompt of this language"):
        parse_prompt(prompt)


def test_speakers() -> None:
    rng, known = Random(0), set(words())
    credits_ = []
    for _ in range(500):
        request = draw_request(rng)
        assert parse_prompt(request.prompt) == request
        answer = draw_answer(rng, request)
        assert set(answer.split()) <= known
        assert LENGTHS["short"][0] <= len(answer.split()) <= LENGTHS["long"][1] < MAX_WORDS
        credits_ += token_credits(request.prompt, answer)
    # Skills of 0.4, 0.6 and 0.8 draw good words; the rest is neutral where something can be repeated, else bad.
    assert credits_.count(1) / len(credits_) == pytest.approx(0.6, abs=0.03)
    assert 0.02 < credits_.count(0) / len(credits_) < 0.2
