from typing import Any

import pytest

from megatron_tgdpo.data.fields import Message
from megatron_tgdpo.data.layouts import Example, detect_layout, parse_prompt, parse_record
from megatron_tgdpo.errors import UserError

USER = {"role": "user", "content": "Q"}
SYSTEM = {"role": "system", "content": "S"}


def answer(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


def messages(*turns: str) -> tuple[Message, ...]:
    names = {"s": "system", "u": "user", "a": "assistant", "t": "tool"}
    return tuple(Message(names[turn[0]], turn[2:]) for turn in turns)


CASES: list[tuple[str, dict[str, Any], Any]] = [
    ("instruction", {"instruction": "Q", "chosen": "A", "rejected": "B"}, messages("u:Q")),
    ("instruction", {"instruction": "Q", "input": "I", "chosen": "A", "rejected": "B"}, messages("u:Q\nI")),
    ("instruction", {"instruction": "", "input": "I", "chosen": "A", "rejected": "B"}, messages("u:I")),
    (
        "instruction",
        {
            "instruction": "Q",
            "input": None,
            "system": "S",
            "history": [["q1", "a1"], ["q2", "a2"]],
            "chosen": "A",
            "rejected": "B",
        },
        messages("s:S", "u:q1", "a:a1", "u:q2", "a:a2", "u:Q"),
    ),
    (
        "sharegpt",
        {
            "system": "S",
            "conversations": [
                {"from": "human", "value": "q1"},
                {"from": "gpt", "value": "a1"},
                {"from": "human", "value": "Q"},
            ],
            "chosen": {"from": "gpt", "value": "A"},
            "rejected": {"from": "gpt", "value": "B"},
        },
        messages("s:S", "u:q1", "a:a1", "u:Q"),
    ),
    (
        "sharegpt",
        {
            "conversations": [{"from": "human", "value": "Q"}, {"from": "observation", "value": "O"}],
            "chosen": {"from": "gpt", "value": "A"},
            "rejected": {"from": "gpt", "value": "B"},
        },
        messages("u:Q", "t:O"),
    ),
    ("trl_plain", {"prompt": "Q", "chosen": "A", "rejected": "B"}, "Q"),
    (
        "trl_conversational",
        {"prompt": [SYSTEM, USER], "chosen": [answer("A")], "rejected": [answer("B")]},
        messages("s:S", "u:Q"),
    ),
    (
        "trl_implicit",
        {"chosen": [SYSTEM, USER, answer("A")], "rejected": [SYSTEM, USER, answer("B")]},
        messages("s:S", "u:Q"),
    ),
    # UltraFeedback carries the prompt as a string beside full message lists.
    ("trl_implicit", {"prompt": "Q", "chosen": [USER, answer("A")], "rejected": [USER, answer("B")]}, messages("u:Q")),
]


@pytest.mark.parametrize(("layout", "record", "prompt"), CASES)
def test_each_layout(layout, record, prompt):
    assert detect_layout(record, "f:1") == layout
    assert parse_record(record, layout, "f:1") == Example(prompt, "A", "B")


@pytest.mark.parametrize(("layout", "record", "prompt"), CASES)
def test_a_prompt_is_read_with_and_without_responses(layout: str, record: dict[str, Any], prompt: Any) -> None:
    assert parse_prompt(record, "here") == prompt
    if layout != "trl_implicit":
        bare = {key: value for key, value in record.items() if key not in ("chosen", "rejected")}
        assert parse_prompt(bare, "here") == prompt


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ("text", "here: a record must be a JSON object, found a string"),
        ({"query": "Q"}, r"here: no prompt \(keys: query\)"),
        ({"prompt": None}, r"here: no prompt \(keys: prompt\)"),
        ({"prompt": [answer("A")]}, "here: the prompt must end with a user message, found 'assistant'"),
        ({"instruction": 3}, "here: 'instruction' must be a string, found a number"),
    ],
)
def test_records_without_a_prompt(record: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        parse_prompt(record, "here")


def test_implicit_prompt_of_equal_sides_keeps_the_last_message_as_response():
    record = {"chosen": [USER, answer("A")], "rejected": [USER, answer("A")]}
    assert parse_record(record, "trl_implicit", "f:1") == Example(messages("u:Q"), "A", "A")


BAD: list[tuple[str, Any, str]] = [
    ("trl_plain", {"prompt": "Q", "chosen": "A"}, "key 'rejected' is missing"),
    ("trl_plain", {"prompt": "Q", "chosen": "A", "rejected": None}, "key 'rejected' is null"),
    ("trl_plain", {"chosen": "A", "rejected": "B"}, "key 'prompt' is missing"),
    ("trl_plain", {"prompt": ["Q"], "chosen": "A", "rejected": "B"}, "'prompt' must be a string, found a list"),
    ("trl_plain", {"prompt": "Q", "chosen": "A", "rejected": ["B"]}, "'chosen' is a string but 'rejected' is a list"),
    ("trl_plain", {"prompt": "Q", "chosen": 1, "rejected": 2}, "'chosen' must be a string, found a number"),
    ("trl_plain", {"prompt": "Q", "chosen": "\ud83d", "rejected": "B"}, "half of a surrogate pair"),
    ("trl_plain", ["Q"], "a record must be a JSON object, found a list"),
    (
        "trl_conversational",
        {"prompt": [{"role": "boss", "content": "Q"}], "chosen": [answer("A")], "rejected": [answer("B")]},
        "unknown role 'boss' in 'prompt'",
    ),
    (
        "trl_conversational",
        {"prompt": [{"role": "user"}], "chosen": [answer("A")], "rejected": [answer("B")]},
        "a message in 'prompt' has no 'content'",
    ),
    (
        "trl_conversational",
        {"prompt": [USER], "chosen": [answer("A"), USER], "rejected": [answer("B")]},
        "'chosen' must go from an assistant message to one, found: assistant, user",
    ),
    (
        "trl_conversational",
        {"prompt": [USER, answer("x")], "chosen": [answer("A")], "rejected": [answer("B")]},
        "must end with a user message, found 'assistant'",
    ),
    (
        "trl_conversational",
        {"prompt": [USER], "chosen": [], "rejected": []},
        "must go from an assistant message to one, found: nothing",
    ),
    ("trl_implicit", {"chosen": [answer("A")], "rejected": [answer("B")]}, "share no leading message"),
    ("sharegpt", {"conversations": "Q", "chosen": {}, "rejected": {}}, "'conversations' must be a list"),
    (
        "sharegpt",
        {"conversations": [], "chosen": {"from": "gpt"}, "rejected": {"from": "gpt", "value": "B"}},
        "a message in 'chosen' has no 'value'",
    ),
    (
        "sharegpt",
        {"conversations": [], "chosen": {"from": "human", "value": "A"}, "rejected": {"from": "gpt", "value": "B"}},
        "'chosen' must go from an assistant message to one, found: user",
    ),
    ("instruction", {"chosen": "A", "rejected": "B"}, "key 'instruction' is missing"),
    (
        "instruction",
        {"instruction": "Q", "history": [["q"]], "chosen": "A", "rejected": "B"},
        r"each item of 'history' must be a \[user, assistant\] pair",
    ),
]


@pytest.mark.parametrize(("layout", "record", "message"), BAD)
def test_errors_name_the_record_in_one_line(layout, record, message):
    with pytest.raises(UserError, match=r"^data\.jsonl:17: .*" + message) as error:
        parse_record(record, layout, "data.jsonl:17")
    assert "\n" not in str(error.value)


def test_unknown_layout_lists_the_keys():
    with pytest.raises(UserError, match=r"f:1: no known layout \(keys: query, chosen, rejected\)"):
        detect_layout({"query": "Q", "chosen": "A", "rejected": "B"}, "f:1")
