"""What each training method needs: its options and their defaults, its frozen models, and which metrics it has."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Method:
    """One value of ``loss.method``; its loss is the function of that name in ``loss/preference.py``.

    Attributes:
        options: Keys of the ``loss`` section that it uses, with their defaults.
        frozen: Roles of the frozen models whose log-probs it uses.
        without: Beginnings of the names of metrics that mean nothing for it.
        chosen_only: Rejected responses have no part in it.
    """

    options: dict[str, float]
    frozen: tuple[str, ...]
    without: tuple[str, ...]
    chosen_only: bool = False


_REFERENCE = "logps/reference_"
_GUIDE = "guidance/"

METHODS = {
    "tgdpo": Method({"beta": 0.1, "alpha": 0.5}, ("reference", "guide"), ()),
    "dpo": Method({"beta": 0.1, "label_smoothing": 0.0, "sft_weight": 0.0}, ("reference",), (_GUIDE,)),
    "simpo": Method({"beta": 2.0, "gamma": 1.0}, (), (_GUIDE, _REFERENCE)),
    "sft": Method({}, (), (_GUIDE, _REFERENCE, "rewards/", "margins/", "logps/rejected"), chosen_only=True),
}
