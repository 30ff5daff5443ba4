"""Layouts with one chosen and one rejected response."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from megatron_tgdpo.data.example import (
    RESPONSES,
    Example,
    checked_prompt,
    has_pair,
    hh_messages,
    is_hh,
    response_messages,
    response_of,
    template_variables,
    with_system,
)
from megatron_tgdpo.data.fields import Message, kind_of, messages_of, need, text_of
from megatron_tgdpo.errors import UserError

# Keys that hold a rejected response.
REJECTED_KEYS = ("rejected", "rejected_response", "rejected_messages")


def check_responses(record: Mapping[str, Any], place: str) -> None:
    """Raises a UserError where a response is missing, or the two are of different kinds."""
    chosen, rejected = (need(record, key, place) for key in RESPONSES)
    if kind_of(chosen) != kind_of(rejected):
        raise UserError(
            f"{place}: 'chosen' is {kind_of(chosen)} but 'rejected' is {kind_of(rejected)}; make them alike"
        )


def pair_after(
    prompt_of: Callable[[Mapping[str, Any], str], Sequence[Message]],
) -> Callable[[Mapping[str, Any], str], Example]:
    """Reads pairs whose prompt is messages of its own, which each response may repeat."""

    def parse(record: Mapping[str, Any], place: str) -> Example:
        check_responses(record, place)
        prompt = tuple(prompt_of(record, place))
        responses = []
        for key in RESPONSES:
            messages = response_messages(record[key], key, place)
            if len(messages) > len(prompt) and tuple(messages[: len(prompt)]) == prompt:
                messages = messages[len(prompt) :]
            responses.append(response_of(messages, key, place))
        return Example(prompt, responses[0], responses[1], template_variables(record, place))

    return parse


def parse_plain(record: Mapping[str, Any], place: str) -> Example:
    """Prompt and responses are text."""
    check_responses(record, place)
    prompt = plain_prompt(record, place)
    chosen, rejected = (text_of(record[key], key, place) for key in RESPONSES)
    return Example(prompt, chosen, rejected, template_variables(record, place))


def is_plain(record: Mapping[str, Any]) -> bool:
    """Whether a record may be read so."""
    return has_pair(record) and isinstance(record.get("prompt"), str) and isinstance(record["chosen"], str)


def plain_prompt(record: Mapping[str, Any], place: str) -> str:
    """A prompt that no template touches."""
    return text_of(need(record, "prompt", place), "prompt", place)


def parse_two_texts(record: Mapping[str, Any], place: str) -> Example:
    """The prompt is the text that both begin with, without the space before they part, as in TRL."""
    check_responses(record, place)
    chosen, rejected = (text_of(record[key], key, place) for key in RESPONSES)
    shared = 0
    while shared < min(len(chosen), len(rejected)) and chosen[shared] == rejected[shared]:
        shared += 1
    if shared and chosen[shared - 1] == " ":
        shared -= 1
    if not shared:
        raise UserError(f"{place}: chosen and rejected share no leading text, so there is no prompt")
    return Example(chosen[:shared], chosen[shared:], rejected[shared:], template_variables(record, place))


def is_two_texts(record: Mapping[str, Any]) -> bool:
    """Whether both responses are text and nothing beside them can be the prompt."""
    others = (value for key, value in record.items() if key not in RESPONSES)
    return has_pair(record) and isinstance(record["chosen"], str) and not any(isinstance(v, str | list) for v in others)


def parse_two_dialogues(record: Mapping[str, Any], place: str) -> Example:
    """Each response is a whole dialogue; the prompt is what both begin with."""
    check_responses(record, place)
    chosen, rejected = (messages_of(record[key], key, place) for key in RESPONSES)
    return _parted(chosen, rejected, record, place)


def is_two_dialogues(record: Mapping[str, Any]) -> bool:
    """Whether the responses are lists of messages of which none begins with the assistant's, as one without prompt."""
    if not has_pair(record) or not isinstance(record["chosen"], list):
        return False
    return not any(_starts_with_answer(record[key]) for key in RESPONSES)


def _starts_with_answer(response: Any) -> bool:
    first = response[0] if isinstance(response, list) and response else None
    return isinstance(first, Mapping) and first.get("from", first.get("role")) in ("gpt", "assistant")


def parse_two_hh(record: Mapping[str, Any], place: str) -> Example:
    """Each response is a whole dialogue, as Anthropic's HH writes it."""
    check_responses(record, place)
    chosen, rejected = (hh_messages(record[key], key, place) for key in RESPONSES)
    return _parted(chosen, rejected, record, place)


def is_two_hh(record: Mapping[str, Any]) -> bool:
    """Whether both responses are written so."""
    return all(is_hh(record.get(key)) for key in RESPONSES)


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


def is_swift(record: Mapping[str, Any]) -> bool:
    """Whether a rejected response has one of ms-swift's keys."""
    return any(record.get(key) is not None for key in REJECTED_KEYS[1:])
