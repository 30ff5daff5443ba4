"""Values of a record's keys, checked; errors start with the record's place, such as ``pairs.jsonl:17``."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
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
    "tool_response": "tool",
}
# Turns whose text is a call, or a list of calls, as JSON: LLaMA-Factory's name and ms-swift's.
CALL_ROLES = ("function_call", "tool_call")


@dataclass(frozen=True)
class RawRecord:
    """One record as read.

    Attributes:
        number: line in a JSONL file, else the record's place in the file; both count from 1.
        payload: the undecoded line of a JSONL file (parsed by the worker), else the decoded object.
        bytes_read: bytes of the file read when this record was complete; for progress only.
    """

    number: int
    payload: Any
    bytes_read: int


@dataclass(frozen=True)
class Message:
    """One turn.

    Attributes:
        role: system, user, assistant or tool.
        content: its text; None where it has none, as with tool calls.
        extra: its other keys, as the chat template reads them: ``tool_calls``, ``reasoning_content``, ``name``, ...
    """

    role: str
    content: str | None
    extra: Mapping[str, Any] = field(default_factory=dict)

    @property
    def text(self) -> str:
        """The content, empty where there is none."""
        return self.content or ""

    @property
    def is_blank(self) -> bool:
        """Whether it says nothing at all."""
        return not (self.text.strip() or any(self.extra.values()))

    def as_dict(self) -> dict[str, Any]:
        """The message as chat templates, and JSON files, have it."""
        text = {} if self.content is None else {"content": self.content}
        return {"role": self.role, **text, **self.extra}


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
    given, content = value.get(role_key), value.get(text_key)
    if given is None:
        raise UserError(f"{place}: a message in '{key}' has no '{role_key}'")
    # As transformers has it, a key without a value is no key; Parquet gives every message the keys of all.
    extra = {}
    if len(value) > 2:
        extra = {
            name: item for name, item in value.items() if name not in (role_key, text_key) and item not in (None, [])
        }
        extra = _plain(extra, key, place) if extra else extra
    if given in CALL_ROLES:
        return Message("assistant", None, {**extra, "tool_calls": _calls(content, f"{key}.{text_key}", place)})
    role = ROLES.get(given) if isinstance(given, str) else None
    if role is None:
        raise UserError(f"{place}: unknown role {given!r} in '{key}'; known: {', '.join((*ROLES, *CALL_ROLES))}")
    if content is None:
        if role != "assistant" or not extra:
            raise UserError(f"{place}: a message in '{key}' has no '{text_key}'")
        return Message(role, None, extra)
    if isinstance(content, list):
        content = _joined_parts(content, f"{key}.{text_key}", place)
    return Message(role, text_of(content, f"{key}.{text_key}", place), extra)


def messages_of(value: Any, key: str, place: str) -> list[Message]:
    """A list of messages; raises a UserError for anything else."""
    if not isinstance(value, list):
        raise UserError(f"{place}: '{key}' must be a list of messages, found {kind_of(value)}")
    return [message_of(item, key, place) for item in value]


def list_or_json(value: Any, key: str, place: str) -> list[Any]:
    """A list, or the JSON text of one, in which files with fixed columns keep it; raises a UserError otherwise."""
    if isinstance(value, str):
        value = _decoded(value, key, place)
    if not isinstance(value, list):
        raise UserError(f"{place}: '{key}' must be a list, or the JSON text of one, found {kind_of(value)}")
    result: list[Any] = _plain(value, key, place)
    return result


def kind_of(value: Any) -> str:
    """What a value is called in JSON."""
    names = {dict: "an object", list: "a list", str: "a string", bool: "a boolean", int: "a number", float: "a number"}
    return names.get(type(value), "null" if value is None else type(value).__name__)


def _joined_parts(parts: list[Any], key: str, place: str) -> str:
    """``[{"type": "text", "text": ...}]`` as one text."""
    texts = []
    for part in parts:
        if isinstance(part, str):
            texts.append(part)
        elif isinstance(part, Mapping) and part.get("type", "text") == "text" and isinstance(part.get("text"), str):
            texts.append(part["text"])
        else:
            kind = part.get("type") if isinstance(part, Mapping) else kind_of(part)
            raise UserError(f"{place}: '{key}' has a part that is no text ({kind}): only text is trained on")
    return "".join(texts)


def _calls(content: Any, key: str, place: str) -> list[dict[str, Any]]:
    """The calls that a turn of `CALL_ROLES` writes as JSON, as chat templates have them."""
    found = _decoded(text_of(content, key, place), key, place)
    calls = found if isinstance(found, list) else [found]
    for call in calls:
        if not isinstance(call, dict) or not isinstance(call.get("name"), str) or "arguments" not in call:
            raise UserError(f"{place}: '{key}' must be JSON with 'name' and 'arguments' of the function that is called")
    return [{"type": "function", "function": call} for call in calls]


def _decoded(text: str, key: str, place: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{place}: '{key}' is not the JSON that it must be ({error})") from error


def _plain(value: Any, key: str, place: str) -> Any:
    """A value, checked to be what JSON can hold."""
    try:
        json.dumps(value, ensure_ascii=False).encode("utf-8")
    except UnicodeEncodeError as error:
        raise UserError(f"{place}: '{key}' holds half of a surrogate pair, which is no text") from error
    except (TypeError, ValueError, RecursionError) as error:
        raise UserError(f"{place}: '{key}' holds what JSON cannot: {error}") from error
    return value
