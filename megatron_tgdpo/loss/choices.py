"""What the words of the loss section stand for, a row each. Without torch, so that configs are read without it."""

import pkgutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
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
            options: ``beta``, which the scores have in them already; ``gamma``; ``label_smoothing``, in [0, 0.5).

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
        margin: It has a target for the difference, ``gamma``.
    """

    loss: str
    averaged: bool = False
    pairwise: bool = True
    smoothed: bool = False
    margin: bool = False

    @property
    def loss_function(self) -> FormFunction:
        function: FormFunction = pkgutil.resolve_name(self.loss)
        return function


# By TRL's names of them (DPOConfig.loss_type).
FORMS: dict[str, Form] = {
    "sigmoid": Form("megatron_tgdpo.loss.forms:sigmoid", smoothed=True, margin=True),
    "sigmoid_norm": Form("megatron_tgdpo.loss.forms:sigmoid", averaged=True, smoothed=True, margin=True),
    "hinge": Form("megatron_tgdpo.loss.forms:hinge"),
    "ipo": Form("megatron_tgdpo.loss.forms:ipo", averaged=True),
    "robust": Form("megatron_tgdpo.loss.forms:robust", smoothed=True),
    "exo_pair": Form("megatron_tgdpo.loss.forms:exo_pair", smoothed=True),
    "nca_pair": Form("megatron_tgdpo.loss.forms:nca_pair", pairwise=False),
    "sppo_hard": Form("megatron_tgdpo.loss.forms:sppo_hard", pairwise=False),
    "apo_zero": Form("megatron_tgdpo.loss.forms:apo_zero", pairwise=False),
    "apo_down": Form("megatron_tgdpo.loss.forms:apo_down", pairwise=False),
}


class WeightFunction(Protocol):
    """What a token's log-ratio counts."""

    def __call__(
        self,
        policy_logps: "Tensor",
        token_rewards: "Tensor",
        lengths: "Tensor",
        options: Options,
        over_ranks: "Callable[[Tensor], Tensor]",
    ) -> "Tensor":
        """The weights of the tokens of one pack.

        Args:
            policy_logps: [R] token log-probs of the policy, without gradient.
            token_rewards: [R] rewards from the guide; zeros without one.
            lengths: [B] int64 response lengths, chosen and rejected alternating, adding up to R.
            options: Those that its row names.
            over_ranks: As for a loss: adds sums over the ranks that share the sequences, in place of its argument.

        Returns:
            [R] weights, without gradient.
        """


@dataclass(frozen=True)
class TokenWeights:
    """One value of ``loss.weights``.

    Attributes:
        weights: ``module:name`` of its :class:`WeightFunction`.
        options: Keys of the ``loss`` section that it uses, with their defaults.
        guided: They follow from a guide's rewards.
        selecting: Each is 0 or 1, and means over tokens are over those that have 1.
    """

    weights: str
    options: Options = field(default_factory=dict)
    guided: bool = False
    selecting: bool = False

    @property
    def weight_function(self) -> WeightFunction:
        function: WeightFunction = pkgutil.resolve_name(self.weights)
        return function


WEIGHTS: dict[str, TokenWeights] = {
    "uniform": TokenWeights("megatron_tgdpo.loss.token_weights:uniform"),
    "tgdpo": TokenWeights("megatron_tgdpo.loss.token_weights:tgdpo", {"alpha": 0.5}, guided=True),
    "sepo": TokenWeights("megatron_tgdpo.loss.token_weights:sepo", {"select_share": 0.3}, guided=True, selecting=True),
    "confpo": TokenWeights("megatron_tgdpo.loss.token_weights:confpo", selecting=True),
}
