"""Prompts with a single answer: their layouts, their tokens beside those of pairs, and who refuses them."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megatron_tgdpo.batch import collate
from megatron_tgdpo.data.dataset import PreferenceDataset, open_or_preprocess
from megatron_tgdpo.data.fields import Message
from megatron_tgdpo.data.layouts import Example, detect_layout, parse_record
from megatron_tgdpo.data.options import PreprocessOptions
from megatron_tgdpo.data.preprocess import preprocess
from megatron_tgdpo.errors import UserError
from megatron_tgdpo.packing import RowFormat

USER, ANSWER = {"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}
ASKED = (Message("user", "Q"),)


@pytest.mark.parametrize(
    ("layout", "record", "prompt"),
    [
        ("single_messages", {"messages": [USER, ANSWER]}, ASKED),
        (
            "single_messages",
            {"messages": [USER, {"role": "assistant", "content": "a"}, USER, ANSWER], "chosen": None},
            (*ASKED, Message("assistant", "a"), *ASKED),
        ),
        (
            "single_sharegpt",
            {"system": "S", "conversations": [{"from": "human", "value": "Q"}, {"from": "gpt", "value": "A"}]},
            (Message("system", "S"), *ASKED),
        ),
        ("single_instruction", {"instruction": "Q", "input": "", "output": "A"}, ASKED),
        ("single_completion", {"prompt": "Q", "completion": "A"}, "Q"),
        ("single_completion", {"prompt": [USER], "completion": [ANSWER]}, ASKED),
    ],
)
def test_layouts(layout: str, record: dict[str, Any], prompt: Any) -> None:
    assert detect_layout(record, "f:1") == layout
    assert parse_record(record, layout, "f:1") == Example(prompt, "A", None)


def test_pairs_come_first() -> None:
    record = {"prompt": "Q", "completion": "C", "messages": [USER, ANSWER], "chosen": "A", "rejected": "B"}
    assert detect_layout(record, "f:1") == "trl_plain"
    # A pair of which one side is missing is a broken pair.
    with pytest.raises(UserError, match="f:1: key 'rejected' is missing"):
        detect_layout({"prompt": "Q", "completion": "C", "chosen": "A"}, "f:1")


@pytest.mark.parametrize(
    ("layout", "record", "message"),
    [
        ("single_messages", {"messages": [USER]}, "after the prompt 'messages' must be one assistant message"),
        ("single_messages", {"messages": []}, "must be one assistant message, found: nothing"),
        ("single_messages", {"messages": [ANSWER, ANSWER]}, "the prompt must end with a user message"),
        ("single_messages", "text", "a record must be a JSON object, found a string"),
        ("single_instruction", {"instruction": "Q", "output": ["A", "B"]}, "'output' must be a string, found a list"),
        ("single_completion", {"prompt": "Q"}, "key 'completion' is missing"),
        ("single_completion", {"prompt": "Q", "completion": [ANSWER]}, "'completion' must be a string, found a list"),
    ],
)
def test_bad_records(layout: str, record: Any, message: str) -> None:
    with pytest.raises(UserError, match=f"^f:3: .*{message}"):
        parse_record(record, layout, "f:3")


@pytest.fixture
def files(tmp_path: Path) -> dict[str, str]:
    """The same prompts and answers, with and without rejected responses."""
    sides = {"pairs": [], "single": []}  # type: ignore[var-annotated]
    for number in range(7):
        prompt, answer = f"Name a colour {number}.", " blue" * (1 + number % 3)
        sides["pairs"].append({"prompt": prompt, "chosen": answer, "rejected": " green"})
        sides["single"].append({"prompt": prompt, "completion": answer})
    sides["single"].append({"prompt": "Why?", "completion": "  "})
    paths = {name: tmp_path / f"{name}.jsonl" for name in sides}
    for name, path in paths.items():
        path.write_text("".join(json.dumps(record) + "\n" for record in sides[name]), encoding="utf-8")
    return {name: str(path) for name, path in paths.items()}


def test_rows_are_those_of_the_chosen_responses(files: dict[str, str], tmp_path: Path, hf_directory: str) -> None:
    datasets = {}
    for name, path in files.items():
        manifest = preprocess([path], str(tmp_path / name), PreprocessOptions(hf_directory), progress=False)
        datasets[name] = PreferenceDataset(str(tmp_path / name))
    assert manifest["dropped"] == {"empty_response": 1}
    assert manifest["lengths"]["rejected"]["max"] == 0
    assert manifest["lengths"]["pair"]["total"] == int(datasets["pairs"].lengths[:, :2].sum())
    datasets["single"].verify()
    row = RowFormat(512, shared_prompts=True, chosen_only=True)
    packs = [collate([data[index] for index in range(7)], row) for data in (datasets["pairs"], datasets["single"])]
    for name in ("tokens", "position_ids", "logit_positions", "targets", "response_lengths"):
        ours, theirs = (getattr(pack, name) for pack in packs)
        assert torch.equal(ours, theirs), name
    lengths = [row.pair_tokens(data.lengths) for data in (datasets["pairs"], datasets["single"])]
    np.testing.assert_array_equal(*lengths)


def test_methods_of_pairs_refuse_them(files: dict[str, str], tmp_path: Path, hf_directory: str) -> None:
    options = PreprocessOptions(hf_directory)
    with pytest.raises(
        UserError, match=r"single\.jsonl:1: a prompt with a single answer, and a pair is needed \(7 of 7"
    ):
        open_or_preprocess(files["single"], options, str(tmp_path / "cache"), progress=False)
    opened = open_or_preprocess(files["single"], options, str(tmp_path / "cache"), progress=False, single_answers=True)
    assert len(opened) == 7
    assert opened[6].rejected.size == 0
    assert len(open_or_preprocess(files["pairs"], options, str(tmp_path / "cache"), progress=False)) == 7
