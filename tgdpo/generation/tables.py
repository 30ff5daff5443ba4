"""Text tables."""

from collections.abc import Sequence

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
