"""YAML as it was written: scalars stay text until somebody who knows the wanted type reads them.

YAML itself guesses types, and its versions guess differently: ``2026_11_27`` is a number in 1.1, ``012`` ten, ``1:30``
ninety, ``off`` false. Nothing is guessed here.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from megatron_tgdpo.errors import UserError, one_line

_LIMIT_BYTES = 1 << 20
_LIMIT_VALUES = 20_000
_UNTAGGED = tuple(f"tag:yaml.org,2002:{kind}" for kind in ("str", "seq", "map"))
_TOO_DEEP = "nested too deeply"


class Text(str):
    """A scalar or a key as it was written.

    Attributes:
        quoted: It was in quotes, or is a block of text: then it is never null.
        line: In its file, from 1; None if it comes from elsewhere.
    """

    quoted: bool
    line: int | None

    def __new__(cls, value: str, quoted: bool = False, line: int | None = None) -> "Text":
        text = super().__new__(cls, value)
        text.quoted, text.line = quoted, line
        return text


def read_yaml_file(path: str | Path) -> dict[str, Any]:
    """A YAML file of keys and values as nested dicts and lists of :class:`Text`, which are the keys too.

    Raises:
        UserError: It is not YAML, repeats a key, or is not a mapping; the line is named.
        OSError: Reading fails.
    """
    with open(path, "rb") as file:
        content = file.read(_LIMIT_BYTES + 1)
    if len(content) > _LIMIT_BYTES:
        raise UserError(f"{path}: more than {_LIMIT_BYTES >> 10} KiB are not a config")
    values = read_yaml(content, str(path))
    if not isinstance(values, dict):
        if isinstance(values, Text) and is_null(values):
            return {}
        raise UserError(f"{path}: not a mapping of keys to values")
    return values


def read_yaml(content: bytes | str, source: str, *, lines: bool = True) -> Any:
    """One YAML document as nested dicts and lists of :class:`Text`.

    Args:
        content: The document.
        source: What it is, for messages.
        lines: Whether its lines are those of a file, which messages name.

    Raises:
        UserError: It is not YAML, repeats a key, or has tags or keys that are not text; ``source`` and line are named.
    """
    try:
        node = yaml.compose(content, Loader=yaml.BaseLoader)
        return Text("") if node is None else _Reader(source, lines).read(node)
    except RecursionError as error:
        raise UserError(f"{source}: not valid YAML: {_TOO_DEEP}") from error
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = f"{source}:{mark.line + 1}" if mark and lines else source
        raise UserError(
            f"{place}: not valid YAML: {', '.join(filter(None, (error.problem, error.context)))}"
        ) from error
    except (yaml.YAMLError, ValueError, OverflowError) as error:  # the last two: escapes that PyYAML does not check
        raise UserError(f"{source}: not valid YAML: {one_line(error)}") from error


def is_null(value: Any) -> bool:
    """Whether a value, read or plain, is none."""
    return value is None or (
        isinstance(value, Text) and not value.quoted and value in ("", "~", "null", "Null", "NULL")
    )


def line_of(value: Any) -> int | None:
    """The line of a scalar, or of the first one within."""
    if isinstance(value, Text):
        return value.line
    inner: Any = next(iter(value), None) if isinstance(value, (dict, list)) else None
    return line_of(inner) if inner is not None else None


class _Reader:
    """Turns nodes into values, with care for aliases: they can form circles, and grow without bound."""

    def __init__(self, source: str, lines: bool):
        self.source, self.lines = source, lines
        self.open: set[int] = set()
        self.count = 0

    def read(self, node: yaml.Node) -> Any:
        self.count += 1
        if self.count > _LIMIT_VALUES:
            raise self._error(node, f"more than {_LIMIT_VALUES:,} values are not a config")
        if node.tag not in _UNTAGGED:
            raise self._error(node, f"the tag {node.tag} is not read: write the value alone")
        if isinstance(node, yaml.ScalarNode):
            return Text(node.value, node.style is not None, self._line(node))
        if id(node) in self.open:
            raise self._error(node, "an alias refers to what it is part of")
        self.open.add(id(node))
        value = dict(self._pairs(node)) if isinstance(node, yaml.MappingNode) else [self.read(i) for i in node.value]
        self.open.remove(id(node))
        return value

    def _pairs(self, node: yaml.MappingNode) -> Iterator[tuple[Text, Any]]:
        """Keys and values; those merged by ``<<`` first, so that the mapping's own replace them."""
        seen: dict[str, Text] = {}
        own = []
        for key_node, value_node in node.value:
            key = self.read(key_node) if isinstance(key_node, yaml.ScalarNode) else None
            if key is None:
                raise self._error(key_node, "a key must be text")
            if key in seen:
                where = f", in lines {seen[key].line} and {key.line}" if self.lines else ""
                raise UserError(f"{self.source}: {key} is set twice{where}")
            seen[key] = key
            if key == "<<" and not key.quoted:
                yield from self._merged(value_node)
            else:
                own.append((key, value_node))
        for key, value_node in own:
            yield key, self.read(value_node)

    def _merged(self, node: yaml.Node) -> Iterator[tuple[Text, Any]]:
        mappings = list(reversed(node.value)) if isinstance(node, yaml.SequenceNode) else [node]
        for mapping in mappings:  # of several, the first wins
            merged = self.read(mapping) if isinstance(mapping, yaml.MappingNode) else None
            if merged is None:
                raise self._error(node, "<< takes a mapping, or a list of mappings")
            yield from merged.items()

    def _line(self, node: yaml.Node) -> int | None:
        return node.start_mark.line + 1 if self.lines else None

    def _error(self, node: yaml.Node, message: str) -> UserError:
        return UserError(f"{self.source}{f':{self._line(node)}' * self.lines}: {message}")
