"""The training methods, a row each: the loss, its options and their defaults, the frozen models that it uses.

Without torch, so that configs are read without it.
"""

import pkgutil
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from megatron_tgdpo.loss.choices import WEIGHTS, Options

if TYPE_CHECKING:
    from megatron_tgdpo.loss.preference import LossFunction


@dataclass(frozen=True)
class Method:
    """One value of ``loss.method``.

    Attributes:
        loss: ``module:name`` of its :data:`~megatron_tgdpo.loss.preference.LossFunction`.
        options: Keys of the ``loss`` section that it uses, with their defaults.
        frozen: Roles of the frozen models whose log-probs it uses: ``reference``, or ``reference`` and ``guide``.
        chosen_only: Rejected responses have no part in it.
        weighted: Its tokens have weights.
    """

    loss: str
    options: Options = field(default_factory=dict)
    frozen: tuple[str, ...] = ()
    chosen_only: bool = False
    weighted: bool = False

    @property
    def loss_function(self) -> "LossFunction":
        function: LossFunction = pkgutil.resolve_name(self.loss)
        return function

    @property
    def without(self) -> tuple[str, ...]:
        """Beginnings of the names of metrics that mean nothing for it."""
        absent = [metrics for role, metrics in _METRICS_OF.items() if role not in self.frozen]
        absent += [] if self.weighted else ["guidance/weight", "guidance/negative"]
        return (*absent, *(_METRICS_OF_REJECTED if self.chosen_only else ()))

    def given(self, options: Options) -> "Method":
        """The row with values of ``weights`` and ``reference_free``: the other options, and the models needed then."""
        # A guide's rewards are log-ratios to the reference, whatever the policy's are.
        row = replace(self, frozen=()) if options.get("reference_free") and "guide" not in self.frozen else self
        usual, asked = self.options.get("weights"), options.get("weights")
        if usual is None or asked in (None, usual) or asked not in WEIGHTS:
            return row
        others = {name: value for name, value in self.options.items() if name not in WEIGHTS[usual].options}
        return replace(row, options={**others, **WEIGHTS[asked].options}, weighted=asked != "uniform")


_METRICS_OF = {"guide": "guidance/guide_", "reference": "logps/reference_"}
_METRICS_OF_REJECTED = ("rewards/", "margins/", "logps/rejected")
# Of DPO and of TGDPO, whose loss is DPO's with token weights.
_DPO = {
    "beta": 0.1, "form": "sigmoid", "reference_free": False, "label_smoothing": 0.0, "sft_weight": 0.0, "gamma": 0.0,
}  # fmt: skip

METHODS: dict[str, Method] = {
    "tgdpo": Method(
        "megatron_tgdpo.loss.preference:tgdpo_loss",
        {**_DPO, "guide_beta": None, "weights": "tgdpo", **WEIGHTS["tgdpo"].options},
        frozen=("reference", "guide"),
        weighted=True,
    ),
    "dpo": Method("megatron_tgdpo.loss.preference:dpo_loss", {**_DPO, "weights": "uniform"}, frozen=("reference",)),
    "simpo": Method("megatron_tgdpo.loss.preference:simpo_loss", {"beta": 2.0, "gamma": 1.0}),
    "orpo": Method("megatron_tgdpo.loss.preference:orpo_loss", {"beta": 0.1}),
    "sft": Method("megatron_tgdpo.loss.preference:sft_loss", chosen_only=True),
}

# Those whose policy can be a guide: it must be there before there is one.
GUIDE_METHODS = tuple(name for name, method in METHODS.items() if "guide" not in method.frozen)
