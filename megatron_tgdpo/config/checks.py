"""Checks a config: each value by what holds of its kind and by its field's constraint, then all by the rules."""

import unicodedata
from collections.abc import Iterator
from dataclasses import Field, fields, is_dataclass
from math import isfinite
from typing import Any

from megatron_tgdpo.config.constraints import first_broken
from megatron_tgdpo.config.rules import RULES
from megatron_tgdpo.config.schema import Config
from megatron_tgdpo.errors import UserError

# Above these a value is a slip, and would end in a library's error or never, unless its field says otherwise.
_LARGEST = {int: (1 << 31) - 1, float: 1e12}


def check(config: Config, source: str) -> None:
    """Checks values and how they go together.

    Raises:
        UserError: Something is out of range or contradicts something else; the message names the keys and ``source``.
    """
    for key, field, value in _values(config):
        problem = _of_its_kind(value, field.metadata.get("at_most")) or _of_its_field(value, field)
        if problem:
            raise UserError(f"{source}: {key} is {problem}")
    try:
        _ = config.datasets, config.test_sets
    except UserError as error:
        raise UserError(f"{source}: {error}") from error
    broken = first_broken(RULES, config)
    if broken:
        raise UserError(f"{source}: {broken}")


def _values(section: Any, above: str = "") -> Iterator[tuple[str, Field[Any], Any]]:
    """Dotted keys with their fields and values."""
    for field in fields(section):
        value, key = getattr(section, field.name), f"{above}{field.name}"
        if is_dataclass(value):
            yield from _values(value, f"{key}.")
        else:
            yield key, field, value


def _of_its_field(value: Any, field: Field[Any]) -> str | None:
    constraint = field.metadata.get("constraint")
    return None if value is None or constraint is None else constraint(value)


def _of_its_kind(value: Any, at_most: float | None) -> str | None:
    """What is wrong with a value, whatever its field."""
    if isinstance(value, float) and not isfinite(value):
        return f"{value}: it must be a finite number"
    if isinstance(value, (int, float)):
        most = _LARGEST.get(type(value), value) if at_most is None else at_most
        if abs(value) > most:
            return f"{value:.6g}: it must be at most {most:,}"
    if isinstance(value, str):
        if not value.strip():
            return "empty: leave it out, or give a value"
        if "${" in value:
            return f"'{value}': a value cannot contain ${{, which stands for another value"
        if any(unicodedata.category(character) in ("Cc", "Cs") for character in value):
            return f"{value!r}: a value cannot contain control characters, nor bytes that are not UTF-8"
    return None
