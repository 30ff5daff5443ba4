"""What became of a dataset's records, for people: in full after preprocessing, in a line at the start of training."""

from collections.abc import Mapping
from typing import Any

# A response that is cut loses the token that ends it; of this part of them on, people are warned.
LOST_ENDS_WARNING = 0.05


def summary(name: str, manifest: Mapping[str, Any]) -> str:
    """A manifest in a few readable lines."""
    lines = [
        f"{name}: {manifest['pairs']:,} pairs, {manifest['lengths']['pair']['total']:,} tokens in pairs",
        f"dropped: {_dropped(manifest)}",
        f"truncated: {_truncated(manifest) or 'nothing'}",
        f"{'tokens':<10}{'min':>8}{'median':>9}{'mean':>9}{'p95':>9}{'max':>8}",
    ]
    for column, found in manifest["lengths"].items():
        middle = f"{found['median']:>9.0f}{found['mean']:>9.1f}{found['p95']:>9.0f}"
        lines.append(f"{column:<10}{found['min']:>8}{middle}{found['max']:>8}")
    return "\n".join(lines)


def summary_line(name: str, manifest: Mapping[str, Any]) -> str:
    """A manifest in one line."""
    pair = manifest["lengths"]["pair"]
    return (
        f"{name}: {manifest['pairs']:,} pairs of {pair['median']:.0f} tokens (median; {pair['max']:,} at most), "
        f"dropped {_dropped(manifest)}, cut {_truncated(manifest) or '0'}"
    )


def _dropped(manifest: Mapping[str, Any]) -> str:
    dropped = manifest["dropped"]
    reasons = ", ".join(f"{reason} {count:,}" for reason, count in dropped.items())
    return f"{sum(dropped.values()):,}" + (f" ({reasons})" if reasons else "")


def _truncated(manifest: Mapping[str, Any]) -> str:
    return ", ".join(f"{what} {count:,}" for what, count in manifest["truncated"].items())


def lost_ends(truncated: Mapping[str, int], responses: int) -> tuple[int, float]:
    """How many responses lost their end token, and which part of all that is.

    Args:
        truncated: pairs by what was cut of them, as a manifest has them.
        responses: how many there are: two a pair, one of a single answer.
    """
    cut = sum(truncated.get(response, 0) for response in ("chosen", "rejected"))
    return cut, cut / max(responses, 1)


def lost_ends_warning(name: str, truncated: Mapping[str, int], responses: int, max_length: int) -> str | None:
    """What to tell people if too many responses lost their end token: see :func:`lost_ends`."""
    cut, part = lost_ends(truncated, responses)
    if part <= LOST_ENDS_WARNING:
        return None
    return (
        f"{name}: {100 * part:.1f} % of the responses ({cut:,} of {responses:,}) are cut and lose their end token: the "
        f"model learns not to end; raise max_length ({max_length}), or leave such pairs out"
    )
