"""Prompts with a single answer: their layouts, their tokens beside those of pairs, and who refuses them."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megatron_tgdpo.batching.collate import collate
from megatron_tgdpo.batching.packed_sequence import PackFormat
from megatron_tgdpo.data.dataset import PreferenceDataset, open_or_preprocess
from megatron_tgdpo.data.encode import encode_responses
from megatron_tgdpo.data.fields import Message
from megatron_tgdpo.data.layouts import Example, detect_layout, parse_record
from megatron_tgdpo.data.options import PreprocessOptions
from megatron_tgdpo.data.preprocess import preprocess
from megatron_tgdpo.data.tokenizers import load_tokenizer
from megatron_tgdpo.errors import UserError

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
        (
            "single_messages",
            {"messages": [USER]},
            "after the prompt 'messages' must go from an assistant message to one, found: user",
        ),
        ("single_messages", {"messages": []}, "must go from an assistant message to one, found: nothing"),
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
    row = PackFormat(512, shared_prompts=True, chosen_only=True)
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
    chosen_only = PreprocessOptions(hf_directory, chosen_only=True)
    opened = open_or_preprocess(files["single"], chosen_only, str(tmp_path / "cache"), progress=False)
    assert len(opened) == 7
    assert opened[6].rejected.size == 0
    assert len(open_or_preprocess(files["pairs"], options, str(tmp_path / "cache"), progress=False)) == 7


def test_rejected_responses_decide_nothing_without_pairs(tmp_path: Path, hf_directory: str) -> None:
    """Long, blank, identical, missing or malformed: chosen responses are cut and kept as if there were no other."""
    prompt, answer, long = " capital" * 60, " blue" * 10, " green" * 300
    records = [
        {"prompt": prompt, "chosen": answer, "rejected": long},
        {"prompt": prompt, "chosen": answer, "rejected": " "},
        {"prompt": prompt, "chosen": answer, "rejected": answer},
        {"prompt": prompt, "chosen": answer},
        {"prompt": prompt, "chosen": answer, "rejected": [1]},
        {"prompt": prompt, "chosen": " ", "rejected": answer},
    ]
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    tokenizer = load_tokenizer(hf_directory)
    prompt_ids, chosen_ids, _ = encode_responses(Example(prompt, answer, None), tokenizer, "f:1")
    whole = len(prompt_ids) + len(chosen_ids)
    assert len(prompt_ids) > whole / 2  # so that the long response would take its half of the limit from it
    options = PreprocessOptions(hf_directory, max_length=whole, chosen_only=True)
    dataset = open_or_preprocess(str(path), options, str(tmp_path / "cache"), progress=False)
    assert dataset.manifest["dropped"] == {"empty_response": 1}
    assert dataset.manifest["truncated"] == {}
    assert dataset.lengths.tolist() == [[len(prompt_ids), len(chosen_ids), 0]] * 5


@pytest.mark.parametrize(
    ("chosen", "rejected"),
    [
        ({"from": "gpt", "value": "A"}, None),
        ([USER, {"role": "assistant", "content": "a"}, USER, ANSWER], [{"role": "user", "content": "R"}, ANSWER]),
    ],
)
def test_every_layout_of_pairs_without_its_rejected_side(chosen: Any, rejected: Any) -> None:
    record = {"chosen": chosen, "rejected": rejected}
    if isinstance(chosen, dict):
        record["conversations"] = [{"from": "human", "value": "Q"}]
    layout = detect_layout(record, "f:1", chosen_only=True)
    example = parse_record(record, layout, "f:1", chosen_only=True)
    assert (example.prompt[-1], example.chosen, example.rejected) == (Message("user", "Q"), "A", None)
    with pytest.raises(UserError, match=r"^f:1: "):
        parse_record(record, layout, "f:1")


def test_datasets_of_pairs_serve_where_their_rejected_responses_decided_nothing(
    files: dict[str, str], tmp_path: Path, hf_directory: str
) -> None:
    options = {
        kind: PreprocessOptions(hf_directory, max_length=64, chosen_only=kind == "sft") for kind in ("dpo", "sft")
    }
    cache = str(tmp_path / "cache")
    made = {name: open_or_preprocess(files["pairs"], options[name], cache, progress=False) for name in ("dpo", "sft")}
    assert made["sft"].prefix == made["dpo"].prefix
    long = tmp_path / "long.jsonl"
    records = [{"prompt": " capital" * 40, "chosen": " blue" * 10, "rejected": " green" * 300}]
    long.write_text(Path(files["pairs"]).read_text() + "".join(json.dumps(record) for record in records))
    ours = open_or_preprocess(str(long), options["dpo"], cache, progress=False)
    theirs = open_or_preprocess(str(long), options["sft"], cache, progress=False)
    assert ours.prefix != theirs.prefix
    again = open_or_preprocess(str(long), options["sft"], cache, progress=False)
    assert again.prefix == theirs.prefix
    with pytest.raises(
        UserError, match=r"made for pairs, .* \(cut: prompt: 1, rejected: 1; dropped: nothing\): .* --chosen"
    ):
        open_or_preprocess(ours.prefix, options["sft"], cache)
    with pytest.raises(UserError, match="made without rejected responses and training asks for pairs"):
        open_or_preprocess(theirs.prefix, options["dpo"], cache)


def test_datasets_made_before_the_option_serve_single_answers(
    files: dict[str, str], tmp_path: Path, hf_directory: str
) -> None:
    """Cut and dropped ones too: a file of single answers has no rejected responses that could have decided it."""
    cache = str(tmp_path / "cache")
    old = PreprocessOptions(hf_directory, max_length=12)
    with pytest.raises(UserError, match="a prompt with a single answer"):
        open_or_preprocess(files["single"], old, cache, progress=False)
    (manifest,) = Path(cache).glob("*.manifest.json")
    content = json.loads(manifest.read_text())
    assert content["truncated"]["prompt"]
    assert content["dropped"]
    del content["options"]["chosen_only"]
    manifest.write_text(json.dumps(content))
    asked = PreprocessOptions(hf_directory, max_length=12, chosen_only=True)
    reused = open_or_preprocess(files["single"], asked, cache, progress=False)
    assert reused.prefix == str(manifest).removesuffix(".manifest.json")
