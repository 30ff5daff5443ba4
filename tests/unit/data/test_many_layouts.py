"""Layouts that people have: mixed in a file, mapped, scored row by row, and refused where a response would be lost."""

import json
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from megatron_tgdpo.data.dataset import PreferenceDataset, open_or_preprocess
from megatron_tgdpo.data.fields import Message
from megatron_tgdpo.data.layouts import detect_layout, parse_prompt, parse_record, rename
from megatron_tgdpo.data.options import PreprocessOptions
from megatron_tgdpo.data.preprocess import preprocess
from megatron_tgdpo.data.tokenizers import load_tokenizer
from megatron_tgdpo.errors import UserError
from tests.unit.data.test_chat import CHATML
from tests.unit.data.test_layout_table import ROWS

ASKED = {"role": "user", "content": "Q"}
GOOD, BAD = {"role": "assistant", "content": "A"}, {"role": "assistant", "content": "B"}


def parsed(record: dict[str, Any]) -> tuple[Any, ...]:
    example = parse_record(record, detect_layout(record, "f:1"), "f:1")
    return example.prompt, example.chosen, example.rejected


@pytest.mark.parametrize(
    "record",
    [
        {"prompt": [ASKED], "chosen": [ASKED, GOOD], "rejected": [ASKED, BAD]},
        {"prompt": [ASKED], "chosen": "A", "rejected": "B"},
        {"messages": [ASKED], "chosen": [GOOD], "rejected": [BAD]},
        {"instruction": "Q", "chosen": GOOD, "rejected": BAD},
        {"prompt": [{"role": "user", "content": [{"type": "text", "text": "Q"}]}], "chosen": [GOOD], "rejected": [BAD]},
        {"messages": [ASKED, GOOD], "rejected_messages": [ASKED, BAD]},
        {"messages": [ASKED, GOOD], "rejected_response": "B", "rejected_score": 1, "rejected_model": "m"},
        {"prompt": "Q", "chosen": [ASKED, GOOD], "rejected": [ASKED, BAD], "messages": [ASKED, GOOD]},
        {
            "instruction": "Q",
            "completions": [{"response": "B", "overall_score": 1}, {"response": "A", "overall_score": 9}],
        },
        {"context": [ASKED], "response1": "A", "response2": "B", "overall_preference": -1},
    ],
)
def test_one_pair_in_many_shapes(record: dict[str, Any]) -> None:
    assert parsed(record) == ((Message("user", "Q"),), "A", "B")
    assert parse_prompt(record, "f:1") == (Message("user", "Q"),)


def test_dialogues_that_part_early_keep_all_their_turns() -> None:
    chosen, rejected = ([ASKED, turn, ASKED, last] for turn, last in ((GOOD, GOOD), (BAD, BAD)))
    prompt, ours, theirs = parsed({"chosen": chosen, "rejected": rejected})
    assert parse_prompt({"messages": chosen, "rejected_messages": rejected}, "f:1") == prompt
    assert prompt == (Message("user", "Q"),)
    assert [[turn.content for turn in side] for side in (ours, theirs)] == [["A", "Q", "A"], ["B", "Q", "B"]]
    # At a user's turn: the answer before it is in both responses.
    other = {"role": "user", "content": "R"}
    prompt, ours, theirs = parsed({"chosen": [ASKED, GOOD, ASKED, GOOD], "rejected": [ASKED, GOOD, other, BAD]})
    assert [[turn.content for turn in side] for side in (prompt, ours, theirs)] == [
        ["Q"],
        ["A", "Q", "A"],
        ["A", "R", "B"],
    ]


@pytest.mark.parametrize(
    "key",
    ["rejected_answer", "rejected_response_1", "rejected_responses", "rejected_conversation", "Rejected", "rejected2"],
)
@pytest.mark.parametrize("rest", [{"messages": [ASKED, GOOD]}, {"prompt": "Q", "chosen": "A", "rejected": "B"}])
def test_rejected_responses_of_no_layout_are_refused(key: str, rest: dict[str, Any]) -> None:
    for chosen_only in (False, True):
        with pytest.raises(UserError, match=f"^f:7: key '{key}' is none of a known layout: .*rejected: {key}"):
            detect_layout({**rest, key: "B"}, "f:7", chosen_only=chosen_only)
    assert detect_layout({**rest, key: None}, "f:7")


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"messages": [GOOD], "rejected_response": "B", "rejected_messages": [BAD]}, "both 'rejected_response' and"),
        ({"messages": [ASKED, GOOD], "rejected_response": ["B"]}, "'rejected_response' must be a string, found a list"),
        ({"prompt": "Q", "responses": ["A", "B"], "scores": [1]}, "'scores' must be a list with a number for each"),
        ({"prompt": "Q", "responses": ["A", "B"], "scores": [1, None]}, "is no number"),
        ({"prompt": "Q", "answers": [{"answer": "A", "rank": "first"}]}, "is no number"),
        ({"responses": ["A", "B"], "scores": [1, 2]}, r"no prompt \(keys: responses, scores\)"),
        ({"prompt": "Q", "tools": [{"name": "f"}], "chosen": "A", "rejected": "B"}, "'tools' is for a chat template"),
        ({"prompt": [ASKED], "tools": "[", "chosen": "A", "rejected": "B"}, "'tools' is not the JSON that it must be"),
        (
            {"prompt": [{"role": "user", "content": [{"type": "image"}]}], "chosen": "A", "rejected": "B"},
            "has a part that is no text",
        ),
    ],
)  # fmt: skip
def test_malformed_records_are_named(record: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=f"^f:1: .*{message}") as error:
        parsed(record)
    assert "\n" not in str(error.value)


def test_columns_map_keys(tmp_path: Path, hf_directory: str, write_jsonl: Any) -> None:
    columns = {"prompt": "query", "chosen": "good", "rejected": "rejected_text"}
    record = {"query": "The sky is", "good": " blue", "rejected_text": " green", "prompt": "not this"}
    assert rename(record, columns, "f:1") == {"prompt": "The sky is", "chosen": " blue", "rejected": " green"}
    with pytest.raises(UserError, match=r"^f:1: no key 'good', which data\.columns names"):
        rename({"query": "Q"}, columns, "f:1")
    table = tmp_path / "pairs.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([record]), table)
    options = PreprocessOptions(hf_directory, columns=columns)
    for source in (write_jsonl([record]), str(table)):
        dataset = open_or_preprocess(source, options, str(tmp_path / "cache"), progress=False)
        assert load_tokenizer(hf_directory).decode(dataset[0].prompt.tolist()) == "The sky is"
    # Other columns make another dataset of the same file.
    other = PreprocessOptions(hf_directory, columns={**columns, "prompt": "good"})
    again = open_or_preprocess(source, other, str(tmp_path / "cache"), progress=False)
    assert again.prefix != dataset.prefix


@pytest.fixture
def chatml(tmp_path: Path) -> str:
    path = tmp_path / "chatml.jinja"
    path.write_text(CHATML)
    return str(path)


def test_a_file_mixes_layouts(tmp_path: Path, hf_directory: str, chatml: str, write_jsonl: Any) -> None:
    records = [json.loads(text) for name, text in ROWS if not name.startswith("single")]
    source = write_jsonl(records)
    preprocess([source], str(tmp_path / "mixed"), PreprocessOptions(hf_directory, chatml), progress=False)
    assert len(PreferenceDataset(str(tmp_path / "mixed"))) == len(records)
    single = write_jsonl([*records[:2], {"messages": [ASKED, GOOD]}], "single.jsonl")
    with pytest.raises(UserError, match=r"single\.jsonl:3: a single answer in a file that begins with a pair"):
        preprocess([single], str(tmp_path / "s"), PreprocessOptions(hf_directory, chatml), progress=False)


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_scored_rows_of_a_prompt_are_joined(
    tmp_path: Path, hf_directory: str, chatml: str, write_jsonl: Any, kind: str
) -> None:
    scored = {
        "Q1": {"bad": 0, "good": 4},
        "Q2": {"only": 3},
        "Q3": {"fine": 2, "same": 2},
        "Q4": {"x": 1, "y": 3, "z": 0},
    }
    rows = [(prompt, text, score) for prompt, answers in scored.items() for text, score in answers.items()]
    records = [{"prompt": p, "response": r, "helpfulness": h, "verbosity": 1} for p, r, h in rows]
    source = write_jsonl(records) if kind == "jsonl" else str(tmp_path / "rows.parquet")
    if kind == "parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(records), source)
    options = PreprocessOptions(hf_directory, chatml)
    manifest = preprocess([source], str(tmp_path / "d"), options, progress=False)
    assert (manifest["pairs"], manifest["dropped"]) == (2, {"tie": 2})
    dataset, tokenizer = PreferenceDataset(str(tmp_path / "d")), load_tokenizer(hf_directory)
    sides = [
        [tokenizer.decode(ids.tolist()) for ids in (pair.chosen, pair.rejected)] for pair in (dataset[0], dataset[1])
    ]
    assert sides == [["good", "bad"], ["y", "z"]]
    assert [dataset.origin[index, 1] for index in range(2)] == [1, 6]
    assert dataset.source(1).endswith((":6", "record 6"))


def test_nulls_of_parquet_are_no_keys(tmp_path: Path, hf_directory: str) -> None:
    """Parquet gives each object the keys of all: arguments that a call has not are not written as null."""
    template = tmp_path / "t.jinja"
    calls = [
        {"type": "function", "function": {"name": "f", "arguments": arguments}} for arguments in ({"a": 1}, {"b": 2})
    ]
    records = [
        {"prompt": [ASKED], "chosen": [{**GOOD, "tool_calls": [call]}], "rejected": [{**BAD, "tool_calls": None}]}
        for call in calls
    ]
    path = str(tmp_path / "p.parquet")
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(records), path)
    template.write_text(
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}{{ m.tool_calls | tojson if m.tool_calls }}"
        "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    preprocess([path], str(tmp_path / "d"), PreprocessOptions(hf_directory, str(template)), progress=False)
    chosen = load_tokenizer(hf_directory).decode(PreferenceDataset(str(tmp_path / "d"))[0].chosen.tolist())
    assert chosen == 'A[{"type": "function", "function": {"name": "f", "arguments": {"a": 1}}}]'
