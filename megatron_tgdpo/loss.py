"""The losses of TGDPO, DPO, SimPO and SFT: pure functions of token log-probs. Imports torch and nothing else.

Legend: P pairs in the pack, B = 2P sequences, R response tokens of all sequences back to back.
Sequences lie chosen_0, rejected_0, chosen_1, rejected_1, ...; log-probs are natural logarithms (nats), float32.

Every function returns the losses of one pack and the number that their sum over the global batch is divided by.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


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
        token_rewards: [R] beta * (log pi_g - log pi_ref); zeros without a guide.
        token_weights: [R] the factor of each token's log-ratio; ones without a guide.
    """

    losses: Tensor
    count: Tensor
    weighted_margins: Tensor
    rewards: Tensor
    logps: Tensor
    token_rewards: Tensor
    token_weights: Tensor


def sum_per_sequence(values: Tensor, lengths: Tensor) -> Tensor:
    """Sums each sequence's tokens, deterministically on every device.

    Args:
        values: [R] float.
        lengths: [B] int64, response tokens of each sequence, adding up to R; zeros are allowed.

    Returns:
        [B] sums.
    """
    return torch.segment_reduce(values, "sum", lengths=lengths, unsafe=True)


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


def tgdpo_loss(
    policy_logps: Tensor, reference_logps: Tensor, guide_logps: Tensor, lengths: Tensor, *, beta: float, alpha: float
) -> PreferenceLoss:
    """TGDPO: ``-log sigmoid(score_chosen - score_rejected)``.

    ``score = beta * sum_t weights[t] * (log pi_theta[t] - log pi_ref[t])`` without length normalisation.

    Source: arXiv 2506.14574; the exact form is that of the reference code, dvlab-research/TGDPO,
    ``src/llamafactory/train/tgdpo/trainer.py``, ``dpo_loss``, the ``sigmoid`` branch.

    Args:
        policy_logps: [R] token log-probs of the policy, with gradient.
        reference_logps: [R] of the reference; detached here.
        guide_logps: [R] of the guide; detached here.
        lengths: [B] int64 response lengths, chosen and rejected alternating; zero pairs are allowed.
        beta: Strength of the KL constraint.
        alpha: Strength of the guidance.
    """
    token_logratios = policy_logps - reference_logps.detach()
    token_rewards = beta * (guide_logps - reference_logps).detach()
    token_weights = guidance_token_weights(token_rewards, lengths, alpha)
    margins = _chosen_minus_rejected(beta * sum_per_sequence(token_weights * token_logratios, lengths))
    return PreferenceLoss(
        losses=-F.logsigmoid(margins),
        count=_pairs(lengths),
        weighted_margins=margins.detach(),
        rewards=beta * sum_per_sequence(token_logratios.detach(), lengths),
        logps=sum_per_sequence(policy_logps.detach(), lengths),
        token_rewards=token_rewards,
        token_weights=token_weights,
    )


def dpo_loss(
    policy_logps: Tensor,
    reference_logps: Tensor,
    lengths: Tensor,
    *,
    beta: float,
    label_smoothing: float = 0.0,
    sft_weight: float = 0.0,
) -> PreferenceLoss:
    """DPO, conservative DPO with label smoothing, and an SFT term if asked for.

    With ``m = score_chosen - score_rejected`` and e the label smoothing, a pair's loss is
    ``-(1 - e) * log sigmoid(m) - e * log sigmoid(-m) + sft_weight * (mean NLL of the chosen response's tokens)``.

    Source: DPO, arXiv 2305.18290; conservative DPO, https://ericmitchell.ai/cdpo.pdf; the SFT term is the reference
    code's ``pref_ftx``, LLaMA-Factory ``src/llamafactory/train/dpo/trainer.py``, ``get_batch_loss_metrics``, which
    adds ``pref_ftx * -(chosen log-prob / chosen tokens)`` to each pair's loss before averaging over pairs.

    Args:
        policy_logps: [R] token log-probs of the policy, with gradient.
        reference_logps: [R] of the reference; detached here.
        lengths: [B] int64 response lengths, chosen and rejected alternating; zero pairs are allowed.
        beta: Strength of the KL constraint.
        label_smoothing: Probability that a pair's label is wrong, in [0, 0.5).
        sft_weight: Weight of the SFT term.
    """
    token_logratios = policy_logps - reference_logps.detach()
    scores = beta * sum_per_sequence(token_logratios, lengths)
    margins = _chosen_minus_rejected(scores)
    losses = -(1.0 - label_smoothing) * F.logsigmoid(margins) - label_smoothing * F.logsigmoid(-margins)
    logps = sum_per_sequence(policy_logps, lengths)
    return PreferenceLoss(
        losses=losses - sft_weight * _per_token(logps, lengths)[0::2],
        count=_pairs(lengths),
        weighted_margins=margins.detach(),
        rewards=scores.detach(),
        logps=logps.detach(),
        token_rewards=torch.zeros_like(reference_logps),
        token_weights=torch.ones_like(reference_logps),
    )


def simpo_loss(policy_logps: Tensor, lengths: Tensor, *, beta: float, gamma: float) -> PreferenceLoss:
    """SimPO: ``-log sigmoid(beta * mean log-prob of chosen - beta * mean log-prob of rejected - gamma)``.

    Source: arXiv 2405.14734, equation 6. ``gamma`` is the paper's target margin in nats of reward, which LLaMA-Factory
    and TRL call ``simpo_gamma`` (their ``beta * (difference - simpo_gamma / beta)`` is the same). The authors' own
    code takes the ratio ``gamma_beta_ratio = gamma / beta`` instead.

    Args:
        policy_logps: [R] token log-probs of the policy, with gradient.
        lengths: [B] int64 response lengths, chosen and rejected alternating; zero pairs are allowed.
        beta: Scale of the length-normalised reward.
        gamma: Margin by which chosen rewards should exceed rejected ones.
    """
    logps = sum_per_sequence(policy_logps, lengths)
    rewards = beta * _per_token(logps, lengths)
    margins = _chosen_minus_rejected(rewards) - gamma
    return PreferenceLoss(
        losses=-F.logsigmoid(margins),
        count=_pairs(lengths),
        weighted_margins=margins.detach(),
        rewards=rewards.detach(),
        logps=logps.detach(),
        token_rewards=torch.zeros_like(policy_logps),
        token_weights=torch.ones_like(policy_logps),
    )


def sft_loss(policy_logps: Tensor, lengths: Tensor) -> PreferenceLoss:
    """SFT on chosen responses: ``-log pi_theta`` of their tokens; rejected ones have no part in it.

    ``losses`` are sums per response and ``count`` is the number of chosen tokens, so that the loss of the global batch
    is the mean over its chosen tokens, as in transformers' Trainer, TRL's SFTTrainer and LLaMA-Factory's ``sft`` stage:
    every token weighs the same, and long responses more than short ones.

    Args:
        policy_logps: [R] token log-probs of the policy, with gradient.
        lengths: [B] int64 response lengths, chosen and rejected alternating; rejected ones may be left out with
            length 0, and then have reward 0.
    """
    logps = sum_per_sequence(policy_logps, lengths)
    rewards = _per_token(logps.detach(), lengths)
    return PreferenceLoss(
        losses=-logps[0::2],
        count=lengths[0::2].sum(dtype=torch.int32),
        weighted_margins=_chosen_minus_rejected(rewards),
        rewards=rewards,
        logps=logps.detach(),
        token_rewards=torch.zeros_like(policy_logps),
        token_weights=torch.ones_like(policy_logps),
    )


def _chosen_minus_rejected(values: Tensor) -> Tensor:
    return values[0::2] - values[1::2]


def _per_token(sums: Tensor, lengths: Tensor) -> Tensor:
    return sums / lengths.clamp(min=1)


def _pairs(lengths: Tensor) -> Tensor:
    return torch.tensor(lengths.numel() // 2, dtype=torch.int32, device=lengths.device)
