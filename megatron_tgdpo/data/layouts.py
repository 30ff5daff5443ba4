"""The shapes in which people keep preference pairs, each turned into the same `Example`."""

from collections.abc import Callable, Mapping
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
KEYS = ("instruction", "input", "history", "system", "conversations", "prompt", "chosen", "rejected")


@dataclass(frozen=True)
class Message:
    """One turn: ``role`` is system, user, assistant or tool."""

    role: str
    content: str


@dataclass(frozen=True)
class Example:
    """One preference pair as text.

    Attributes:
        prompt: a plain string that no template touches, or the messages before the response.
        chosen: text of the preferred assistant turn.
        rejected: text of the other one.
    """

    prompt: str | tuple[Message, ...]
    chosen: str
    rejected: str


def detect_layout(record: Any, place: str) -> str:
    """Names the layout of a file from its first record.

    Args:
        record: the decoded record.
        place: how errors name it.

    Returns:
        A key of `LAYOUTS`.

    Raises:
        UserError: the record fits no layout.
    """
    _check_sides(record, place)
    responses_are_messages = isinstance(record["chosen"], list)
    if record.get("conversations") is not None:
        return "sharegpt"
    if record.get("instruction") is not None:
        return "instruction"
    if responses_are_messages:
        return "trl_conversational" if isinstance(record.get("prompt"), list) else "trl_implicit"
    if isinstance(record.get("prompt"), str):
        return "trl_plain"
    raise UserError(
        f"{place}: no known layout (keys: {', '.join(map(str, record))}); besides chosen and rejected a record needs "
        "'instruction', 'conversations' or 'prompt', or chosen and rejected must be full lists of messages"
    )


def parse_record(record: Any, layout: str, place: str) -> Example:
    """Turns one record into an `Example`.

    Args:
        record: the decoded record.
        layout: what `detect_layout` said of the file's first record.
        place: how errors name it, for example ``pairs.jsonl:17``.

    Raises:
        UserError: a key is missing, has the wrong type or an unknown role; starts with ``place``.
    """
    _check_sides(record, place)
    return LAYOUTS[layout](record, place)


def parse_prompt(record: Any, place: str) -> str | tuple[Message, ...]:
    """Takes the prompt from a record of any layout; without chosen and rejected, too, where the layout has a prompt.

    Args:
        record: the decoded record.
        place: how errors name it.

    Returns:
        Plain text that no template touches, or the messages before the response.

    Raises:
        UserError: there is no prompt, or it is malformed; starts with ``place``.
    """
    if not isinstance(record, Mapping):
        raise UserError(f"{place}: a record must be a JSON object, found {_kind(record)}")
    if record.get("conversations") is not None:
        return _sharegpt_prompt(record, place)
    if record.get("instruction") is not None:
        return _instruction_prompt(record, place)
    if isinstance(record.get("chosen"), list) and not isinstance(record.get("prompt"), list):
        return parse_record(record, "trl_implicit", place).prompt
    if isinstance(record.get("prompt"), list):
        return _conversational_prompt(record, place)
    if isinstance(record.get("prompt"), str):
        return _text(record["prompt"], "prompt", place)
    raise UserError(
        f"{place}: no prompt (keys: {', '.join(map(str, record))}); a record needs 'instruction', 'conversations' or "
        "'prompt', or chosen and rejected lists of messages that share one"
    )


def _check_sides(record: Any, place: str) -> None:
    if not isinstance(record, Mapping):
        raise UserError(f"{place}: a record must be a JSON object, found {_kind(record)}")
    chosen, rejected = _need(record, "chosen", place), _need(record, "rejected", place)
    if _kind(chosen) != _kind(rejected):
        raise UserError(f"{place}: 'chosen' is {_kind(chosen)} but 'rejected' is {_kind(rejected)}; make them alike")


def _instruction(record: Mapping[str, Any], place: str) -> Example:
    return Example(_instruction_prompt(record, place), *_plain_sides(record, place))


def _instruction_prompt(record: Mapping[str, Any], place: str) -> tuple[Message, ...]:
    messages = []
    history = record.get("history") or []
    if not isinstance(history, list):
        raise UserError(f"{place}: 'history' must be a list of [user, assistant] pairs, found {_kind(history)}")
    for turn in history:
        if not isinstance(turn, list) or len(turn) != 2:
            raise UserError(f"{place}: each item of 'history' must be a [user, assistant] pair of strings")
        messages.append(Message("user", _text(turn[0], "history", place)))
        messages.append(Message("assistant", _text(turn[1], "history", place)))
    question = _text(_need(record, "instruction", place), "instruction", place)
    if record.get("input"):
        # The reference code joins the parts that are not empty with one newline.
        extra = _text(record["input"], "input", place)
        question = f"{question}\n{extra}" if question else extra
    messages.append(Message("user", question))
    return _with_system(record, messages, place)


def _sharegpt(record: Mapping[str, Any], place: str) -> Example:
    prompt = _sharegpt_prompt(record, place)
    chosen, rejected = (_response([_message(record[key], key, place)], key, place) for key in ("chosen", "rejected"))
    return Example(prompt, chosen, rejected)


def _sharegpt_prompt(record: Mapping[str, Any], place: str) -> tuple[Message, ...]:
    messages = _messages(_need(record, "conversations", place), "conversations", place)
    return _check_prompt(_with_system(record, messages, place), place)


def _trl_plain(record: Mapping[str, Any], place: str) -> Example:
    return Example(_text(_need(record, "prompt", place), "prompt", place), *_plain_sides(record, place))


def _trl_conversational(record: Mapping[str, Any], place: str) -> Example:
    prompt = _conversational_prompt(record, place)
    chosen, rejected = (_response(_messages(record[key], key, place), key, place) for key in ("chosen", "rejected"))
    return Example(prompt, chosen, rejected)


def _conversational_prompt(record: Mapping[str, Any], place: str) -> tuple[Message, ...]:
    return _check_prompt(tuple(_messages(_need(record, "prompt", place), "prompt", place)), place)


def _trl_implicit(record: Mapping[str, Any], place: str) -> Example:
    chosen, rejected = (_messages(record[key], key, place) for key in ("chosen", "rejected"))
    shared = 0
    # The last message of each side is its response, even when both are equal (such pairs are dropped later).
    while shared < min(len(chosen), len(rejected)) - 1 and chosen[shared] == rejected[shared]:
        shared += 1
    if not shared and chosen:
        raise UserError(f"{place}: chosen and rejected share no leading message, so there is no prompt")
    prompt = _check_prompt(tuple(chosen[:shared]), place)
    return Example(prompt, _response(chosen[shared:], "chosen", place), _response(rejected[shared:], "rejected", place))


LAYOUTS: dict[str, Callable[[Mapping[str, Any], str], Example]] = {
    "instruction": _instruction,
    "sharegpt": _sharegpt,
    "trl_plain": _trl_plain,
    "trl_conversational": _trl_conversational,
    "trl_implicit": _trl_implicit,
}


def _need(record: Mapping[str, Any], key: str, place: str) -> Any:
    if record.get(key) is None:
        state = "is null" if key in record else "is missing"
        raise UserError(f"{place}: key '{key}' {state} (keys: {', '.join(map(str, record))})")
    return record[key]


def _text(value: Any, key: str, place: str) -> str:
    if not isinstance(value, str):
        raise UserError(f"{place}: '{key}' must be a string, found {_kind(value)}")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise UserError(f"{place}: '{key}' holds half of a surrogate pair, which is no text") from error
    return value


def _message(value: Any, key: str, place: str) -> Message:
    if not isinstance(value, Mapping):
        raise UserError(f"{place}: '{key}' must hold messages (objects), found {_kind(value)}")
    role_key, text_key = ("from", "value") if "from" in value else ("role", "content")
    for wanted in (role_key, text_key):
        if value.get(wanted) is None:
            raise UserError(f"{place}: a message in '{key}' has no '{wanted}'")
    role = ROLES.get(value[role_key]) if isinstance(value[role_key], str) else None
    if role is None:
        raise UserError(f"{place}: unknown role {value[role_key]!r} in '{key}'; known: {', '.join(ROLES)}")
    return Message(role, _text(value[text_key], f"{key}.{text_key}", place))


def _messages(value: Any, key: str, place: str) -> list[Message]:
    if not isinstance(value, list):
        raise UserError(f"{place}: '{key}' must be a list of messages, found {_kind(value)}")
    return [_message(item, key, place) for item in value]


def _with_system(record: Mapping[str, Any], messages: list[Message], place: str) -> tuple[Message, ...]:
    if record.get("system"):
        return (Message("system", _text(record["system"], "system", place)), *messages)
    return tuple(messages)


def _check_prompt(prompt: tuple[Message, ...], place: str) -> tuple[Message, ...]:
    if prompt and prompt[-1].role not in ("user", "tool"):
        raise UserError(f"{place}: the prompt must end with a user message, found '{prompt[-1].role}'")
    return prompt


def _response(messages: list[Message], key: str, place: str) -> str:
    if len(messages) != 1 or messages[0].role != "assistant":
        roles = ", ".join(message.role for message in messages) or "nothing"
        raise UserError(f"{place}: after the prompt '{key}' must be one assistant message, found: {roles}")
    return messages[0].content


def _plain_sides(record: Mapping[str, Any], place: str) -> tuple[str, str]:
    return _text(record["chosen"], "chosen", place), _text(record["rejected"], "rejected", place)


def _kind(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "a string", bool: "a boolean", int: "a number", float: "a number"}
    return names.get(type(value), "null" if value is None else type(value).__name__)
