"""Prompts from files in any of the layouts of preference data, with or without the responses."""

from dataclasses import dataclass
from typing import Any

from megatron_tgdpo.data.fields import Message
from megatron_tgdpo.data.layouts import parse_prompt
from megatron_tgdpo.data.records import detect_format, parse_line, read_records, where
from megatron_tgdpo.errors import UserError


@dataclass(frozen=True)
class Prompt:
    """One prompt: its place for errors, its line or record number, and plain text or messages."""

    place: str
    number: int
    content: str | tuple[Message, ...]


def read_prompts(path: str) -> list[Prompt]:
    """Reads a JSON, JSONL or Parquet file of prompts.

    Raises:
        UserError: There is none, or a record is malformed; names the line or record.
    """
    prompts = []
    for place, number, record in records_of(path):
        content = parse_prompt(record, place)
        texts = [content] if isinstance(content, str) else [m.content for m in content if m.role != "system"]
        if not any(text.strip() for text in texts):
            raise UserError(f"{place}: the prompt has no text")
        prompts.append(Prompt(place, number, content))
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
