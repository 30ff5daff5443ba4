"""The TGDPO and DPO losses: pure functions of token log-probs. Imports torch and nothing else.

Legend: P pairs in the pack, B = 2P sequences, R response tokens of all sequences back to back.
Sequences lie chosen_0, rejected_0, chosen_1, rejected_1, ...; log-probs are natural logarithms (nats), float32.

Source: TGDPO, arXiv 2506.14574; the exact form is that of the reference code, dvlab-research/TGDPO,
``src/llamafactory/train/tgdpo/trainer.py``, ``dpo_loss``, the ``sigmoid`` branch.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class PreferenceLoss:
    """What one pack yields. Only ``losses`` carries a gradient.

    Attributes:
        losses: [P] nats, to be summed over all pairs of the global batch and divided by their number.
        weighted_margins: [P] score of chosen minus score of rejected, the argument of the sigmoid.
        logratios: [B] sum over response tokens of log pi_theta - log pi_ref.
        reference_logps: [B] sum over response tokens of log pi_ref.
        guide_rewards: [B] sum over response tokens of ``token_rewards``.
        token_rewards: [R] beta * (log pi_g - log pi_ref); zeros for DPO.
        token_weights: [R] the factor of each token's log-ratio; ones for DPO.
    """

    losses: Tensor
    weighted_margins: Tensor
    logratios: Tensor
    reference_logps: Tensor
    guide_rewards: Tensor
    token_rewards: Tensor
    token_weights: Tensor


def sum_per_sequence(values: Tensor, lengths: Tensor) -> Tensor:
    """Sums each sequence's tokens, deterministically on every device.

    Args:
        values: [R] float.
        lengths: [B] int64, response tokens of each sequence, adding up to R.

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


def preference_loss(
    policy_logps: Tensor,
    reference_logps: Tensor,
    guide_logps: Tensor | None,
    lengths: Tensor,
    *,
    beta: float,
    alpha: float,
    over_ranks: Callable[[Tensor], Tensor] = lambda sums: sums,
) -> PreferenceLoss:
    """TGDPO, or DPO where there is no guide: ``-log sigmoid(score_chosen - score_rejected)``.

    ``score = beta * sum_t weights[t] * (log pi_theta[t] - log pi_ref[t])`` without length normalisation.

    Args:
        policy_logps: [R] token log-probs of the policy, with gradient.
        reference_logps: [R] of the reference; detached here.
        guide_logps: [R] of the guide, detached here, or None for DPO.
        lengths: [B] int64 response lengths, chosen and rejected alternating; zero pairs are allowed.
        beta: Strength of the KL constraint.
        alpha: Strength of the guidance; unused without a guide.
        over_ranks: Adds a tensor over the ranks that hold other tokens of the same sequences, if there are any, and
            passes its gradient on unchanged: every such rank then computes the same losses, and brings to the gradient
            what its own tokens bring.
    """
    token_logratios = policy_logps - reference_logps.detach()
    if guide_logps is None:
        token_rewards = torch.zeros_like(reference_logps)
        token_weights = torch.ones_like(reference_logps)
    else:
        token_rewards = beta * (guide_logps - reference_logps).detach()
        token_weights = guidance_token_weights(token_rewards, lengths, alpha)
    of_tokens = (token_weights * token_logratios, token_logratios.detach(), reference_logps.detach(), token_rewards)
    sums = over_ranks(torch.stack([sum_per_sequence(values, lengths) for values in of_tokens]))
    scores, (logratios, reference, guide_rewards) = beta * sums[0], sums[1:].detach()
    margins = scores[0::2] - scores[1::2]
    return PreferenceLoss(
        losses=-F.logsigmoid(margins),
        weighted_margins=margins.detach(),
        logratios=logratios,
        reference_logps=reference,
        guide_rewards=guide_rewards,
        token_rewards=token_rewards,
        token_weights=token_weights,
    )
