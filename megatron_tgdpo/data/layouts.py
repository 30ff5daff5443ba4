"""The shapes in which people keep preference pairs and single answers, a row each, turned into the same `Example`."""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from megatron_tgdpo.data import pair_layouts, scored_layouts, single_layouts
from megatron_tgdpo.data.example import (
    RESPONSES,
    Example,
    chat_prompt,
    has_pair,
    instruction_prompt,
    messages_prompt,
    text_prompt,
)
from megatron_tgdpo.data.fields import Message, kind_of, text_of
from megatron_tgdpo.errors import UserError

__all__ = [
    "KEYS",
    "LAYOUTS",
    "Example",
    "Layout",
    "detect_layout",
    "is_known_key",
    "is_single",
    "parse_prompt",
    "parse_record",
    "rename",
]

# What any layout may have.
KEYS = (*RESPONSES, "system", "tools", "documents", "chat_template_kwargs")
# Words after "rejected" of keys that say something about a rejected response.
_ABOUT = re.compile(
    r"(\w*[-_ ])?(score|scores|rating|ratings|rank|reward|rewards|model|policy|source|id|idx|index|tokens|length|"
    r"logps?|logprobs?|rationale|reason|critique|type|category)(s)?"
)

Record = Mapping[str, Any]


@dataclass(frozen=True)
class Layout:
    """A shape of records.

    Attributes:
        parse: Turns a record, and how errors name it, into a pair or a single answer.
        matches: Whether a record has this shape. The rows above do not have it.
        keys: What it reads, beside `KEYS`.
        prompt: Its prompt alone, whatever became of the responses; None: that of ``parse``.
        single: It holds prompts with one answer, not pairs.
    """

    parse: Callable[[Record, str], Example]
    matches: Callable[[Record], bool]
    keys: tuple[str, ...] = ()
    prompt: Callable[[Record, str], str | tuple[Message, ...]] | None = None
    single: bool = False


def _pair_after(
    key: str,
    read: Callable[[Record, str, str], tuple[Message, ...]],
    kind: type = object,
    also: tuple[str, ...] = (),
) -> Layout:
    """The row of pairs whose prompt a key holds, as a value of some kind."""

    def prompt(record: Record, place: str) -> tuple[Message, ...]:
        return read(record, key, place)

    def matches(record: Record) -> bool:
        return has_pair(record) and record.get(key) is not None and isinstance(record[key], kind)

    return Layout(pair_layouts.pair_after(prompt), matches, (key, *also), prompt)


# A record is of the first that it matches.
LAYOUTS: dict[str, Layout] = {
    "swift": Layout(pair_layouts.parse_swift, pair_layouts.is_swift, ("messages", *pair_layouts.REJECTED_KEYS)),
    "scored": Layout(scored_layouts.parse_scored, scored_layouts.is_scored, scored_layouts.ANSWER_KEYS, chat_prompt),
    "ranked": Layout(scored_layouts.parse_ranked, scored_layouts.is_ranked, scored_layouts.ANSWER_KEYS, chat_prompt),
    "preference": Layout(
        scored_layouts.parse_preference, scored_layouts.is_preference, scored_layouts.PREFERENCE_KEYS, chat_prompt
    ),
    "single_messages": Layout(
        single_layouts.parse_messages,
        single_layouts.is_messages,
        ("messages",),
        single_layouts.messages_before_answer,
        single=True,
    ),
    "single_sharegpt": Layout(
        single_layouts.parse_sharegpt,
        single_layouts.is_sharegpt,
        ("conversations",),
        single_layouts.sharegpt_before_answer,
        single=True,
    ),
    "single_instruction": Layout(
        single_layouts.parse_instruction,
        single_layouts.is_instruction,
        ("instruction", "input", "history", "output"),
        instruction_prompt,
        single=True,
    ),
    "single_completion": Layout(
        single_layouts.parse_completion,
        single_layouts.is_completion,
        ("prompt", "completion"),
        single_layouts.completion_prompt,
        single=True,
    ),
    "sharegpt": _pair_after("conversations", messages_prompt),
    "trl_conversational": _pair_after("prompt", messages_prompt, list),
    "trl_implicit": Layout(pair_layouts.parse_two_dialogues, pair_layouts.is_two_dialogues),
    "instruction": _pair_after(
        "instruction", lambda record, _, place: instruction_prompt(record, place), also=("input", "history")
    ),
    "trl_plain": Layout(pair_layouts.parse_plain, pair_layouts.is_plain, ("prompt",), pair_layouts.plain_prompt),
    "openai": _pair_after("messages", messages_prompt),
    "context": _pair_after("context", messages_prompt, list),
    "prompt_text": _pair_after("prompt", text_prompt, str),
    "question": _pair_after("question", text_prompt),
    "hh": Layout(pair_layouts.parse_two_hh, pair_layouts.is_two_hh),
    "plain_implicit": Layout(pair_layouts.parse_two_texts, pair_layouts.is_two_texts),
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
    if chosen_only:
        record = _without_rejected(record)
    found = _matching(record)
    _refuse_unknown(record, place, LAYOUTS[found].keys if found else ())
    if found is None:
        pair_layouts.check_responses(record, place)
        raise _no_layout(record, place)
    return found


def is_known_key(key: str) -> bool:
    """Whether a layout reads a key, or refuses it: of a Parquet file, other columns need not be read."""
    named = key in KEYS or any(key in layout.keys for layout in LAYOUTS.values())
    return named or key.lower().startswith("rejected")


def is_single(layout: str) -> bool:
    """Whether a layout holds prompts with one answer, not pairs."""
    return LAYOUTS[layout].single


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
    if chosen_only and not is_single(layout):
        record = _without_rejected(record)
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
    if (record.get("chosen") is None) != (record.get("rejected") is None):
        # Half of a pair has its prompt, too, if it is the chosen half.
        record = {**record, "rejected": record.get("chosen")}
    found = _matching(record)
    if found is not None:
        prompt_of = LAYOUTS[found].prompt
        return parse_record(record, found, place).prompt if prompt_of is None else prompt_of(record, place)
    if has_pair(record):
        raise _no_layout(record, place)
    if isinstance(record.get("prompt"), str) and not scored_layouts.is_scored_row(record):
        return text_of(record["prompt"], "prompt", place)
    return chat_prompt(record, place)


def _matching(record: Record) -> str | None:
    return next((name for name, layout in LAYOUTS.items() if layout.matches(record)), None)


def _no_layout(record: Record, place: str) -> UserError:
    return UserError(
        f"{place}: no known layout (keys: {', '.join(map(str, record))}); besides chosen and rejected a record needs "
        "'instruction', 'conversations', 'messages', 'question' or 'prompt', or chosen and rejected must be whole "
        "dialogues; name the prompt's key with data.columns (prompt: KEY)"
    )


def _refuse_unknown(record: Record, place: str, known: tuple[str, ...]) -> None:
    """Refuses what may be a rejected response that no layout has: it must not be left out without a word."""
    for key, value in record.items():
        name = str(key).lower()
        # A number is none, and what is empty holds none.
        if (
            not name.startswith("rejected")
            or key in (*pair_layouts.REJECTED_KEYS, *known)
            or not value
            or isinstance(value, int | float)
        ):
            continue
        if not _ABOUT.fullmatch(name.removeprefix("rejected").lstrip("-_ ")):
            raise UserError(
                f"{place}: key '{key}' is none of a known layout: if it holds the rejected response, say so with "
                f"data.columns (rejected: {key}), else rename or remove it"
            )


def _without_rejected(record: Record) -> Record:
    """A pair's record with the chosen response as both, so that every layout reads it by its one set of rules."""
    if pair_layouts.is_swift(record):
        rest = {key: value for key, value in record.items() if key not in pair_layouts.REJECTED_KEYS}
        return record if record.get("messages") is None else {**rest, "rejected_messages": record["messages"]}
    return record if record.get("chosen") is None else {**record, "rejected": record["chosen"]}
