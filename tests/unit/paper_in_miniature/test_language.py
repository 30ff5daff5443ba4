"""The miniature's language: credits computed by hand, and what its speakers may say."""

from random import Random

import pytest

from tools.examples.paper_in_miniature.language import (
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

SHORT = "begin c step 2 length short numbers low"


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        # c, e, a, c, e: two classes on each time, round the end of the six; five words are short enough.
        ("c1 e2 a3 c2 e3", [1, 1, 1, 1, 1, 1]),
        # 4 and 5 are not low: of the right class, so neutral.
        ("c1 e4 a3 c5 e3", [1, 0, 1, 0, 1, 1]),
        # Each word is compared with the word before it, so one wrong class makes one bad word.
        ("c1 d2 f3 b1", [1, -1, 1, 1, 1]),
        # c1 comes again three words later; e2, seven words after its first time, may.
        ("c1 e2 a3 c1 e1 a1 c2 e2", [1, 1, 1, 0, 1, 1, 1, 1, -1]),
        ("b1 d1 f1 b2", [-1, 1, 1, 1, 1]),
        ("c1 e1 a1", [1, 1, 1, -1]),
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
    prompt = "begin a step 3 length short numbers low"
    assert token_credits(prompt, "a1 d1 a2 d2 a1 d1 a2") == [1, 1, 1, 1, 0, 0, 0, 1]
    assert token_credits(prompt, "a1 d1 a2 d2 a3 d3 a1") == [1, 1, 1, 1, 1, 1, 1, 1]


def test_an_answer_without_an_end() -> None:
    assert token_credits(SHORT, "c1 e2 a3 c2", finished=False) == [1, 1, 1, -1]
    whole = " ".join(["c1"] * MAX_WORDS)
    assert score_answers([{"role": "user", "content": SHORT}], [whole, "c1 e2 a3 c2"]) == [
        score(SHORT, whole, finished=False),
        1.0,
    ]


@pytest.mark.parametrize("kind", ["low", "high", "odd", "even"])
def test_kinds(kind: str) -> None:
    allowed = {"low": (1, 2, 3), "high": (4, 5, 6), "odd": (1, 3, 5), "even": (2, 4, 6)}[kind]
    for number in range(1, 7):
        assert token_credits(f"begin f step 1 length long numbers {kind}", f"f{number}")[0] == (number in allowed)


@pytest.mark.parametrize(
    "prompt",
    [
        "begin g step 2 length short numbers low",
        "begin c step 0 length short numbers low",
        "begin c step 1 length short numbers 1",
        "begin c step 1 length short",
        "write a poem",
    ],
)
def test_no_prompt(prompt: str) -> None:
    with pytest.raises(ValueError, match="not a prompt of this language"):
        parse_prompt(prompt)


def test_speakers() -> None:
    rng, known = Random(0), set(words())
    found = []
    for _ in range(500):
        request = draw_request(rng, held_out=False)
        assert parse_prompt(request.prompt) == request
        answer = draw_answer(rng, request)
        assert set(answer.split()) <= known
        assert LENGTHS["short"][0] <= len(answer.split()) <= LENGTHS["long"][1] < MAX_WORDS
        found += token_credits(request.prompt, answer)[:-1]
    # Skills of 0.4, 0.6 and 0.8 take good words; half of the others are neutral and half bad.
    shares = [found.count(credit) / len(found) for credit in (1, 0, -1)]
    assert shares == pytest.approx([0.6, 0.2, 0.2], abs=0.03)


def test_held_out_prompts_are_others() -> None:
    sides = [{draw_request(Random(seed), held_out=side) for seed in range(3000)} for side in (False, True)]
    assert not sides[0] & sides[1]
    assert len(sides[1]) / (len(sides[0]) + len(sides[1])) == pytest.approx(0.2, abs=0.05)
