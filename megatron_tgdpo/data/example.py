"""What every layout of records is turned into, and the parts that layouts are read from."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from megatron_tgdpo.data.fields import Message, kind_of, list_or_json, message_of, messages_of, need, text_of
from megatron_tgdpo.errors import UserError

Response = str | tuple[Message, ...]

# The keys of a pair's responses.
RESPONSES = ("chosen", "rejected")
# Where a turn begins in a text of Anthropic's HH.
_HH_TURN = re.compile(r"(?:^|\n\n)(Human|Assistant):")
# Templates are told of these; the last holds any others, as in TRL.
_VARIABLES = ("tools", "documents", "chat_template_kwargs")


@dataclass(frozen=True)
class Example:
    """One preference pair as text, or a prompt with a single answer.

    Attributes:
        prompt: a plain string that no template touches, or the messages before the response.
        chosen: the preferred response, or the only one: the text of an assistant turn, or messages from an
            assistant's to an assistant's, of which the assistant's are trained on.
        rejected: the other one; None if there is none.
        variables: what the record tells the chat template besides its messages: ``tools``, ...
        tie: whether no answer is better than another, so that there is no pair.
    """

    prompt: str | tuple[Message, ...]
    chosen: Response
    rejected: Response | None
    variables: Mapping[str, Any] = field(default_factory=dict)
    tie: bool = False


def has_pair(record: Mapping[str, Any]) -> bool:
    """Whether a record has both of `RESPONSES`."""
    return all(record.get(key) is not None for key in RESPONSES)


def has_no_pair(record: Mapping[str, Any]) -> bool:
    """Whether a record has neither of `RESPONSES`."""
    return all(record.get(key) is None for key in RESPONSES)


def template_variables(record: Mapping[str, Any], place: str) -> dict[str, Any]:
    """What a record tells the chat template besides its messages; raises a UserError where that is malformed."""
    found: dict[str, Any] = {}
    for key in _VARIABLES:
        value = record.get(key)
        if not value:
            continue
        if key == "chat_template_kwargs":
            if not isinstance(value, Mapping):
                raise UserError(f"{place}: '{key}' must be an object, found {kind_of(value)}")
            found |= {name: item for name, item in value.items() if item is not None}
        else:
            value = list_or_json(value, key, place)
            found |= {key: value} if value else {}
    return found


def as_keys(variables: Mapping[str, Any]) -> dict[str, Any]:
    """The keys of a record that `template_variables` reads as these."""
    *named, others = _VARIABLES
    rest = {key: value for key, value in variables.items() if key not in named}
    return {key: value for key, value in variables.items() if key in named} | ({others: rest} if rest else {})


def with_system(record: Mapping[str, Any], messages: Sequence[Message], place: str) -> tuple[Message, ...]:
    """Messages behind the record's own system message, if it has one."""
    if record.get("system"):
        return (Message("system", text_of(record["system"], "system", place)), *messages)
    return tuple(messages)


def checked_prompt(prompt: Sequence[Message], place: str) -> tuple[Message, ...]:
    """The messages, if a response can follow them; raises a UserError where not."""
    if prompt and prompt[-1].role not in ("user", "tool"):
        raise UserError(f"{place}: the prompt must end with a user message, found '{prompt[-1].role}'")
    return tuple(prompt)


def response_of(messages: Sequence[Message], key: str, place: str) -> Response:
    """The response that messages are; raises a UserError where they are none."""
    if not messages or messages[0].role != "assistant" or messages[-1].role != "assistant":
        roles = ", ".join(message.role for message in messages) or "nothing"
        raise UserError(f"{place}: after the prompt '{key}' must go from an assistant message to one, found: {roles}")
    only = messages[0]
    return only.text if len(messages) == 1 and not only.extra else tuple(messages)


def response_messages(value: Any, key: str, place: str) -> list[Message]:
    """A response of a pair: the text of an answer, a message, or a list of messages."""
    if isinstance(value, str):
        return [Message("assistant", text_of(value, key, place))]
    return messages_of(value, key, place) if isinstance(value, list) else [message_of(value, key, place)]


def is_hh(text: Any) -> bool:
    """Whether a text is a dialogue as Anthropic's HH writes it."""
    return isinstance(text, str) and text.lstrip().startswith("Human:") and "\n\nAssistant:" in text


def hh_messages(text: str, key: str, place: str) -> list[Message]:
    """The turns of such a dialogue; a last one without text, which waits for its answer, is left out."""
    _, *parts = _HH_TURN.split(text_of(text, key, place).strip())
    names = {"Human": "user", "Assistant": "assistant"}
    turns = [Message(names[name], part.strip()) for name, part in zip(parts[::2], parts[1::2], strict=True)]
    return turns[:-1] if turns and turns[-1].role == "assistant" and not turns[-1].content else turns


def instruction_prompt(record: Mapping[str, Any], place: str) -> tuple[Message, ...]:
    """``history``, ``instruction`` and ``input``."""
    messages = []
    history = record.get("history") or []
    if not isinstance(history, list):
        raise UserError(f"{place}: 'history' must be a list of [user, assistant] pairs, found {kind_of(history)}")
    for turn in history:
        if not isinstance(turn, list) or len(turn) != 2:
            raise UserError(f"{place}: each item of 'history' must be a [user, assistant] pair of strings")
        messages.append(Message("user", text_of(turn[0], "history", place)))
        messages.append(Message("assistant", text_of(turn[1], "history", place)))
    question = text_of(need(record, "instruction", place), "instruction", place)
    if record.get("input"):
        # The reference code joins the parts that are not empty with one newline.
        extra = text_of(record["input"], "input", place)
        question = f"{question}\n{extra}" if question else extra
    messages.append(Message("user", question))
    return with_system(record, messages, place)


def messages_prompt(record: Mapping[str, Any], key: str, place: str) -> tuple[Message, ...]:
    """A list of messages that waits for its answer, behind the record's system message."""
    return checked_prompt(with_system(record, messages_of(need(record, key, place), key, place), place), place)


def text_prompt(record: Mapping[str, Any], key: str, place: str) -> tuple[Message, ...]:
    """A string that is a user's turn, or a dialogue of HH."""
    text = text_of(need(record, key, place), key, place)
    messages = hh_messages(text, key, place) if is_hh(text) else [Message("user", text)]
    return checked_prompt(with_system(record, messages, place), place)


def chat_prompt(record: Mapping[str, Any], place: str) -> tuple[Message, ...]:
    """The prompt as messages from whichever key of a known layout holds it; raises a UserError where none does."""
    for key in ("conversations", "prompt"):
        if isinstance(record.get(key), list):
            return messages_prompt(record, key, place)
    if record.get("instruction") is not None:
        return instruction_prompt(record, place)
    for key in ("messages", "context"):
        if record.get(key) is not None:
            return messages_prompt(record, key, place)
    for key in ("prompt", "question"):
        if record.get(key) is not None:
            return text_prompt(record, key, place)
    raise UserError(
        f"{place}: no prompt (keys: {', '.join(map(str, record))}); a record needs 'instruction', 'conversations', "
        "'messages', 'question' or 'prompt', or chosen and rejected lists of messages that share one"
    )
