"""Numbers that are read side by side, as text. ``page/data.js: decimalsOf`` is the same rule for the page."""

import math
from collections.abc import Iterable
from itertools import pairwise

_MOST_DECIMALS = 12
# Of the largest: values closer than that are one value with different rounding.
_NOISE = 1e-9


def decimals_of(values: Iterable[float], least: int = 0) -> int:
    """How many decimals tell values apart that are read side by side: the smallest gap shows to a tenth.

    The gap to 0 counts too, so that no value but 0 becomes 0.

    Args:
        values: Those that are not finite do not matter.
        least: No fewer decimals than that.
    """
    distinct = sorted({0.0, *(value for value in values if math.isfinite(value))})
    noise = _NOISE * max(abs(distinct[0]), abs(distinct[-1]))
    gap = min((b - a for a, b in pairwise(distinct) if b - a > noise), default=0.0)
    for decimals in range(least, _MOST_DECIMALS):
        if all(abs(value - round(value, decimals)) <= gap / 10 for value in distinct):
            return decimals
    return _MOST_DECIMALS
