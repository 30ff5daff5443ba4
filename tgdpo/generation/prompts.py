"""Prompts from files in any of the layouts of preference data, with or without the responses."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from megatron_tgdpo.data.chat import NO_VARIABLES
from megatron_tgdpo.data.example import template_variables
from megatron_tgdpo.data.fields import Message
from megatron_tgdpo.data.layouts import parse_prompt, rename
from megatron_tgdpo.data.records import detect_format, parse_line, read_records, where
from megatron_tgdpo.errors import UserError


@dataclass(frozen=True)
class Prompt:
    """One prompt.

    Attributes:
        place: Its record, for errors.
        number: Its line or record number.
        content: Plain text or messages.
        variables: What its record tells the chat template beside these.
    """

    place: str
    number: int
    content: str | tuple[Message, ...]
    variables: Mapping[str, Any]


def read_prompts(path: str, columns: Mapping[str, str] = NO_VARIABLES) -> list[Prompt]:
    """Reads a JSON, JSONL or Parquet file of prompts; ``columns`` is as in `PreprocessOptions`.

    Raises:
        UserError: There is none, or a record is malformed; names the line or record.
    """
    prompts = []
    for place, number, record in records_of(path):
        record = rename(record, columns, place)
        content = parse_prompt(record, place)
        turns = [Message("user", content)] if isinstance(content, str) else content
        if all(turn.is_blank for turn in turns if turn.role != "system"):
            raise UserError(f"{place}: the prompt has no text")
        prompts.append(Prompt(place, number, content, template_variables(record, place)))
    if not prompts:
        raise UserError(f"{path}: holds no prompt")
    return prompts


def records_of(path: str) -> list[tuple[str, int, Any]]:
    """(place, number, decoded record) of each record of a JSON, JSONL or Parquet file.

    Raises:
        UserError: It cannot be read or decoded; names the line or record.
    """
    kind = detect_format(path)
    records = []
    for raw in read_records(path, kind):
        place = where(path, kind, raw.number)
        records.append((place, raw.number, parse_line(raw.payload, place) if kind == "jsonl" else raw.payload))
    return records
