"""Layouts with one chosen and one rejected response, and those with a single answer."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from megatron_tgdpo.data.example import (
    Example,
    checked_prompt,
    hh_messages,
    instruction_prompt,
    messages_prompt,
    response_messages,
    response_of,
    template_variables,
    text_prompt,
    with_system,
)
from megatron_tgdpo.data.fields import Message, messages_of, need, text_of
from megatron_tgdpo.errors import UserError

# Keys that hold a rejected response.
REJECTED_KEYS = ("rejected", "rejected_response", "rejected_messages")


def _sided(prompt: Sequence[Message], record: Mapping[str, Any], place: str) -> Example:
    """A pair from its prompt and two responses, which may repeat the prompt."""
    responses = []
    for key in ("chosen", "rejected"):
        messages = response_messages(record[key], key, place)
        if len(messages) > len(prompt) and tuple(messages[: len(prompt)]) == tuple(prompt):
            messages = messages[len(prompt) :]
        responses.append(response_of(messages, key, place))
    return Example(tuple(prompt), responses[0], responses[1], template_variables(record, place))


def _instruction(record: Mapping[str, Any], place: str) -> Example:
    return _sided(instruction_prompt(record, place), record, place)


def _sharegpt(record: Mapping[str, Any], place: str) -> Example:
    return _sided(messages_prompt(record, "conversations", place), record, place)


def _openai(record: Mapping[str, Any], place: str) -> Example:
    return _sided(messages_prompt(record, "messages", place), record, place)


def _context(record: Mapping[str, Any], place: str) -> Example:
    return _sided(messages_prompt(record, "context", place), record, place)


def _question(record: Mapping[str, Any], place: str) -> Example:
    return _sided(text_prompt(record, "question", place), record, place)


def _prompt_text(record: Mapping[str, Any], place: str) -> Example:
    return _sided(text_prompt(record, "prompt", place), record, place)


def _trl_conversational(record: Mapping[str, Any], place: str) -> Example:
    return _sided(messages_prompt(record, "prompt", place), record, place)


def _trl_plain(record: Mapping[str, Any], place: str) -> Example:
    prompt = text_of(need(record, "prompt", place), "prompt", place)
    chosen, rejected = (text_of(record[key], key, place) for key in ("chosen", "rejected"))
    return Example(prompt, chosen, rejected, template_variables(record, place))


def _trl_implicit(record: Mapping[str, Any], place: str) -> Example:
    chosen, rejected = (messages_of(record[key], key, place) for key in ("chosen", "rejected"))
    return _parted(chosen, rejected, record, place)


def _parted(chosen: list[Message], rejected: list[Message], record: Mapping[str, Any], place: str) -> Example:
    """Two whole dialogues: the prompt is what they share, up to a user's turn."""
    shared = 0
    # The last message of each is its response, even when both are equal (such pairs are dropped later).
    while shared < min(len(chosen), len(rejected)) - 1 and chosen[shared] == rejected[shared]:
        shared += 1
    while shared and chosen[shared - 1].role not in ("user", "tool"):
        shared -= 1
    if not shared and chosen:
        raise UserError(f"{place}: chosen and rejected share no leading message, so there is no prompt")
    prompt = with_system(record, chosen[:shared], place)
    responses = response_of(chosen[shared:], "chosen", place), response_of(rejected[shared:], "rejected", place)
    return Example(prompt, *responses, template_variables(record, place))


def _hh(record: Mapping[str, Any], place: str) -> Example:
    chosen, rejected = (hh_messages(record[key], key, place) for key in ("chosen", "rejected"))
    return _parted(chosen, rejected, record, place)


def _plain_implicit(record: Mapping[str, Any], place: str) -> Example:
    """The prompt is the text that both begin with, without the space before they part, as in TRL."""
    chosen, rejected = (text_of(record[key], key, place) for key in ("chosen", "rejected"))
    shared = 0
    while shared < min(len(chosen), len(rejected)) and chosen[shared] == rejected[shared]:
        shared += 1
    if shared and chosen[shared - 1] == " ":
        shared -= 1
    if not shared:
        raise UserError(f"{place}: chosen and rejected share no leading text, so there is no prompt")
    return Example(chosen[:shared], chosen[shared:], rejected[shared:], template_variables(record, place))


def parse_swift(record: Mapping[str, Any], place: str) -> Example:
    """``messages`` ends with the chosen response; the other is a text, or another dialogue."""
    messages = messages_of(need(record, "messages", place), "messages", place)
    given = [key for key in REJECTED_KEYS if record.get(key) is not None]
    if len(given) > 1:
        raise UserError(f"{place}: both '{given[0]}' and '{given[1]}': give one")
    if given == ["rejected_messages"]:
        rejected = messages_of(record["rejected_messages"], "rejected_messages", place)
        return _parted(messages, rejected, record, place)
    other = text_of(need(record, "rejected_response", place), "rejected_response", place)
    prompt = checked_prompt(with_system(record, messages[:-1], place), place)
    return Example(prompt, response_of(messages[-1:], "messages", place), other, template_variables(record, place))


def _single_instruction(record: Mapping[str, Any], place: str) -> Example:
    answer = text_of(need(record, "output", place), "output", place)
    return Example(instruction_prompt(record, place), answer, None, template_variables(record, place))


def _single_messages(record: Mapping[str, Any], place: str) -> Example:
    return _dialogue(record, "messages", place)


def _single_sharegpt(record: Mapping[str, Any], place: str) -> Example:
    return _dialogue(record, "conversations", place)


def _dialogue(record: Mapping[str, Any], key: str, place: str) -> Example:
    """The last turn is the answer, all before it the prompt."""
    messages = messages_of(need(record, key, place), key, place)
    answer = response_of(messages[-1:], key, place)
    prompt = checked_prompt(with_system(record, messages[:-1], place), place)
    return Example(prompt, answer, None, template_variables(record, place))


def _single_completion(record: Mapping[str, Any], place: str) -> Example:
    completion = need(record, "completion", place)
    variables = template_variables(record, place)
    if isinstance(record.get("prompt"), list):
        answer = response_of(messages_of(completion, "completion", place), "completion", place)
        return Example(messages_prompt(record, "prompt", place), answer, None, variables)
    prompt = text_of(need(record, "prompt", place), "prompt", place)
    return Example(prompt, text_of(completion, "completion", place), None, variables)


# With a single answer.
SINGLE: dict[str, Callable[[Mapping[str, Any], str], Example]] = {
    "single_messages": _single_messages,
    "single_sharegpt": _single_sharegpt,
    "single_instruction": _single_instruction,
    "single_completion": _single_completion,
}
# With keys chosen and rejected.
SIDED: dict[str, Callable[[Mapping[str, Any], str], Example]] = {
    "instruction": _instruction,
    "sharegpt": _sharegpt,
    "openai": _openai,
    "context": _context,
    "question": _question,
    "prompt_text": _prompt_text,
    "trl_plain": _trl_plain,
    "trl_conversational": _trl_conversational,
    "trl_implicit": _trl_implicit,
    "hh": _hh,
    "plain_implicit": _plain_implicit,
}
