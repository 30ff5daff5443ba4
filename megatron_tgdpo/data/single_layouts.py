"""Layouts with a single answer."""

from collections.abc import Mapping
from typing import Any

from megatron_tgdpo.data.example import (
    Example,
    Response,
    checked_prompt,
    has_no_pair,
    instruction_prompt,
    messages_prompt,
    response_of,
    template_variables,
    with_system,
)
from megatron_tgdpo.data.fields import Message, messages_of, need, text_of


def parse_messages(record: Mapping[str, Any], place: str) -> Example:
    """``messages`` ends with the answer."""
    return _dialogue(record, "messages", place)


def messages_before_answer(record: Mapping[str, Any], place: str) -> tuple[Message, ...]:
    """``messages`` up to the answer, which may be absent."""
    return _before_answer(record, "messages", place)


def is_messages(record: Mapping[str, Any]) -> bool:
    """Whether a record may be read so."""
    return has_no_pair(record) and record.get("messages") is not None


def parse_sharegpt(record: Mapping[str, Any], place: str) -> Example:
    """``conversations`` ends with the answer."""
    return _dialogue(record, "conversations", place)


def sharegpt_before_answer(record: Mapping[str, Any], place: str) -> tuple[Message, ...]:
    """``conversations`` up to the answer."""
    return _before_answer(record, "conversations", place)


def is_sharegpt(record: Mapping[str, Any]) -> bool:
    """Whether a record may be read so. Prompts without answers have this key, too; they end with the user's turn."""
    if not has_no_pair(record) or not _has_turns(record):
        return False
    last = record["conversations"][-1]
    return last.get("from", last.get("role")) in ("gpt", "assistant")


def _has_turns(record: Mapping[str, Any]) -> bool:
    turns = record.get("conversations")
    return isinstance(turns, list) and bool(turns) and isinstance(turns[-1], Mapping)


def parse_instruction(record: Mapping[str, Any], place: str) -> Example:
    """``instruction`` and ``output``."""
    answer = text_of(need(record, "output", place), "output", place)
    return Example(instruction_prompt(record, place), answer, None, template_variables(record, place))


def is_instruction(record: Mapping[str, Any]) -> bool:
    """Whether a record may be read so."""
    return _answers(record, "instruction", "output")


def parse_completion(record: Mapping[str, Any], place: str) -> Example:
    """``prompt`` and ``completion``, both text or both messages."""
    completion = need(record, "completion", place)
    prompt = completion_prompt(record, place)
    answer: Response
    if isinstance(prompt, str):
        answer = text_of(completion, "completion", place)
    else:
        answer = response_of(messages_of(completion, "completion", place), "completion", place)
    return Example(prompt, answer, None, template_variables(record, place))


def completion_prompt(record: Mapping[str, Any], place: str) -> str | tuple[Message, ...]:
    """Text that no template touches, or messages."""
    if isinstance(record.get("prompt"), list):
        return messages_prompt(record, "prompt", place)
    return text_of(need(record, "prompt", place), "prompt", place)


def is_completion(record: Mapping[str, Any]) -> bool:
    """Whether a record may be read so."""
    return _answers(record, "prompt", "completion")


def _answers(record: Mapping[str, Any], prompt: str, answer: str) -> bool:
    both = record.get(prompt) is not None and record.get(answer) is not None
    return has_no_pair(record) and both and not _has_turns(record)


def _dialogue(record: Mapping[str, Any], key: str, place: str) -> Example:
    """The last turn is the answer, all before it the prompt."""
    messages = messages_of(need(record, key, place), key, place)
    answer = response_of(messages[-1:], key, place)
    prompt = checked_prompt(with_system(record, messages[:-1], place), place)
    return Example(prompt, answer, None, template_variables(record, place))


def _before_answer(record: Mapping[str, Any], key: str, place: str) -> tuple[Message, ...]:
    messages = messages_of(record[key], key, place)
    if messages and messages[-1].role == "assistant":
        messages = messages[:-1]
    return checked_prompt(with_system(record, messages, place), place)
