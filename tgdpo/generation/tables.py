"""Text tables."""

from collections.abc import Mapping, Sequence
from typing import Any

from megatron_tgdpo.intervals import Estimate


def align(rows: Sequence[Sequence[str]]) -> str:
    """Rows as lines whose columns line up: the first to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join([row[0].ljust(widths[0]), *(cell.rjust(w) for cell, w in zip(row[1:], widths[1:], strict=True))])
        for row in rows
    )


def with_interval(estimate: Estimate | None, form: str) -> str:
    """A figure with its interval, such as ``+0.31 [+0.25, +0.37]``; a dash for None."""
    if estimate is None:
        return "-"
    value = form.format(estimate.value)
    if estimate.low is None or estimate.high is None:
        return value
    return f"{value} [{form.format(estimate.low)}, {form.format(estimate.high)}]"


def summary_table(values: Mapping[str, Any]) -> str:
    """A command's summary for people, a line each; what has parts, such as lengths of several kinds, part by part."""
    lines = {name.replace("_", " "): _cell(value) for name, value in values.items() if not _is_table(value)}
    for name, value in values.items():
        if _is_table(value):
            lines |= {f"{name} of {part}".replace("_", " "): _cell(of) for part, of in value.items()}
    width = max(map(len, lines))
    return "\n".join(f"{name.ljust(width)}  {cell}" for name, cell in lines.items())


def _is_table(value: Any) -> bool:
    return isinstance(value, Mapping) and all(isinstance(part, Mapping) for part in value.values())


def _cell(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {_cell(of)}" for name, of in value.items())
    return "-" if value is None else f"{value:.3g}" if isinstance(value, float) and abs(value) < 100 else f"{value:.0f}"
