"""What became of a dataset's records, for people: the same lines after preprocessing and at the start of training."""

from collections.abc import Mapping
from typing import Any

# A response that is cut loses the token that ends it; of this part of them on, people are warned.
LOST_ENDS_WARNING = 0.05


def summary(name: str, manifest: Mapping[str, Any]) -> str:
    """A manifest in a few readable lines."""
    dropped = manifest["dropped"]
    reasons = ", ".join(f"{reason} {count}" for reason, count in dropped.items())
    cuts = ", ".join(f"{what} {count}" for what, count in manifest["truncated"].items())
    lines = [
        f"{name}: {manifest['pairs']:,} pairs, {manifest['lengths']['pair']['total']:,} tokens in pairs",
        f"dropped: {sum(dropped.values()):,}" + (f" ({reasons})" if reasons else ""),
        f"truncated: {cuts or 'nothing'}",
        f"{'tokens':<10}{'min':>8}{'median':>9}{'mean':>9}{'p95':>9}{'max':>8}",
    ]
    for column, found in manifest["lengths"].items():
        middle = f"{found['median']:>9.0f}{found['mean']:>9.1f}{found['p95']:>9.0f}"
        lines.append(f"{column:<10}{found['min']:>8}{middle}{found['max']:>8}")
    return "\n".join(lines)


def lost_ends(manifest: Mapping[str, Any], responses: int) -> tuple[int, float]:
    """How many responses lost their end token, and which part of all that is.

    Args:
        manifest: of a dataset.
        responses: how many it has: two a pair, one of a single answer.
    """
    cut = sum(manifest["truncated"].get(response, 0) for response in ("chosen", "rejected"))
    return cut, cut / responses


def lost_ends_warning(name: str, manifest: Mapping[str, Any], responses: int) -> str | None:
    """What to tell people if too many responses lost their end token."""
    cut, part = lost_ends(manifest, responses)
    if part <= LOST_ENDS_WARNING:
        return None
    limit = manifest["options"]["max_length"]
    return (
        f"{name}: {100 * part:.1f} % of the responses ({cut:,} of {responses:,}) are cut and lose their end token, so "
        f"the model learns not to end: raise max_length (it is {limit}), or leave such pairs out"
    )
