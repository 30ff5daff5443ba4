"""Values of a record's keys, checked; errors start with the record's place, such as ``pairs.jsonl:17``."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from megatron_tgdpo.errors import UserError

ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "system": "system",
    "observation": "tool",
    "tool": "tool",
}


@dataclass(frozen=True)
class Message:
    """One turn: ``role`` is system, user, assistant or tool."""

    role: str
    content: str


def need(record: Mapping[str, Any], key: str, place: str) -> Any:
    """A key's value; raises a UserError where there is none."""
    if record.get(key) is None:
        state = "is null" if key in record else "is missing"
        raise UserError(f"{place}: key '{key}' {state} (keys: {', '.join(map(str, record))})")
    return record[key]


def text_of(value: Any, key: str, place: str) -> str:
    """A string that UTF-8 can hold; raises a UserError for anything else."""
    if not isinstance(value, str):
        raise UserError(f"{place}: '{key}' must be a string, found {kind_of(value)}")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise UserError(f"{place}: '{key}' holds half of a surrogate pair, which is no text") from error
    return value


def message_of(value: Any, key: str, place: str) -> Message:
    """A message in the keys of ShareGPT or of chat templates; raises a UserError for anything else."""
    if not isinstance(value, Mapping):
        raise UserError(f"{place}: '{key}' must hold messages (objects), found {kind_of(value)}")
    role_key, text_key = ("from", "value") if "from" in value else ("role", "content")
    for wanted in (role_key, text_key):
        if value.get(wanted) is None:
            raise UserError(f"{place}: a message in '{key}' has no '{wanted}'")
    role = ROLES.get(value[role_key]) if isinstance(value[role_key], str) else None
    if role is None:
        raise UserError(f"{place}: unknown role {value[role_key]!r} in '{key}'; known: {', '.join(ROLES)}")
    return Message(role, text_of(value[text_key], f"{key}.{text_key}", place))


def messages_of(value: Any, key: str, place: str) -> list[Message]:
    """A list of messages; raises a UserError for anything else."""
    if not isinstance(value, list):
        raise UserError(f"{place}: '{key}' must be a list of messages, found {kind_of(value)}")
    return [message_of(item, key, place) for item in value]


def kind_of(value: Any) -> str:
    """What a value is called in JSON."""
    names = {dict: "an object", list: "a list", str: "a string", bool: "a boolean", int: "a number", float: "a number"}
    return names.get(type(value), "null" if value is None else type(value).__name__)
