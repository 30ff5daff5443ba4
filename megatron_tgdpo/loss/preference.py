"""The losses of TGDPO, DPO, SimPO and SFT: pure functions of token log-probs. Imports torch and nothing else.

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

OverRanks = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class PreferenceLoss:
    """What one pack yields. Only ``losses`` carries a gradient.

    Attributes:
        losses: [P] nats, to be summed over the global batch and divided by the sum of ``count``.
        count: [] int32, this pack's part of the divisor: pairs, or for SFT chosen tokens.
        weighted_margins: [P] the argument of the sigmoid, or for SFT the difference of the rewards.
        rewards: [B] implicit rewards of the responses, unweighted: beta * log-ratio for TGDPO and DPO, beta * mean
            log-prob for SimPO, mean log-prob for SFT.
        logps: [B] sum over response tokens of log pi_theta, whatever the method.
        reference_logps: [B] sum over response tokens of log pi_ref; zeros without a reference.
        guide_rewards: [B] sum over response tokens of ``token_rewards``.
        token_rewards: [R] beta * (log pi_g - log pi_ref); zeros without a guide.
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
        options: Mapping[str, float],
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


def guidance_token_weights(token_rewards: Tensor, lengths: Tensor, alpha: float) -> Tensor:
    """Weights of TGDPO: 1 + alpha * reward on chosen responses, 1 - alpha * reward on rejected ones.

    Args:
        token_rewards: [R] rewards from the guide.
        lengths: [B] int64 response lengths, chosen and rejected alternating.
        alpha: Strength of the guidance.

    Returns:
        [R] weights, without gradient.
    """
    signs = torch.ones_like(lengths, dtype=token_rewards.dtype)
    signs[1::2] = -1.0
    return 1.0 + alpha * signs.repeat_interleave(lengths, output_size=token_rewards.numel()) * token_rewards.detach()


def on_one_rank(sums: Tensor) -> Tensor:
    """The ``over_ranks`` of a rank that holds whole sequences."""
    return sums


def tgdpo_loss(
    policy_logps: Tensor,
    frozen_logps: Mapping[str, Tensor],
    lengths: Tensor,
    options: Mapping[str, float],
    over_ranks: OverRanks = on_one_rank,
) -> PreferenceLoss:
    """TGDPO: ``-log sigmoid(score_chosen - score_rejected)``.

    ``score = beta * sum_t weights[t] * (log pi_theta[t] - log pi_ref[t])`` without length normalisation. Options:
    ``beta``, the strength of the KL constraint; ``alpha``, that of the guidance.

    Source: arXiv 2506.14574; the exact form is that of the reference code, dvlab-research/TGDPO,
    ``src/llamafactory/train/tgdpo/trainer.py``, ``dpo_loss``, the ``sigmoid`` branch.
    """
    beta, reference_logps = options["beta"], frozen_logps["reference"].detach()
    token_logratios = policy_logps - reference_logps
    token_rewards = beta * (frozen_logps["guide"].detach() - reference_logps)
    token_weights = guidance_token_weights(token_rewards, lengths, options["alpha"])
    tokens = (token_weights * token_logratios, token_logratios, policy_logps, reference_logps, token_rewards)
    weighted, *plain = sums_per_sequence(over_ranks, lengths, *tokens)
    logratios, logps, reference, guide_rewards = (sums.detach() for sums in plain)
    margins = chosen_minus_rejected(beta * weighted)
    return PreferenceLoss(
        losses=-F.logsigmoid(margins),
        count=count_pairs(lengths),
        weighted_margins=margins.detach(),
        rewards=beta * logratios,
        logps=logps,
        reference_logps=reference,
        guide_rewards=guide_rewards,
        token_rewards=token_rewards,
        token_weights=token_weights,
        token_logratios=token_logratios.detach(),
        logratios=logratios,
    )


def dpo_loss(
    policy_logps: Tensor,
    frozen_logps: Mapping[str, Tensor],
    lengths: Tensor,
    options: Mapping[str, float],
    over_ranks: OverRanks = on_one_rank,
) -> PreferenceLoss:
    """DPO, conservative DPO with label smoothing, and an SFT term if asked for.

    With ``m = score_chosen - score_rejected`` and e the label smoothing, a pair's loss is
    ``-(1 - e) * log sigmoid(m) - e * log sigmoid(-m) + sft_weight * (mean NLL of the chosen response's tokens)``.
    Options: ``beta``, the strength of the KL constraint; ``label_smoothing``, the probability that a pair's label is
    wrong, in [0, 0.5); ``sft_weight``.

    Source: DPO, arXiv 2305.18290; conservative DPO, https://ericmitchell.ai/cdpo.pdf; the SFT term is the reference
    code's ``pref_ftx``, LLaMA-Factory ``src/llamafactory/train/dpo/trainer.py``, ``get_batch_loss_metrics``, which
    adds ``pref_ftx * -(chosen log-prob / chosen tokens)`` to each pair's loss before averaging over pairs.
    """
    label_smoothing, sft_weight = options["label_smoothing"], options["sft_weight"]
    reference_logps = frozen_logps["reference"].detach()
    token_logratios = policy_logps - reference_logps
    tokens = (token_logratios, policy_logps, reference_logps, torch.ones_like(reference_logps))
    logratios, logps, reference, whole_lengths = sums_per_sequence(over_ranks, lengths, *tokens)
    scores = options["beta"] * logratios
    margins = chosen_minus_rejected(scores)
    losses = -(1.0 - label_smoothing) * F.logsigmoid(margins)
    # Written so that terms with factor 0 do not turn an infinite log-prob into nan.
    if label_smoothing:
        losses = losses - label_smoothing * F.logsigmoid(-margins)
    if sft_weight:
        losses = losses - sft_weight * (logps / whole_lengths.clamp(min=1))[0::2]
    return PreferenceLoss(
        losses=losses,
        count=count_pairs(lengths),
        weighted_margins=margins.detach(),
        rewards=scores.detach(),
        logps=logps.detach(),
        reference_logps=reference.detach(),
        token_logratios=token_logratios.detach(),
        logratios=logratios.detach(),
        **without_guide(policy_logps, logps),
    )


def simpo_loss(
    policy_logps: Tensor,
    frozen_logps: Mapping[str, Tensor],
    lengths: Tensor,
    options: Mapping[str, float],
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


def sft_loss(
    policy_logps: Tensor,
    frozen_logps: Mapping[str, Tensor],
    lengths: Tensor,
    options: Mapping[str, float],
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
