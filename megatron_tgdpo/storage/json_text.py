"""JSON from files that anybody may have changed."""

import json
from typing import Any


def parse_json(text: str | bytes) -> Any:
    """The value that a text is.

    Raises:
        ValueError: It is not JSON, not UTF-8, or nested deeper than Python reads.
    """
    try:
        return json.loads(text)
    except RecursionError as error:
        raise ValueError("nested too deeply") from error


def check_shape(value: Any, shape: Any, name: str) -> None:
    """Compares a value with what it must be like: types, dicts of them (other keys may be there too), lists of one.

    Raises:
        TypeError: It is not; the message names the place.
    """
    if isinstance(shape, dict):
        check_shape(value, dict, name)
        for key, inner in shape.items():
            if key not in value:
                raise TypeError(f"{name} lacks '{key}'")
            check_shape(value[key], inner, f"{name}.{key}")
    elif isinstance(shape, list):
        check_shape(value, list, name)
        for number, item in enumerate(value):
            check_shape(item, shape[0], f"{name}[{number}]")
    elif not isinstance(value, shape) or (isinstance(value, bool) and shape is int):
        raise TypeError(f"{name} is {str(value)[:40]!r}, not of type {getattr(shape, '__name__', shape)}")
