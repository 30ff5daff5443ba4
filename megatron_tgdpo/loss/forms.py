"""What DPO and TGDPO make of the two scores of a pair: a pure function for each value of ``loss.form``.

Legend: P pairs. A score is ``beta`` times the (weighted) log-ratio of a response, a sum over its tokens or, where the
form's row in loss/choices.py says ``averaged``, their mean. c is the score of the chosen response, r that of the
rejected one, and m = c - r.
Names, and what is not in the papers, are those of TRL 1.16 (``DPOConfig.loss_type``, ``DPOTrainer``).
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_tgdpo.loss.choices import FORMS, Options


def sigmoid(chosen: Tensor, rejected: Tensor, options: Options) -> Tensor:
    """DPO: ``-log sigmoid(m)``; with label smoothing e, ``-(1 - e) log sigmoid(m) - e log sigmoid(-m)``.

    Source: arXiv 2305.18290, equation 7; the smoothing is conservative DPO's, https://ericmitchell.ai/cdpo.pdf. Of mean
    scores it is TRL's ``sigmoid_norm``, which has no smoothing there. ``gamma`` is subtracted from m, as in SimPO.
    """
    margins, smoothing = chosen - rejected - options["gamma"], float(options["label_smoothing"])
    losses = -(1.0 - smoothing) * F.logsigmoid(margins)
    # Written so that a term with factor 0 does not turn an infinite log-prob into nan.
    return losses - smoothing * F.logsigmoid(-margins) if smoothing else losses


def hinge(chosen: Tensor, rejected: Tensor, options: Options) -> Tensor:
    """``max(0, 1 - m)``, the loss of SLiC-HF, arXiv 2305.10425, on DPO's scores."""
    del options
    return F.relu(1.0 - (chosen - rejected))


def ipo(chosen: Tensor, rejected: Tensor, options: Options) -> Tensor:
    """IPO: ``(m / beta - 1 / (2 beta))^2``; its ``beta`` is the paper's tau.

    Source: arXiv 2310.12036, equation 17. That log-ratios are means over tokens is TRL's, after the authors.
    """
    beta = float(options["beta"])
    return ((chosen - rejected) / beta - 1.0 / (2.0 * beta)).square()


def robust(chosen: Tensor, rejected: Tensor, options: Options) -> Tensor:
    """Robust DPO: ``(-(1 - e) log sigmoid(m) + e log sigmoid(-m)) / (1 - 2 e)``, unbiased for labels wrong with e.

    Source: arXiv 2403.00409, section 3. Unlike DPO's loss it is not bounded below.
    """
    margins, smoothing = chosen - rejected, float(options["label_smoothing"])
    losses = -(1.0 - smoothing) * F.logsigmoid(margins)
    return (losses + smoothing * F.logsigmoid(-margins)) / (1.0 - 2.0 * smoothing) if smoothing else losses


def exo_pair(chosen: Tensor, rejected: Tensor, options: Options) -> Tensor:
    """EXO for pairs: the divergence KL(p || q) of p = (sigmoid(m), sigmoid(-m)) from q = (1 - e, e), for e > 0.

    Source: arXiv 2402.00856, equation 16.
    """
    margins, smoothing = chosen - rejected, float(options["label_smoothing"])
    right = torch.sigmoid(margins) * (F.logsigmoid(margins) - math.log1p(-smoothing))
    return right + torch.sigmoid(-margins) * (F.logsigmoid(-margins) - math.log(smoothing))


def nca_pair(chosen: Tensor, rejected: Tensor, options: Options) -> Tensor:
    """NCA for pairs: ``-log sigmoid(c) - (log sigmoid(-c) + log sigmoid(-r)) / 2``. Source: arXiv 2402.05369."""
    del options
    return -F.logsigmoid(chosen) - 0.5 * F.logsigmoid(-chosen) - 0.5 * F.logsigmoid(-rejected)


def sppo_hard(chosen: Tensor, rejected: Tensor, options: Options) -> Tensor:
    """SPPO with hard labels: ``((c - 1/2) / beta)^2 + ((r + 1/2) / beta)^2``.

    Source: arXiv 2405.00675, equation 4.7, with a chosen response that wins for certain.
    """
    beta = float(options["beta"])
    return ((chosen - 0.5) / beta).square() + ((rejected + 0.5) / beta).square()


def apo_zero(chosen: Tensor, rejected: Tensor, options: Options) -> Tensor:
    """APO-zero: ``1 - sigmoid(c) + sigmoid(r)``, for chosen responses better than the model's own.

    Source: arXiv 2408.06266, equation 7.
    """
    del options
    return 1.0 - torch.sigmoid(chosen) + torch.sigmoid(rejected)


def apo_down(chosen: Tensor, rejected: Tensor, options: Options) -> Tensor:
    """APO-down: ``sigmoid(c) + 1 - sigmoid(m)``, for chosen responses worse than the model's own.

    Source: arXiv 2408.06266, equation 8.
    """
    del options
    return torch.sigmoid(chosen) + 1.0 - torch.sigmoid(chosen - rejected)


def loss_at_reference(options: Options) -> float | None:
    """The loss of any pair whose policy is the reference: both scores are 0. None where it is not always the same."""
    if options.get("form") is None or options["reference_free"] or options["sft_weight"]:
        return None
    score = torch.zeros(1, dtype=torch.float64)
    return float(FORMS[options["form"]].loss_function(score, score, options))
