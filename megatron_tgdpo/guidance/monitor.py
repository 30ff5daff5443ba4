"""Whether a guide prefers what the labels prefer; if not, it may have been swapped with the reference."""

from collections.abc import Mapping

from megatron_tgdpo.intervals import wilson

# Enough that a guide which is right in 60% of all pairs hardly ever looks like one at chance.
_ENOUGH_PAIRS = 200


def guide_warning(correct: int, pairs: int, *, ties: int = 0) -> str | None:
    """A warning for a guide whose own preference accuracy is at or below chance.

    A guide's reward of a response is log pi_g - log pi_ref over its tokens; swapping guide and reference negates it,
    so that a guide which is right in 70% of the pairs is right in 30%. Give it enough pairs: of 20, a guide that is
    right in 60% of all pairs is at or below chance one time in four.

    Args:
        correct: Pairs whose chosen response has the higher reward.
        pairs: All pairs.
        ties: Pairs whose responses have the same reward.

    Returns:
        One line, or None if there is nothing to warn of.
    """
    if 2 * correct > pairs or not pairs:
        return None
    if ties == pairs:
        return f"GUIDE IS THE REFERENCE: all {pairs} pairs have equal rewards, so that TGDPO with this guide is DPO"
    share = wilson(correct, pairs)
    return (
        f"GUIDE AT OR BELOW CHANCE: it prefers the chosen response in {correct} of {pairs} pairs ({share.value:.1%}, "
        f"95% interval {share.low:.1%} to {share.high:.1%}): are guide and reference swapped, or chosen and rejected? "
        "TGDPO with it would lean towards what the labels reject"
    )


class GuideWatch:
    """Counts over the first steps of a training, and warns once, if there is reason to."""

    def __init__(self) -> None:
        self._correct = 0
        self._pairs = 0

    def count(self, values: Mapping[str, float], pairs: int) -> str | None:
        """Takes a step's metrics; returns a warning with the step that completes the count, if at all.

        Args:
            values: Metrics of the step by name; without a guide's nothing happens.
            pairs: Of the step.
        """
        if "guidance/guide_accuracy" not in values or self._pairs >= _ENOUGH_PAIRS:
            return None
        self._correct += round(values["guidance/guide_accuracy"] * pairs)
        self._pairs += pairs
        if self._pairs < _ENOUGH_PAIRS:
            return None
        return guide_warning(self._correct, self._pairs)
