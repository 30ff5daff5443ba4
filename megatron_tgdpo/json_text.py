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
