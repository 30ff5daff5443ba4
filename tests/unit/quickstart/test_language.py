"""The demonstration language: its oracle on answers judged by hand, its labels, and that a seed fixes everything."""

import json
from random import Random

import pytest

from tools.examples.quickstart import make_data
from tools.examples.quickstart.language import (
    Request,
    draw_answer,
    draw_prompt,
    is_bad,
    judge,
    parse_prompt,
    token_labels,
)
from tools.examples.quickstart.lexicon import FUNCTION_WORDS, PARTS, RUDE, TOPICS

HARBOR_TWO = "write two sentences about the harbor"
GOOD = "the salty sailor rows the boat. every diver moors the tidal net."


def test_words_have_one_topic_and_part() -> None:
    words = [word for topic in TOPICS.values() for part in PARTS for word in topic[part]]
    words += [word for part in PARTS for word in RUDE[part]]
    assert len(words) == len(set(words))
    assert not FUNCTION_WORDS & set(words)
    assert all(topic in parts["OBJECT"] for topic, parts in TOPICS.items())


def test_prompts_are_read_back() -> None:
    assert parse_prompt(HARBOR_TWO) == Request(("harbor",), 2)
    assert parse_prompt("tell me about the farm and the castle using four sentences") == Request(("farm", "castle"), 4)
    rng = Random(1)
    for _ in range(200):
        request = parse_prompt(draw_prompt(rng))
        assert request.sentences in (2, 3, 4)
        assert len(request.topics) in (1, 2)
    with pytest.raises(ValueError, match="not a prompt"):
        parse_prompt("write two sentences about the moon")


def test_a_word_is_bad_by_topic() -> None:
    assert not is_bad("sailor", ("harbor",))
    assert is_bad("sailor", ("kitchen",))
    assert not is_bad("sailor", ("kitchen", "harbor"))
    assert is_bad("stupid", ("harbor",))
    assert is_bad("sailr", ("harbor",))
    assert not is_bad("today", ("harbor",))


@pytest.mark.parametrize(
    ("answer", "quality", "good_content", "well_formed", "right_count"),
    [
        (GOOD, 1.0, 1.0, 1.0, True),
        # 2 of the 8 content words bad (rude, off-topic), grammar intact.
        ("the lousy sailor rows the bread. every diver moors the tidal net.", 0.75, 0.75, 1.0, True),
        # One sentence of two is no sentence; its words are still good ones.
        ("sailor sailor rows boat. every diver moors the tidal net.", 0.5, 1.0, 0.5, True),
        # One sentence where two were asked.
        ("the salty sailor rows the boat.", 0.5, 1.0, 1.0, False),
        # Two whole sentences and a third that does not end.
        (GOOD + " the salty", 1 / 3, 1.0, 2 / 3, False),
        # A missing last full stop is an unfinished sentence.
        (GOOD[:-1], 0.25, 1.0, 0.5, False),
        ("", 0.0, 0.0, 0.0, False),
        ("gibberish", 0.0, 0.0, 0.0, False),
    ],
)
def test_oracle(answer: str, quality: float, good_content: float, well_formed: float, right_count: bool) -> None:
    verdict = judge(HARBOR_TWO, answer)
    assert verdict.quality == pytest.approx(quality)
    assert verdict.good_content == pytest.approx(good_content)
    assert verdict.well_formed == pytest.approx(well_formed)
    assert verdict.right_count is right_count


def test_token_labels_follow_words() -> None:
    answer = "the lousy sailor rows the bread."
    spans = [(0, 3), (3, 7), (7, 9), (9, 16), (16, 21), (21, 25), (25, 31), (31, 32)]
    assert [answer[a:b] for a, b in spans] == ["the", " lou", "sy", " sailor", " rows", " the", " bread", "."]
    bad, content = token_labels(HARBOR_TWO, answer, spans)
    assert bad == [False, True, True, False, False, False, True, False]
    assert content == [False, True, True, True, True, False, True, False]


def test_slips_make_the_bad_words() -> None:
    rng = Random(2)
    verdicts = [judge(prompt, draw_answer(rng, prompt)) for prompt in (draw_prompt(rng) for _ in range(2000))]
    share = sum(v.bad_words for v in verdicts) / sum(v.content_words for v in verdicts)
    assert share == pytest.approx((0.1 + 0.4 + 0.6) / 3, abs=0.01)
    broken = sum(1 - v.well_formed for v in verdicts) / len(verdicts)
    assert broken == pytest.approx(0.6 * (0.1 + 0.4 + 0.6) / 3, abs=0.01)
    assert sum(not v.right_count for v in verdicts) / len(verdicts) == pytest.approx(0.15, abs=0.025)


def test_pairs_are_ranked_and_mixed() -> None:
    rng = Random(3)
    pairs = [make_data.draw_pair(rng) for _ in range(300)]
    chosen = [judge(prompt, answer) for prompt, answer, _ in pairs]
    rejected = [judge(prompt, answer) for prompt, _, answer in pairs]
    assert all(c.quality - r.quality >= make_data.MIN_QUALITY_GAP for c, r in zip(chosen, rejected, strict=True))
    # Neither side is pure: credit has to be given token by token.
    assert sum(v.bad_words for v in chosen) > 100
    assert sum(v.content_words - v.bad_words for v in rejected) > sum(v.bad_words for v in rejected)


def test_a_seed_fixes_the_files(tmp_path) -> None:
    def write(name: str, *options: str) -> dict[str, bytes]:
        sizes = ["--pretrain", "20", "--validation", "3", "--heldout", "4"]
        make_data.main(["--out", str(tmp_path / name), *sizes, *options])
        return {path.name: path.read_bytes() for path in (tmp_path / name).iterdir()}

    first, again = write("first", "--train", "5"), write("again", "--train", "5")
    assert sorted(first) == ["heldout.jsonl", "pretrain.jsonl", "train.jsonl", "validation.jsonl"]
    assert first == again
    longer, other = write("longer", "--train", "6"), write("other", "--train", "5", "--seed", "1")
    assert longer["train.jsonl"].startswith(first["train.jsonl"])
    assert {name: text for name, text in longer.items() if name != "train.jsonl"} == {
        name: text for name, text in first.items() if name != "train.jsonl"
    }
    assert all(first[name] != other[name] for name in first)
    pair = json.loads(first["train.jsonl"].splitlines()[0])
    assert [pair[key][0]["role"] for key in ("prompt", "chosen", "rejected")] == ["user", "assistant", "assistant"]
