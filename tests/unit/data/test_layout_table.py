"""The table of layouts in docs/data.md: each example is read as the page says."""

import json
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from megatron_tgdpo.data import layouts
from megatron_tgdpo.data.encode import RecordBatch, encode_batch
from megatron_tgdpo.data.example import Example
from megatron_tgdpo.data.fields import Message
from megatron_tgdpo.data.layouts import (
    KEYS,
    LAYOUTS,
    Layout,
    detect_layout,
    is_known_key,
    is_single,
    parse_prompt,
    parse_record,
)
from megatron_tgdpo.data.options import PreprocessOptions
from megatron_tgdpo.data.tokenizers import load_tokenizer
from megatron_tgdpo.errors import UserError

PAGE = Path(__file__).parents[3] / "docs" / "data.md"
ROWS = re.findall(r"^\| `(\w+)` \| .* \| `({.*})` \|$", PAGE.read_text(encoding="utf-8"), flags=re.MULTILINE)


def test_the_table_has_every_layout_once() -> None:
    assert sorted(name for name, _ in ROWS) == sorted(LAYOUTS)


@pytest.mark.parametrize(("layout", "text"), ROWS)
def test_each_example(layout: str, text: str) -> None:
    record: dict[str, Any] = json.loads(text)
    assert detect_layout(record, "f:1") == layout
    example = parse_record(record, layout, "f:1")
    if "plain" in layout:
        assert (example.prompt, example.chosen, example.rejected) == ("The sky is", " blue.", " green.")
    else:
        assert isinstance(example.prompt, tuple)
        assert example.prompt[-1] == Message("user", "Name a colour.")
        before = [message.content for message in example.prompt[:-1]]
        assert before == (["Be brief."] if "system" in record else []) + (
            ["Hi", "Hello!"] if "history" in record else []
        )
        assert (example.chosen, example.rejected) == ("Blue.", None if is_single(layout) else "No.")
    assert parse_prompt(record, "f:1") == example.prompt
    chosen_only = parse_record(record, detect_layout(record, "f:1", chosen_only=True), "f:1", chosen_only=True)
    if layout != "plain_implicit":
        assert (chosen_only.prompt, chosen_only.chosen, chosen_only.rejected) == (example.prompt, example.chosen, None)


@pytest.mark.parametrize(("layout", "text"), ROWS)
def test_each_row_says_what_it_matches_and_reads(layout: str, text: str) -> None:
    """No layout has a path of its own: the row alone finds its record, and names what it reads."""
    record: dict[str, Any] = json.loads(text)
    row = LAYOUTS[layout]
    assert row.matches(record)
    assert row.single == layout.startswith("single")
    above = list(LAYOUTS)[: list(LAYOUTS).index(layout)]
    assert not [name for name in above if LAYOUTS[name].matches(record)]
    ignored = {"prompt", "score_chosen", "score_rejected"} if layout == "trl_implicit" else {"prompt"} - set(row.keys)
    assert set(record) - ignored <= {*KEYS, *row.keys}
    if row.prompt is not None:
        assert row.prompt(record, "f:1") == row.parse(record, "f:1").prompt


def test_a_single_answer_in_a_row_of_its_own(monkeypatch: pytest.MonkeyPatch, hf_directory: str) -> None:
    """It needs no rejected response, and may not lie in a file of pairs."""
    row = Layout(
        lambda record, place: Example(record["asked"], record["said"], None),
        lambda record: "said" in record,
        ("asked", "said"),
        single=True,
    )
    monkeypatch.setattr(layouts, "LAYOUTS", {"own": row, **LAYOUTS})
    record = {"asked": "The sky is", "said": " blue."}
    batch = RecordBatch("f.json", "json", "own", (1,), (record,))
    options = PreprocessOptions(hf_directory)
    tokenizer = load_tokenizer(hf_directory)
    assert encode_batch(batch, tokenizer, options).lengths[:, 2].tolist() == [0]
    with pytest.raises(UserError, match=r"f\.json record 1: a single answer in a file that begins with a pair"):
        encode_batch(replace(batch, layout="trl_plain"), tokenizer, options)


def test_a_row_before_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is asked first, by its own keys, and does not hide a rejected response that it does not read."""

    def parse(record: Mapping[str, Any], place: str) -> Example:
        return Example(record["prompt"], record["won"], record["rejected_text"])

    keys = ("won", "rejected_text")
    row = Layout(parse, lambda record: all(key in record for key in keys), keys)
    record = {"prompt": "The sky is", "won": " blue.", "rejected_text": " green.", "completion": "?"}
    assert not is_known_key("won")
    with pytest.raises(UserError, match="'rejected_text' is none of a known layout"):
        detect_layout(record, "f:1")
    monkeypatch.setattr(layouts, "LAYOUTS", {"won": row, **LAYOUTS})
    assert is_known_key("won")
    assert detect_layout(record, "f:1") == "won"
    assert parse_record(record, "won", "f:1") == Example("The sky is", " blue.", " green.")
    assert parse_prompt(record, "f:1") == "The sky is"
    with pytest.raises(UserError, match="'rejected_answer' is none of a known layout"):
        detect_layout({**record, "rejected_answer": " red."}, "f:1")
    # A record of another layout is still that.
    assert detect_layout({"prompt": "The sky is", "completion": " blue."}, "f:1") == "single_completion"
