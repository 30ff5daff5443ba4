"""Values as the config's fields type them, whether they come from a YAML file, from an override or as Python's own."""

import re
import types
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from math import isfinite
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import yaml

from megatron_tgdpo.config.names import suggestion
from megatron_tgdpo.errors import UserError
from megatron_tgdpo.storage.yaml_text import Text, is_null, line_of, read_yaml

_INTEGER = re.compile(r"[-+]?(0|[1-9][0-9]*(_[0-9]+)*)")
_FLOAT = re.compile(r"[-+]?([0-9]+(\.[0-9]*)?|\.[0-9]+)([eE][-+]?[0-9]+)?")
_NOT_FINITE = re.compile(r"[-+]?\.?(inf|infinity|nan)", re.IGNORECASE)
_TRUE, _FALSE = ("true", "yes", "on", "y", "1"), ("false", "no", "off", "n", "0")
_DIGITS = 300  # the longest number that is read
_SCALARS = (bool, int, float, str)
_INTERPOLATION = "${"  # OmegaConf resolves it, and converts the result to the field's type


def typed(hint: Any, value: Any, key: str, source: str) -> Any:
    """A value as a field of a type has it.

    Scalars are read by the field's type and not by their looks. For ``Any`` the rules of YAML 1.2 hold, and what YAML
    1.1 reads otherwise is refused.

    Args:
        hint: The field's type: a dataclass, ``str | None``, ``dict[str, str]`` and the like.
        value: From :mod:`megatron_tgdpo.storage.yaml_text`, or plain Python values.
        key: Dotted, for messages; empty for the whole config.
        source: File or override, for messages.

    Returns:
        Plain Python values; a dataclass as a dict of those of its fields that are given.

    Raises:
        UserError: The value is not of the type, or has a key that does not exist; the message names key and line.
    """
    return _Typing(hint, source).read(hint, value, key)


def typed_override(hint: Any, override: str) -> dict[str, Any]:
    """What ``section.key=value`` sets, nested and typed as :func:`typed` does.

    A field of text takes the value as it is; a list or a mapping is written as in YAML.

    Raises:
        UserError: It has not this form, its key does not exist or its value has another type.
    """
    source = f"override '{override}'"
    name, equals, text = override.partition("=")
    if not (equals and name.strip()):
        raise UserError(f"{source} is not of the form section.key=value")
    name = name.strip()
    path = name.split(".")
    typing = _Typing(hint, source)
    for depth in range(len(path)):
        hint = typing.inner(_arms(hint), Text(".".join(path[: depth + 1])))
    value = typing.read(hint, _override_value(hint, text, source), name)
    for part in reversed(path):
        value = {part: value}
    result: dict[str, Any] = value
    return result


def merged(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    """Nested values with others laid over them."""
    result = dict(below)
    for key, value in above.items():
        mine = result.get(key)
        result[key] = merged(mine, value) if isinstance(mine, Mapping) and isinstance(value, Mapping) else value
    return result


def known(section: Any, values: Mapping[str, Any]) -> dict[str, Any]:
    """Nested values without the keys that a dataclass does not have."""
    inner = field_types(section)
    return {
        key: known(inner[key], value) if is_dataclass(inner[key]) and isinstance(value, Mapping) else value
        for key, value in values.items()
        if key in inner
    }


def field_types(section: type) -> dict[str, Any]:
    """Types of a dataclass's fields. ``metadata={"type": ...}`` names one that OmegaConf cannot, whose field is Any."""
    hints = get_type_hints(section)
    return {field.name: field.metadata.get("type", hints[field.name]) for field in fields(section)}


def _override_value(hint: Any, text: str, source: str) -> Any:
    arms = _arms(hint)
    structured = any(not _is_scalar(arm) for arm in arms)
    if structured and ((Any not in arms and str not in arms) or text.lstrip()[:1] in ("[", "{")):
        return read_yaml(text, source, lines=False)
    if len(text) > 1 and text[0] == text[-1] and text[0] in "'\"":
        inner = read_yaml(text, source, lines=False)
        if isinstance(inner, Text) and inner.quoted:
            return Text(inner, quoted=True)
    return Text(text if str in arms else text.strip())


class _Typing:
    def __init__(self, root: Any, source: str):
        self.root, self.source = root, source

    def read(self, hint: Any, value: Any, key: str) -> Any:
        arms = _arms(hint)
        section = next((arm for arm in arms if is_dataclass(arm)), None)
        if is_null(value):
            if type(None) in arms or Any in arms:
                return None
            if section is not None:
                return {}
            raise self.error(value, key, f"is null: it must be {_describe(arms)}")
        if isinstance(value, dict):
            return self._mapping(arms, value, key)
        if isinstance(value, (list, tuple)):
            return self._sequence(arms, value, key)
        return self._scalar(arms, value, key)

    def inner(self, arms: tuple[Any, ...], key: Text) -> Any:
        """The type of what a key, dotted, names within a value of a type."""
        above, _, leaf = key.rpartition(".")
        for arm in arms:
            if is_dataclass(arm):
                inner = field_types(arm)  # type: ignore[arg-type]
                if leaf not in inner:
                    raise self.error(key, key, f"no such key{suggestion(key, _all_keys(self.root))}")
                return inner[leaf]
            if arm is Any or arm is dict:
                return Any
            if get_origin(arm) is dict:
                return get_args(arm)[1]
        raise self.error(key, key, f"no such key; {above} is {_describe(arms)}")

    def _mapping(self, arms: tuple[Any, ...], value: dict[Any, Any], key: str) -> dict[str, Any]:
        if not any(is_dataclass(arm) or arm in (Any, dict) or get_origin(arm) is dict for arm in arms):
            raise self.error(value, key, f"has keys of its own: it must be {_describe(arms)}")
        found = {}
        for name, inner in value.items():
            if not isinstance(name, str):
                raise self.error(value, key, f"has the key {name!r}: it must be text")
            dotted = Text(f"{key}.{name}" if key else name, line=line_of(name))
            found[str(name)] = self.read(self.inner(arms, dotted), inner, dotted)
        return found

    def _sequence(self, arms: tuple[Any, ...], value: Any, key: str) -> list[Any]:
        for arm in arms:
            if arm in (Any, list) or get_origin(arm) in (list, tuple):
                item = (get_args(arm) or (Any,))[0]
                return [self.read(item, inner, f"{key}[{number}]") for number, inner in enumerate(value)]
        raise self.error(value, key, f"is a list: it must be {_describe(arms)}")

    def _scalar(self, arms: tuple[Any, ...], value: Any, key: str) -> Any:
        if not isinstance(value, _SCALARS):
            raise self.error(value, key, f"is a {type(value).__name__}: it must be {_describe(arms)}")
        if Any in arms:
            return self._untyped(value, key) if isinstance(value, Text) else value
        text = str(value).lower() if isinstance(value, bool) else str(value)
        if str in arms or _INTERPOLATION in text:
            return text
        for arm in arms:
            if get_origin(arm) is Literal and text in get_args(arm):
                return text
        for kind in (bool, int, float):
            if kind in arms and not (isinstance(value, bool) and kind is not bool):
                number = self._number(kind, text.strip(), value, key, arms)
                if number is not None:
                    return number
        raise self.error(value, key, f"is '{_short(text)}': it must be {_describe(arms)}")

    def _number(self, kind: type, text: str, value: Any, key: str, arms: tuple[Any, ...]) -> bool | int | float | None:
        if kind is bool:
            return True if text.lower() in _TRUE else False if text.lower() in _FALSE else None
        if len(text) > _DIGITS:
            return None
        if _INTEGER.fullmatch(text):
            whole = int(text)
            return whole if kind is int else self._finite(whole, value, key)
        if kind is float and _FLOAT.fullmatch(text):
            return self._finite(text, value, key)
        if kind is float and _NOT_FINITE.fullmatch(text):
            raise self.error(value, key, f"is {text}: it must be a finite number")
        return None

    def _finite(self, number: Any, value: Any, key: str) -> float:
        result = float(number)
        if not isfinite(result):
            raise self.error(value, key, f"is {_short(str(value))}: the number is too large")
        return result

    def _untyped(self, text: Text, key: str) -> Any:
        """By the rules of YAML 1.2, where those of 1.1 agree."""
        if text.quoted or _INTERPOLATION in text:
            return str(text)
        if text in ("true", "True", "TRUE", "false", "False", "FALSE"):
            return text[0] in "tT"
        if len(text) <= _DIGITS:
            if _INTEGER.fullmatch(text) and "_" not in text:
                return int(text)
            if _FLOAT.fullmatch(text) and not re.fullmatch(r"[-+]?0[0-9]+", text):
                return self._finite(text, text, key)
        if _tag_of_yaml_1_1(text) != "tag:yaml.org,2002:str":
            raise self.error(
                text,
                key,
                f"is '{_short(text)}', which YAML's versions read differently: write true, false or a decimal number, "
                "or put it in quotes if it is text",
            )
        return str(text)

    def error(self, value: Any, key: str, message: str) -> UserError:
        line = line_of(value)
        place = self.source if line is None else f"{self.source}:{line}"
        return UserError(f"{place}: {_short(key)}{':' * message.startswith('no such')} {message}")


def _all_keys(section: Any, above: str = "") -> list[str]:
    if not is_dataclass(section):
        return [above.removesuffix(".")]
    return [key for name, hint in field_types(section).items() for key in _all_keys(hint, f"{above}{name}.")]  # type: ignore[arg-type]


def _tag_of_yaml_1_1(text: str) -> str:
    result: str = yaml.SafeLoader("").resolve(yaml.ScalarNode, text, (True, False))  # type: ignore[no-untyped-call]
    return result


def _arms(hint: Any) -> tuple[Any, ...]:
    return get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)


def _is_scalar(arm: Any) -> bool:
    return arm in _SCALARS or arm is type(None) or get_origin(arm) is Literal


def _describe(arms: tuple[Any, ...]) -> str:
    words = []
    for arm in arms:
        if is_dataclass(arm) or arm is dict or get_origin(arm) is dict:
            words.append("a mapping of keys to values")
        elif arm is list or get_origin(arm) in (list, tuple):
            words.append("a list")
        elif get_origin(arm) is Literal:
            words += map(str, get_args(arm))
        else:
            words.append(_KINDS.get(arm, str(arm)))
    return " or ".join(words)


_KINDS = {
    bool: "true or false",
    int: "a whole number (decimal)",
    float: "a number",
    str: "text (in quotes if null is meant as text)",
    type(None): "null",
}


def _short(text: str) -> str:
    return text if len(text) <= 60 else f"{text[:57]}..."
