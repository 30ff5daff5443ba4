"""The losses of TGDPO, DPO, SimPO, ORPO and SFT: pure functions of token log-probs, which import torch alone.

Legend: P pairs in the pack, B = 2P sequences, R response tokens of all sequences back to back.
Sequences lie chosen_0, rejected_0, chosen_1, rejected_1, ...; log-probs are natural logarithms (nats), float32.

Every loss is a :class:`LossFunction`: it returns the losses of one pack and the number that their sum over the global
batch is divided by. loss/methods.py has a row for each.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_tgdpo.loss.choices import FORMS, WEIGHTS, Options

OverRanks = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class PreferenceLoss:
    """What one pack yields. Only ``losses`` carries a gradient.

    Attributes:
        losses: [P] nats, to be summed over the global batch and divided by the sum of ``count``.
        count: [] int32, this pack's part of the divisor: pairs, or for SFT chosen tokens.
        weighted_margins: [P] the argument of the sigmoid, which for TGDPO and DPO is the difference of the scores,
            whatever the form; for SFT the difference of the rewards.
        rewards: [B] implicit rewards of the responses, unweighted: beta * log-ratio for TGDPO and DPO (a sum over
            tokens whatever the form, as TRL has it), beta * mean log-prob for SimPO and ORPO, mean log-prob for SFT.
        logps: [B] sum over response tokens of log pi_theta, whatever the method.
        reference_logps: [B] sum over response tokens of log pi_ref; zeros without a reference.
        guide_rewards: [B] sum over response tokens of ``token_rewards``.
        token_rewards: [R] guide_beta * (log pi_g - log pi_ref); zeros without a guide.
        token_weights: [R] the factor of each token's log-ratio; ones without a guide.
        token_logratios: [R] log pi_theta - log pi_ref; zeros without a reference.
        logratios: [B] their sums over response tokens.
    """

    losses: Tensor
    count: Tensor
    weighted_margins: Tensor
    rewards: Tensor
    logps: Tensor
    reference_logps: Tensor
    guide_rewards: Tensor
    token_rewards: Tensor
    token_weights: Tensor
    token_logratios: Tensor
    logratios: Tensor


class LossFunction(Protocol):
    """A loss: pure, without collectives of its own."""

    def __call__(
        self,
        policy_logps: Tensor,
        frozen_logps: Mapping[str, Tensor],
        lengths: Tensor,
        options: Options,
        over_ranks: OverRanks,
    ) -> PreferenceLoss:
        """The losses of one pack.

        Args:
            policy_logps: [R] token log-probs of the policy, with gradient.
            frozen_logps: [R] those of ``reference`` and ``guide``, of the roles that its row names, without gradient.
            lengths: [B] int64 response lengths, chosen and rejected alternating, adding up to R; zero pairs, and
                responses of length 0, are allowed.
            options: Those that its row names.
            over_ranks: Where the tokens of a sequence are spread over ranks, adds a tensor over them and passes its
                gradient on unchanged: every such rank computes the same losses, and brings to the gradient what its
                own tokens bring.
        """


def sum_per_sequence(values: Tensor, lengths: Tensor) -> Tensor:
    """Sums each sequence's tokens, deterministically on every device.

    Args:
        values: [R] float.
        lengths: [B] int64, response tokens of each sequence, adding up to R; zeros are allowed.

    Returns:
        [B] sums.
    """
    return torch.segment_reduce(values, "sum", lengths=lengths, unsafe=True)


def sums_per_sequence(over_ranks: OverRanks, lengths: Tensor, *token_values: Tensor) -> tuple[Tensor, ...]:
    """[B] sums over whole sequences of each of some [R] values, in one call of ``over_ranks``."""
    return over_ranks(torch.stack([sum_per_sequence(values, lengths) for values in token_values])).unbind()


def chosen_minus_rejected(values: Tensor) -> Tensor:
    """[B] of responses -> [P] of pairs."""
    return values[0::2] - values[1::2]


def count_pairs(lengths: Tensor) -> Tensor:
    """The ``count`` of a loss that is a mean over pairs."""
    return torch.tensor(lengths.numel() // 2, dtype=torch.int32, device=lengths.device)


def without_guide(policy_logps: Tensor, sums: Tensor) -> dict[str, Tensor]:
    """What :class:`PreferenceLoss` says of the guide where there is none."""
    zeros = torch.zeros_like(policy_logps)
    return {"guide_rewards": torch.zeros_like(sums), "token_rewards": zeros, "token_weights": zeros + 1.0}


def without_reference(policy_logps: Tensor, sums: Tensor) -> dict[str, Tensor]:
    """What :class:`PreferenceLoss` says of reference and guide where there is neither."""
    zeros = torch.zeros_like(sums)
    without = {"reference_logps": zeros, "logratios": zeros, "token_logratios": torch.zeros_like(policy_logps)}
    return {**without, **without_guide(policy_logps, sums)}


def on_one_rank(sums: Tensor) -> Tensor:
    """The ``over_ranks`` of a rank that holds whole sequences."""
    return sums


def tgdpo_loss(
    policy_logps: Tensor,
    frozen_logps: Mapping[str, Tensor],
    lengths: Tensor,
    options: Options,
    over_ranks: OverRanks = on_one_rank,
) -> PreferenceLoss:
    """TGDPO: ``-log sigmoid(score_chosen - score_rejected)``.

    ``score = beta * sum_t weights[t] * (log pi_theta[t] - log pi_ref[t])`` without length normalisation, and
    ``weights[t] = 1 +- alpha * guide_beta * (log pi_g[t] - log pi_ref[t])``. Options: those of :func:`dpo_loss`;
    ``alpha``, the strength of the guidance; ``guide_beta``, the scale of the guide's log-ratios, None for ``beta``.
    With other ``weights`` (loss/token_weights.py) it is another method.

    Source: arXiv 2506.14574; the exact form is that of the reference code, dvlab-research/TGDPO,
    ``src/llamafactory/train/tgdpo/trainer.py``, ``dpo_loss``, the ``sigmoid`` branch. Other forms are not theirs.
    """
    reference_logps = frozen_logps["reference"].detach()
    guide_beta = options["beta"] if options["guide_beta"] is None else options["guide_beta"]
    token_rewards = guide_beta * (frozen_logps["guide"].detach() - reference_logps)
    return _loss_of_scores(policy_logps, reference_logps, token_rewards, lengths, options, over_ranks)


def dpo_loss(
    policy_logps: Tensor,
    frozen_logps: Mapping[str, Tensor],
    lengths: Tensor,
    options: Options,
    over_ranks: OverRanks = on_one_rank,
) -> PreferenceLoss:
    """DPO, its other forms (loss/forms.py), and an SFT term if asked for.

    A pair's loss is ``form(score_chosen, score_rejected) + sft_weight * (mean NLL of the chosen response's tokens)``,
    with ``score = beta * log-ratio``. Options: ``beta``, the strength of the KL constraint; ``form``;
    ``label_smoothing``, the probability that a pair's label is wrong, in [0, 0.5); ``gamma``, by how much the scores
    should differ, of forms that have it; ``sft_weight``; ``reference_free``: log-ratios are log-probs of the policy, as
    to a reference that gives all responses the same probability; ``weights`` of the tokens, uniform for DPO itself.

    Source: arXiv 2305.18290; the SFT term is the reference code's ``pref_ftx``, LLaMA-Factory
    ``src/llamafactory/train/dpo/trainer.py``, ``get_batch_loss_metrics``, which adds
    ``pref_ftx * -(chosen log-prob / chosen tokens)`` to each pair's loss before averaging over pairs.
    """
    reference_logps = frozen_logps["reference"].detach() if "reference" in frozen_logps else None
    token_rewards = torch.zeros_like(policy_logps)
    return _loss_of_scores(policy_logps, reference_logps, token_rewards, lengths, options, over_ranks)


def _loss_of_scores(
    policy_logps: Tensor,
    reference_logps: Tensor | None,
    token_rewards: Tensor,
    lengths: Tensor,
    options: Options,
    over_ranks: OverRanks,
) -> PreferenceLoss:
    """DPO with token weights; all tensors but ``lengths`` are [R], and only ``policy_logps`` has a gradient."""
    beta, form, weights = options["beta"], FORMS[options["form"]], WEIGHTS[options["weights"]]
    token_weights = weights.weight_function(policy_logps.detach(), token_rewards, lengths, options, over_ranks)
    known = reference_logps if reference_logps is not None else torch.zeros_like(policy_logps)
    token_logratios = policy_logps - known
    compared = policy_logps if options["reference_free"] else token_logratios
    ones = torch.ones_like(known)
    counted = token_weights if weights.selecting else ones
    tokens = (token_weights * compared, token_logratios, policy_logps, known, token_rewards, ones, counted)
    scores, logratios, logps, reference, guide_rewards, *counts = sums_per_sequence(over_ranks, lengths, *tokens)
    whole_lengths, terms = (count.detach().clamp(min=1) for count in counts)
    scores = beta * (scores / terms if form.averaged else scores)
    losses = form.loss_function(scores[0::2], scores[1::2], options)
    # A term with factor 0 would turn an infinite log-prob into nan.
    if options["sft_weight"]:
        losses = losses - options["sft_weight"] * (logps / whole_lengths)[0::2]
    logps, logratios, token_logratios = logps.detach(), logratios.detach(), token_logratios.detach()
    # Without a reference nothing is known of the ratio to it.
    missing = reference_logps is None
    return PreferenceLoss(
        losses=losses,
        count=count_pairs(lengths),
        weighted_margins=chosen_minus_rejected(scores.detach()) - options["gamma"],
        rewards=beta * (logps if options["reference_free"] else logratios),
        logps=logps,
        reference_logps=reference.detach(),
        guide_rewards=guide_rewards.detach(),
        token_rewards=token_rewards,
        token_weights=token_weights,
        token_logratios=torch.zeros_like(token_logratios) if missing else token_logratios,
        logratios=torch.zeros_like(logratios) if missing else logratios,
    )


def simpo_loss(
    policy_logps: Tensor,
    frozen_logps: Mapping[str, Tensor],
    lengths: Tensor,
    options: Options,
    over_ranks: OverRanks = on_one_rank,
) -> PreferenceLoss:
    """SimPO: ``-log sigmoid(beta * mean log-prob of chosen - beta * mean log-prob of rejected - gamma)``.

    Source: arXiv 2405.14734, equation 6. ``gamma`` is the paper's target margin in nats of reward, which LLaMA-Factory
    and TRL call ``simpo_gamma`` (their ``beta * (difference - simpo_gamma / beta)`` is the same). The authors' own
    code takes the ratio ``gamma_beta_ratio = gamma / beta`` instead. Options: ``beta``, the scale of the
    length-normalised reward; ``gamma``, the margin by which chosen rewards should exceed rejected ones.
    """
    del frozen_logps
    logps, whole_lengths = sums_per_sequence(over_ranks, lengths, policy_logps, torch.ones_like(policy_logps))
    rewards = options["beta"] * logps / whole_lengths.clamp(min=1)
    margins = chosen_minus_rejected(rewards) - options["gamma"]
    return PreferenceLoss(
        losses=-F.logsigmoid(margins),
        count=count_pairs(lengths),
        weighted_margins=margins.detach(),
        rewards=rewards.detach(),
        logps=logps.detach(),
        **without_reference(policy_logps, logps),
    )


def orpo_loss(
    policy_logps: Tensor,
    frozen_logps: Mapping[str, Tensor],
    lengths: Tensor,
    options: Options,
    over_ranks: OverRanks = on_one_rank,
) -> PreferenceLoss:
    """ORPO: ``(mean NLL of chosen tokens) - beta * log sigmoid(log odds(chosen) - log odds(rejected))``.

    With p the geometric mean of a response's token probabilities, ``odds = p / (1 - p)``.

    Source: arXiv 2403.07691, equations 3 to 7; ``beta`` is the paper's lambda. The NLL is a mean over the tokens of
    each pair's chosen response and then over pairs, as in LLaMA-Factory; TRL's ORPOTrainer takes that of the prompt's
    tokens in, and one mean over all tokens of a micro batch.
    """
    del frozen_logps
    logps, whole_lengths = sums_per_sequence(over_ranks, lengths, policy_logps, torch.ones_like(policy_logps))
    means = logps / whole_lengths.clamp(min=1)
    # A response that is certain to the last bit has infinite odds; so it counts as a little less.
    below_one = means.clamp(max=-torch.finfo(means.dtype).eps)
    margins = chosen_minus_rejected(means - torch.log(-torch.expm1(below_one)))
    return PreferenceLoss(
        losses=-means[0::2] - options["beta"] * F.logsigmoid(margins),
        count=count_pairs(lengths),
        weighted_margins=margins.detach(),
        rewards=options["beta"] * means.detach(),
        logps=logps.detach(),
        **without_reference(policy_logps, logps),
    )


def sft_loss(
    policy_logps: Tensor,
    frozen_logps: Mapping[str, Tensor],
    lengths: Tensor,
    options: Options,
    over_ranks: OverRanks = on_one_rank,
) -> PreferenceLoss:
    """SFT on chosen responses: ``-log pi_theta`` of their tokens; rejected ones have no part in it.

    ``losses`` are sums per response and ``count`` is the number of chosen tokens, so that the loss of the global batch
    is the mean over its chosen tokens, as in transformers' Trainer, TRL's SFTTrainer and LLaMA-Factory's ``sft`` stage:
    every token weighs the same, and long responses more than short ones. Rejected ones may be left out with length 0,
    and then have reward 0. No options.
    """
    del frozen_logps, options
    logps, whole_lengths = sums_per_sequence(over_ranks, lengths, policy_logps, torch.ones_like(policy_logps))
    rewards = logps.detach() / whole_lengths.clamp(min=1)
    return PreferenceLoss(
        losses=-logps[0::2],
        count=whole_lengths[0::2].sum().to(torch.int32),
        weighted_margins=chosen_minus_rejected(rewards),
        rewards=rewards,
        logps=logps.detach(),
        **without_reference(policy_logps, logps),
    )
