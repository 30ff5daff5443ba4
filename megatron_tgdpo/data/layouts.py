"""The shapes in which people keep preference pairs and single answers, each turned into the same `Example`."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from megatron_tgdpo.data.fields import Message, kind_of, message_of, messages_of, need, text_of
from megatron_tgdpo.errors import UserError

KEYS = (
    "instruction", "input", "history", "system", "conversations", "prompt", "chosen", "rejected", "output", "messages",
    "completion",
)  # fmt: skip


@dataclass(frozen=True)
class Example:
    """One preference pair as text, or a prompt with a single answer.

    Attributes:
        prompt: a plain string that no template touches, or the messages before the response.
        chosen: text of the preferred assistant turn, or of the only one.
        rejected: text of the other one; None if there is none.
    """

    prompt: str | tuple[Message, ...]
    chosen: str
    rejected: str | None


def detect_layout(record: Any, place: str, *, chosen_only: bool = False) -> str:
    """Names the layout of a file from its first record.

    Args:
        record: the decoded record.
        place: how errors name it.
        chosen_only: as in `parse_record`.

    Returns:
        A key of `LAYOUTS`.

    Raises:
        UserError: the record fits no layout.
    """
    single = _single_layout(record)
    if single is not None:
        return single
    if chosen_only:
        record = _without_rejected(record)
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


def parse_record(record: Any, layout: str, place: str, *, chosen_only: bool = False) -> Example:
    """Turns one record into an `Example`.

    Args:
        record: the decoded record.
        layout: what `detect_layout` said of the file's first record.
        place: how errors name it, for example ``pairs.jsonl:17``.
        chosen_only: the rejected response is not looked at, and there is none in the result.

    Raises:
        UserError: a key is missing, has the wrong type or an unknown role; starts with ``place``.
    """
    if layout not in _SINGLE:
        if chosen_only:
            record = _without_rejected(record)
        _check_sides(record, place)
    elif not isinstance(record, Mapping):
        raise UserError(f"{place}: a record must be a JSON object, found {kind_of(record)}")
    example = LAYOUTS[layout](record, place)
    return replace(example, rejected=None) if chosen_only else example


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
        raise UserError(f"{place}: a record must be a JSON object, found {kind_of(record)}")
    if record.get("conversations") is not None:
        return _sharegpt_prompt(record, place)
    if record.get("instruction") is not None:
        return _instruction_prompt(record, place)
    if isinstance(record.get("chosen"), list) and not isinstance(record.get("prompt"), list):
        return parse_record(record, "trl_implicit", place).prompt
    if isinstance(record.get("prompt"), list):
        return _conversational_prompt(record, place)
    if isinstance(record.get("prompt"), str):
        return text_of(record["prompt"], "prompt", place)
    raise UserError(
        f"{place}: no prompt (keys: {', '.join(map(str, record))}); a record needs 'instruction', 'conversations' or "
        "'prompt', or chosen and rejected lists of messages that share one"
    )


def _without_rejected(record: Any) -> Any:
    """A pair's record with the chosen response on both sides, so that every layout reads it by its one set of rules."""
    if not isinstance(record, Mapping) or "chosen" not in record:
        return record
    return {**record, "rejected": record["chosen"]}


def _check_sides(record: Any, place: str) -> None:
    if not isinstance(record, Mapping):
        raise UserError(f"{place}: a record must be a JSON object, found {kind_of(record)}")
    chosen, rejected = need(record, "chosen", place), need(record, "rejected", place)
    if kind_of(chosen) != kind_of(rejected):
        raise UserError(
            f"{place}: 'chosen' is {kind_of(chosen)} but 'rejected' is {kind_of(rejected)}; make them alike"
        )


def _instruction(record: Mapping[str, Any], place: str) -> Example:
    return Example(_instruction_prompt(record, place), *_plain_sides(record, place))


def _instruction_prompt(record: Mapping[str, Any], place: str) -> tuple[Message, ...]:
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
    return _with_system(record, messages, place)


def _sharegpt(record: Mapping[str, Any], place: str) -> Example:
    prompt = _sharegpt_prompt(record, place)
    chosen, rejected = (_response([message_of(record[key], key, place)], key, place) for key in ("chosen", "rejected"))
    return Example(prompt, chosen, rejected)


def _sharegpt_prompt(record: Mapping[str, Any], place: str) -> tuple[Message, ...]:
    messages = messages_of(need(record, "conversations", place), "conversations", place)
    return _check_prompt(_with_system(record, messages, place), place)


def _trl_plain(record: Mapping[str, Any], place: str) -> Example:
    return Example(text_of(need(record, "prompt", place), "prompt", place), *_plain_sides(record, place))


def _trl_conversational(record: Mapping[str, Any], place: str) -> Example:
    prompt = _conversational_prompt(record, place)
    chosen, rejected = (_response(messages_of(record[key], key, place), key, place) for key in ("chosen", "rejected"))
    return Example(prompt, chosen, rejected)


def _conversational_prompt(record: Mapping[str, Any], place: str) -> tuple[Message, ...]:
    return _check_prompt(tuple(messages_of(need(record, "prompt", place), "prompt", place)), place)


def _trl_implicit(record: Mapping[str, Any], place: str) -> Example:
    chosen, rejected = (messages_of(record[key], key, place) for key in ("chosen", "rejected"))
    shared = 0
    # The last message of each side is its response, even when both are equal (such pairs are dropped later).
    while shared < min(len(chosen), len(rejected)) - 1 and chosen[shared] == rejected[shared]:
        shared += 1
    if not shared and chosen:
        raise UserError(f"{place}: chosen and rejected share no leading message, so there is no prompt")
    prompt = _check_prompt(tuple(chosen[:shared]), place)
    return Example(prompt, _response(chosen[shared:], "chosen", place), _response(rejected[shared:], "rejected", place))


def _single_layout(record: Any) -> str | None:
    """The layout of a record with one answer, None if it is not one."""
    if not isinstance(record, Mapping) or record.get("chosen") is not None or record.get("rejected") is not None:
        return None
    if record.get("messages") is not None:
        return "single_messages"
    # Prompts without answers are kept in this shape too; they end with the user's turn.
    turns = record.get("conversations")
    if isinstance(turns, list) and turns and isinstance(turns[-1], Mapping):
        return "single_sharegpt" if turns[-1].get("from", turns[-1].get("role")) in ("gpt", "assistant") else None
    if record.get("instruction") is not None and record.get("output") is not None:
        return "single_instruction"
    if record.get("prompt") is not None and record.get("completion") is not None:
        return "single_completion"
    return None


def _single_instruction(record: Mapping[str, Any], place: str) -> Example:
    return Example(_instruction_prompt(record, place), text_of(need(record, "output", place), "output", place), None)


def _single_messages(record: Mapping[str, Any], place: str) -> Example:
    return _dialogue(record, "messages", place)


def _single_sharegpt(record: Mapping[str, Any], place: str) -> Example:
    return _dialogue(record, "conversations", place)


def _dialogue(record: Mapping[str, Any], key: str, place: str) -> Example:
    """The last turn is the answer, all before it the prompt."""
    messages = messages_of(need(record, key, place), key, place)
    answer = _response(messages[-1:], key, place)
    return Example(_check_prompt(_with_system(record, messages[:-1], place), place), answer, None)


def _single_completion(record: Mapping[str, Any], place: str) -> Example:
    completion = need(record, "completion", place)
    if isinstance(record.get("prompt"), list):
        answer = _response(messages_of(completion, "completion", place), "completion", place)
        return Example(_conversational_prompt(record, place), answer, None)
    return Example(
        text_of(need(record, "prompt", place), "prompt", place), text_of(completion, "completion", place), None
    )


_SINGLE: dict[str, Callable[[Mapping[str, Any], str], Example]] = {
    "single_messages": _single_messages,
    "single_sharegpt": _single_sharegpt,
    "single_instruction": _single_instruction,
    "single_completion": _single_completion,
}
LAYOUTS: dict[str, Callable[[Mapping[str, Any], str], Example]] = {
    **_SINGLE,
    "instruction": _instruction,
    "sharegpt": _sharegpt,
    "trl_plain": _trl_plain,
    "trl_conversational": _trl_conversational,
    "trl_implicit": _trl_implicit,
}


def _with_system(record: Mapping[str, Any], messages: list[Message], place: str) -> tuple[Message, ...]:
    if record.get("system"):
        return (Message("system", text_of(record["system"], "system", place)), *messages)
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
    return text_of(record["chosen"], "chosen", place), text_of(record["rejected"], "rejected", place)
