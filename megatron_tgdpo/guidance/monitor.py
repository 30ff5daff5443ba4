"""Whether a guide prefers what the labels prefer; if not, it may have been swapped with the reference."""

from collections.abc import Mapping

from megatron_tgdpo.intervals import wilson

# Enough that a guide which is right in 60% of all pairs hardly ever looks like one at chance.
_ENOUGH_PAIRS = 200


def guide_warning(correct: int, pairs: int, *, ties: int = 0) -> str | None:
    """A warning for a guide whose preference accuracy is below chance, by its whole 95% interval.

    A guide's reward of a response is log pi_g - log pi_ref over its tokens; swapping guide and reference negates it,
    so that a guide which is right in 70% of the pairs is right in 30%. A tie says nothing for or against: the interval
    is of the other pairs.

    Args:
        correct: Pairs whose chosen response has the higher reward.
        pairs: All pairs.
        ties: Pairs whose responses have the same reward.

    Returns:
        One line, or None if there is nothing to warn of.
    """
    if pairs and ties == pairs:
        return f"GUIDE IS THE REFERENCE: all {pairs} pairs have equal rewards, so that TGDPO with this guide is DPO"
    if not pairs or _beside_chance(correct, pairs - ties) != "below":
        return None
    return (
        f"GUIDE BELOW CHANCE: it prefers {_share(correct, pairs, ties)}: are guide and reference swapped, or chosen "
        "and rejected? TGDPO with it would lean towards what the labels reject"
    )


def guide_doubt(correct: int, pairs: int, *, ties: int = 0) -> str | None:
    """What to say of a guide that these pairs do not tell from chance, above or below; arguments as above.

    Returns:
        One line, or None where the interval lies to one side of one half, or there is no preference at all.
    """
    if ties == pairs or _beside_chance(correct, pairs - ties) != "holds it":
        return None
    return f"Too few pairs to tell the guide from chance: it prefers {_share(correct, pairs, ties)}"


def _beside_chance(correct: int, decided: int) -> str:
    """Where the 95% interval of a share lies beside one half: ``below``, ``above``, or it ``holds it``."""
    interval = wilson(correct, decided)
    assert interval.low is not None  # Wilson's always has ends.
    assert interval.high is not None
    return "below" if interval.high < 0.5 else "above" if interval.low > 0.5 else "holds it"


def _share(correct: int, pairs: int, ties: int) -> str:
    share = wilson(correct, pairs - ties)
    tied = f"{ties} are ties; of the others " if ties else ""
    return (
        f"the chosen response in {correct} of {pairs} pairs ({tied}{share.value:.1%}, 95% interval {share.low:.1%} to "
        f"{share.high:.1%})"
    )


class GuideWatch:
    """Counts over the first steps of a training, and warns once, if there is reason to."""

    def __init__(self) -> None:
        self._correct = 0
        self._ties = 0
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
        self._ties += round(values.get("guidance/guide_ties", 0.0) * pairs)
        self._pairs += pairs
        if self._pairs < _ENOUGH_PAIRS:
            return None
        counted = {"correct": self._correct, "pairs": self._pairs, "ties": self._ties}
        return guide_warning(**counted) or guide_doubt(**counted)
