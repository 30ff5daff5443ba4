"""What the words of the loss section stand for, a row each. Without torch, so that configs are read without it."""

import pkgutil
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from torch import Tensor

# By name: numbers, words, switches, and None where the value follows from others.
Options = Mapping[str, Any]


class FormFunction(Protocol):
    """Scores to losses."""

    def __call__(self, chosen: "Tensor", rejected: "Tensor", options: Options) -> "Tensor":
        """The losses of some pairs.

        Args:
            chosen: [P] scores of the chosen responses, with gradient.
            rejected: [P] those of the rejected ones, with gradient.
            options: ``beta``, which the scores have in them already, and ``label_smoothing``, in [0, 0.5).

        Returns:
            [P] nats.
        """


@dataclass(frozen=True)
class Form:
    """One value of ``loss.form``: what DPO and TGDPO make of the two scores of a pair.

    Attributes:
        loss: ``module:name`` of its :class:`FormFunction`.
        averaged: A score is a mean over the response's tokens; else it is a sum.
        pairwise: Only the difference of the scores counts; else each has a value of its own against the reference.
        smoothed: It has a label smoothing.
    """

    loss: str
    averaged: bool = False
    pairwise: bool = True
    smoothed: bool = False

    @property
    def loss_function(self) -> FormFunction:
        function: FormFunction = pkgutil.resolve_name(self.loss)
        return function


# By TRL's names of them (DPOConfig.loss_type).
FORMS: dict[str, Form] = {
    "sigmoid": Form("megatron_tgdpo.loss.forms:sigmoid", smoothed=True),
    "sigmoid_norm": Form("megatron_tgdpo.loss.forms:sigmoid", averaged=True, smoothed=True),
    "hinge": Form("megatron_tgdpo.loss.forms:hinge"),
    "ipo": Form("megatron_tgdpo.loss.forms:ipo", averaged=True),
    "robust": Form("megatron_tgdpo.loss.forms:robust", smoothed=True),
    "exo_pair": Form("megatron_tgdpo.loss.forms:exo_pair", smoothed=True),
    "nca_pair": Form("megatron_tgdpo.loss.forms:nca_pair", pairwise=False),
    "sppo_hard": Form("megatron_tgdpo.loss.forms:sppo_hard", pairwise=False),
    "apo_zero": Form("megatron_tgdpo.loss.forms:apo_zero", pairwise=False),
    "apo_down": Form("megatron_tgdpo.loss.forms:apo_down", pairwise=False),
}
