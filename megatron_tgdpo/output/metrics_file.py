"""``metrics.jsonl``: a JSON object a step; who reads it passes over what no run has written whole."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from megatron_tgdpo.errors import UserError
from megatron_tgdpo.storage.files import read_error
from megatron_tgdpo.storage.json_text import parse_json

METRICS_FILE = "metrics.jsonl"

# Beyond these, floats no longer count steps, and the arithmetic of charts overflows. NaN is not below either.
_MOST_STEPS, _LARGEST = 1 << 53, 1e300


def parse_line(line: bytes) -> dict[str, Any] | None:
    """A line's content; None for the last one of a run that ended while writing it, and for what no run writes."""
    try:
        content = parse_json(line) if line.endswith(b"\n") else None
    except ValueError:
        return None
    return content if isinstance(content, dict) and isinstance(content.get("step"), int) else None


def logged_steps(run: Path) -> Iterator[dict[str, float]]:
    """What a run has logged, a step at a time, as far as it is finite numbers; ``step`` counts from 1.

    Args:
        run: Its output directory.

    Raises:
        UserError: There is no such file.
        StorageError: It cannot be read.
    """
    file = run / METRICS_FILE
    try:
        with file.open("rb") as lines:
            for line in lines:
                record = parse_line(line)
                if record is not None and record["step"] < _MOST_STEPS:
                    numbers = ((name, value) for name, value in record.items() if isinstance(value, int | float))
                    yield {name: value for name, value in numbers if abs(value) < _LARGEST}
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(f"{run}: no {METRICS_FILE} there: name the output directory of a training") from None
    except OSError as error:
        raise read_error(file, error) from error
