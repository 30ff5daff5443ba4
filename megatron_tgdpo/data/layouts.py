"""The shapes in which people keep preference pairs and single answers, each turned into the same `Example`."""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from megatron_tgdpo.data import scored_layouts
from megatron_tgdpo.data.example import Example, chat_prompt, checked_prompt, is_hh, with_system
from megatron_tgdpo.data.fields import Message, kind_of, messages_of, need, text_of
from megatron_tgdpo.data.pair_layouts import REJECTED_KEYS, SIDED, SINGLE, parse_swift
from megatron_tgdpo.errors import UserError

__all__ = [
    "KEYS",
    "LAYOUTS",
    "Example",
    "detect_layout",
    "is_known_key",
    "is_single",
    "parse_prompt",
    "parse_record",
    "rename",
]

KEYS = (
    "instruction", "input", "history", "system", "conversations", "prompt", "chosen", "rejected", "output", "messages",
    "completion", "question", "tools", "documents", "chat_template_kwargs", *scored_layouts.KEYS,
)  # fmt: skip
# Words after "rejected" of keys that say something about a rejected response.
_ABOUT = re.compile(
    r"(\w*[-_ ])?(score|scores|rating|ratings|rank|reward|rewards|model|policy|source|id|idx|index|tokens|length|"
    r"logps?|logprobs?|rationale|reason|critique|type|category)(s)?"
)


@dataclass(frozen=True)
class Layout:
    """A shape of records.

    Attributes:
        parse: Turns a record, and how errors name it, into a pair or a single answer.
        matches: Whether a record has this shape and can have no other. None for those here, which share keys and are
            told apart together, by `detect_layout`.
        keys: What it reads, beside `KEYS`.
    """

    parse: Callable[[Mapping[str, Any], str], Example]
    matches: Callable[[Mapping[str, Any]], bool] | None = None
    keys: tuple[str, ...] = ()


LAYOUTS: dict[str, Layout] = {
    **{name: Layout(parse) for name, parse in (SINGLE | SIDED).items()},
    "swift": Layout(parse_swift),
    "scored": Layout(scored_layouts.parse_scored),
    "ranked": Layout(scored_layouts.parse_ranked),
    "preference": Layout(scored_layouts.parse_preference),
}


def rename(record: Any, columns: Mapping[str, str], place: str) -> Any:
    """A record with the keys of a layout for its own.

    Args:
        record: the decoded record.
        columns: by a layout's key, the record's.
        place: how errors name it.

    Raises:
        UserError: it has not one of the keys.
    """
    if not columns or not isinstance(record, Mapping):
        return record
    for key in columns.values():
        if key not in record:
            raise UserError(f"{place}: no key '{key}', which data.columns names (keys: {', '.join(map(str, record))})")
    renamed = set(columns.values())
    kept = {key: value for key, value in record.items() if key not in renamed}
    return kept | {key: record[theirs] for key, theirs in columns.items()}


def detect_layout(record: Any, place: str, *, chosen_only: bool = False) -> str:
    """Names the layout of a record.

    Args:
        record: the decoded record.
        place: how errors name it.
        chosen_only: as in `parse_record`.

    Returns:
        A key of `LAYOUTS`.

    Raises:
        UserError: the record fits no layout, or has a rejected response that no layout has.
    """
    if not isinstance(record, Mapping):
        raise UserError(f"{place}: a record must be a JSON object, found {kind_of(record)}")
    found = _matching(record)
    if found is not None:
        return found
    _refuse_unknown(record, place)
    if any(record.get(key) is not None for key in REJECTED_KEYS[1:]):
        return "swift"
    if record.get("chosen") is None and record.get("rejected") is None:
        found = scored_layouts.scored_layout(record) or _single_layout(record)
        if found is not None:
            return found
    if chosen_only:
        record = _without_rejected(record)
    _check_responses(record, place)
    return _pair_layout(record, place)


def is_known_key(key: str) -> bool:
    """Whether a layout reads a key, or refuses it: of a Parquet file, other columns need not be read."""
    named = key in KEYS or any(key in layout.keys for layout in LAYOUTS.values())
    return named or key.lower().startswith("rejected")


def is_single(layout: str) -> bool:
    """Whether a layout holds prompts with one answer, not pairs."""
    return layout in SINGLE


def parse_record(record: Any, layout: str, place: str, *, chosen_only: bool = False) -> Example:
    """Turns one record into an `Example`.

    Args:
        record: the decoded record.
        layout: what `detect_layout` said of it.
        place: how errors name it, for example ``pairs.jsonl:17``.
        chosen_only: the rejected response is not looked at, and there is none in the result.

    Raises:
        UserError: a key is missing, has the wrong type or an unknown role; starts with ``place``.
    """
    if not isinstance(record, Mapping):
        raise UserError(f"{place}: a record must be a JSON object, found {kind_of(record)}")
    if chosen_only and layout not in SINGLE:
        record = _without_rejected(record)
    if layout in SIDED:
        _check_responses(record, place)
    example = LAYOUTS[layout].parse(record, place)
    if isinstance(example.prompt, str) and example.variables:
        raise UserError(
            f"{place}: '{next(iter(example.variables))}' is for a chat template, which a plain prompt does not meet: "
            "give the prompt as messages"
        )
    return replace(example, rejected=None, tie=False) if chosen_only else example


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
    own = _matching(record)
    if own is not None:
        return parse_record(record, own, place).prompt
    chosen, rejected = record.get("chosen"), record.get("rejected")
    if chosen is not None:
        both = record if rejected is not None else {**record, "rejected": chosen}
        layout = _pair_layout(both, place)
        # Their prompt is in their responses.
        if layout in ("trl_implicit", "hh", "plain_implicit"):
            return parse_record(both, layout, place).prompt
    elif scored_layouts.scored_layout(record) or scored_layouts.is_scored_row(record):
        layout = "scored"
    else:
        layout = _single_layout(record) or "trl_plain"
    if layout in ("single_messages", "single_sharegpt"):
        return _open_dialogue(record, "messages" if layout == "single_messages" else "conversations", place)
    if layout in ("trl_plain", "single_completion") and isinstance(record.get("prompt"), str):
        return text_of(record["prompt"], "prompt", place)
    found = chat_prompt(record, place)
    if found is None:
        raise UserError(
            f"{place}: no prompt (keys: {', '.join(map(str, record))}); a record needs 'instruction', 'conversations', "
            "'messages', 'question' or 'prompt', or chosen and rejected lists of messages that share one"
        )
    return found


def _matching(record: Mapping[str, Any]) -> str | None:
    """The layout that says itself that a record is of its shape."""
    return next((name for name, layout in LAYOUTS.items() if layout.matches and layout.matches(record)), None)


def _open_dialogue(record: Mapping[str, Any], key: str, place: str) -> tuple[Message, ...]:
    """A dialogue without the answer that it may end with."""
    messages = messages_of(record[key], key, place)
    if messages and messages[-1].role == "assistant":
        messages = messages[:-1]
    return checked_prompt(with_system(record, messages, place), place)


def _refuse_unknown(record: Mapping[str, Any], place: str) -> None:
    """Refuses what may be a rejected response that no layout has: it must not be left out without a word."""
    for key, value in record.items():
        name = str(key).lower()
        # A number is none, and what is empty holds none.
        if not name.startswith("rejected") or key in REJECTED_KEYS or not value or isinstance(value, int | float):
            continue
        if not _ABOUT.fullmatch(name.removeprefix("rejected").lstrip("-_ ")):
            raise UserError(
                f"{place}: key '{key}' is none of a known layout: if it holds the rejected response, say so with "
                f"data.columns (rejected: {key}), else rename or remove it"
            )


def _without_rejected(record: Mapping[str, Any]) -> Mapping[str, Any]:
    """A pair's record with the chosen response as both, so that every layout reads it by its one set of rules."""
    if any(record.get(key) is not None for key in REJECTED_KEYS[1:]):
        rest = {key: value for key, value in record.items() if key not in REJECTED_KEYS}
        return {**rest, "rejected_messages": record.get("messages")}
    return {**record, "rejected": record["chosen"]} if "chosen" in record else record


def _check_responses(record: Mapping[str, Any], place: str) -> None:
    chosen, rejected = need(record, "chosen", place), need(record, "rejected", place)
    if kind_of(chosen) != kind_of(rejected):
        raise UserError(
            f"{place}: 'chosen' is {kind_of(chosen)} but 'rejected' is {kind_of(rejected)}; make them alike"
        )


def _starts_with_answer(response: Any) -> bool:
    """Whether a list of messages begins with the assistant's: it is a response without its prompt."""
    first = response[0] if isinstance(response, list) and response else None
    return isinstance(first, Mapping) and first.get("from", first.get("role")) in ("gpt", "assistant")


def _pair_layout(record: Mapping[str, Any], place: str) -> str:
    """The layout of a record with chosen and rejected."""
    chosen, rejected = record["chosen"], record["rejected"]
    whole = isinstance(chosen, list) and not any(map(_starts_with_answer, (chosen, rejected)))
    prompt = record.get("prompt")
    if record.get("conversations") is not None:
        return "sharegpt"
    if isinstance(prompt, list):
        return "trl_conversational"
    if whole:
        return "trl_implicit"
    if record.get("instruction") is not None:
        return "instruction"
    if isinstance(prompt, str) and isinstance(chosen, str):
        return "trl_plain"
    if record.get("messages") is not None:
        return "openai"
    if isinstance(record.get("context"), list):
        return "context"
    if isinstance(prompt, str):
        return "prompt_text"
    if record.get("question") is not None:
        return "question"
    if isinstance(chosen, list):
        return "trl_implicit"
    if is_hh(chosen) and is_hh(rejected):
        return "hh"
    # Other keys may hold the prompt.
    others = [
        key for key, value in record.items() if key not in ("chosen", "rejected") and isinstance(value, str | list)
    ]
    if isinstance(chosen, str) and not others:
        return "plain_implicit"
    raise UserError(
        f"{place}: no known layout (keys: {', '.join(map(str, record))}); besides chosen and rejected a record needs "
        "'instruction', 'conversations', 'messages', 'question' or 'prompt', or chosen and rejected must be whole "
        "dialogues; name the prompt's key with data.columns (prompt: KEY)"
    )


def _single_layout(record: Mapping[str, Any]) -> str | None:
    """The layout of a record with one answer, None if it is not one."""
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
