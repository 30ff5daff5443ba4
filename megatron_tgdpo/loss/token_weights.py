"""What each token's log-ratio counts: a pure function for each value of ``loss.weights``.

Legend: R response tokens, B = 2P responses. No weight carries a gradient: it says how much a token counts, and is not
what the loss is lowered by.

Not here: TIS-DPO (arXiv 2410.04350), whose weights need two contrastive models beside the reference, and TDPO (arXiv
2404.11999), which is no weighting: it adds a divergence of whole distributions to the margin.
"""

import torch
from torch import Tensor

from megatron_tgdpo.loss.choices import Options
from megatron_tgdpo.loss.preference import OverRanks, sums_per_sequence


def uniform(
    policy_logps: Tensor, token_rewards: Tensor, lengths: Tensor, options: Options, over_ranks: OverRanks
) -> Tensor:
    """DPO's: every token counts 1."""
    del token_rewards, lengths, options, over_ranks
    return torch.ones_like(policy_logps)


def tgdpo(
    policy_logps: Tensor, token_rewards: Tensor, lengths: Tensor, options: Options, over_ranks: OverRanks
) -> Tensor:
    """TGDPO's: 1 + alpha * reward on chosen responses, 1 - alpha * reward on rejected ones.

    Option ``alpha``: strength of the guidance. Source: see :func:`~megatron_tgdpo.loss.preference.tgdpo_loss`.
    """
    del policy_logps, over_ranks
    return 1.0 + float(options["alpha"]) * toward_label(token_rewards, lengths)


def sepo(
    policy_logps: Tensor, token_rewards: Tensor, lengths: Tensor, options: Options, over_ranks: OverRanks
) -> Tensor:
    """SePO's: 1 on the ``select_share`` of a response's tokens whose rewards tell most, 0 on the others.

    These are the highest rewards of a chosen response and the lowest of a rejected one: of n tokens
    ``floor(select_share * n)``, but at least one, and all that are equal to the last of them.

    Source: arXiv 2408.13518: the token score is ``log pi_oracle - log pi_ref`` and the indicator that of the
    highest k % (lowest, of rejected) in the response; the authors' ``token_score.py`` rounds down likewise. Its loss is
    ``form: sigmoid_norm`` with ``reference_free``: ``beta`` is its gamma, and ``gamma`` its lambda.
    """
    del policy_logps
    rewards = toward_label(token_rewards, lengths)
    (whole_lengths,) = sums_per_sequence(over_ranks, lengths, torch.ones_like(rewards))
    # Less than a token, against shares that float64 does not have: 0.7 * 10 is 7.
    wanted = (options["select_share"] * whole_lengths.double() + 1e-6).floor().clamp(min=1)
    # A reward that is not a number leaves no weight that is one.
    return _are_largest(rewards, wanted, lengths, over_ranks).to(rewards.dtype) + 0.0 * rewards


def confpo(
    policy_logps: Tensor, token_rewards: Tensor, lengths: Tensor, options: Options, over_ranks: OverRanks
) -> Tensor:
    """ConfPO's: 1 on tokens of which the policy is less sure than of the response's on average, 0 on the others.

    A token counts where its probability is at most the mean of all probabilities in its response.

    Source: arXiv 2506.08712: ``s(y_i) = 1[pi(y_i) <= tau]``, tau the mean probability. The authors' code
    (``cpo_loss_confpo``) has < and leaves out a pair without such tokens, as of one token. Its loss is
    ``form: sigmoid_norm`` with ``reference_free``, ``beta`` and ``gamma`` being SimPO's.
    """
    del token_rewards, options
    probabilities = policy_logps.exp()
    total, whole_lengths = sums_per_sequence(over_ranks, lengths, probabilities, torch.ones_like(probabilities))
    # Of equal probabilities the mean may be rounded below them.
    threshold = total / whole_lengths.clamp(min=1) * (1.0 + 1e-6)
    return (probabilities <= _per_token(threshold, lengths, policy_logps)).to(policy_logps.dtype)


def toward_label(token_rewards: Tensor, lengths: Tensor) -> Tensor:
    """[R] rewards of chosen responses as they are, those of rejected ones with the other sign, without gradient."""
    signs = torch.ones_like(lengths, dtype=token_rewards.dtype)
    signs[1::2] = -1.0
    return _per_token(signs, lengths, token_rewards) * token_rewards.detach()


def _per_token(values: Tensor, lengths: Tensor, tokens: Tensor) -> Tensor:
    """[B] of responses -> [R] of their tokens, as many as ``tokens`` has."""
    return values.repeat_interleave(lengths, output_size=tokens.numel())


def _are_largest(values: Tensor, wanted: Tensor, lengths: Tensor, over_ranks: OverRanks) -> Tensor:
    """[R] bool: whether a token's value is among the ``wanted`` [B] largest of its response, ties included.

    The last of these is found in the order of float32 bits, eight at a time, since of tokens on other ranks only sums
    can be had: four of [B, 256] counts.
    """
    bits = values.float().view(torch.int32).long()
    # In the order of the values, from 0: a negative number's bits are its sign and its size.
    keys = torch.where(bits < 0, -(bits & 0x7FFFFFFF), bits) + (1 << 31)
    last, missing = torch.zeros_like(lengths), wanted
    response = _per_token(torch.arange(len(lengths), device=keys.device), lengths, keys)
    for shift in (24, 16, 8, 0):
        # Tokens whose bits so far are those of the last one.
        alike = (keys >> (shift + 8) == last[response]).to(torch.float32)
        counts = alike.new_zeros(len(lengths) * 256)
        counts.index_add_(0, response * 256 + (keys >> shift & 255), alike)
        # With these bits or higher ones, by the bits.
        least = over_ranks(counts.view(-1, 256)).flip(1).cumsum(1).flip(1)
        here = ((least >= missing[:, None]).sum(1) - 1).clamp(min=0)
        higher = torch.cat((least[:, 1:], torch.zeros_like(least[:, :1])), 1)
        missing = missing - higher.gather(1, here[:, None]).squeeze(1)
        last = last * 256 + here
    return keys >= last[response]
