"""The identity policy == reference, checked at the first step of a run."""

import logging
import math
from collections.abc import Sequence

from torch import Tensor

from megatron_tgdpo.batching.collate import PreferenceBatch
from megatron_tgdpo.errors import AgreedError
from megatron_tgdpo.frozen.forward_logps import forward_logps
from megatron_tgdpo.loss.forms import loss_at_reference
from megatron_tgdpo.models.logp_tolerance import DRAWS, NEGLIGIBLE, LogpDifference, logp_difference, rounding_noise
from megatron_tgdpo.output.metrics import StepMetrics
from megatron_tgdpo.setup.engine import Engine, policy_chunks

logger = logging.getLogger(__name__)


def check_start(engine: Engine, packs: Sequence[PreferenceBatch], metrics: StepMetrics) -> None:
    """Checks that policy and reference gave the same log-probs: then every pair's loss is ln 2 (or what its form has
    there, :func:`~megatron_tgdpo.loss.forms.loss_at_reference`). Collective.

    Only where they did not, up to what fp32 leaves, the policy's rounding is measured, in a few forward passes.

    Args:
        engine: That has just run the first step.
        packs: This data rank's packs of that step.
        metrics: Of that step.

    Raises:
        AgreedError: They differ by more than rounding explains, so a checkpoint, mask, pack or layout is wrong, or the
            policy differs on purpose.
    """
    found, loss = metrics.difference, _loss_at_reference(engine)
    if found.within(NEGLIGIBLE):
        so = "" if loss is None else f", so loss is {loss} and accuracy 0, as ties are wrong"
        logger.info("step 1: policy and reference are the same%s", so)
        return
    allowed = policy_rounding(engine, packs).allowing()
    if not found.within(allowed):
        raise AgreedError(
            f"step 1: {'' if loss is None else f'the loss is not {loss}, since '}policy and reference disagree before "
            f"training: their log-probs of a token differ by up to {found} nats, and rounding explains {allowed}: "
            "check model.policy, model.reference and the guidance cache, or set train.check_start=false if policy and "
            "reference differ on purpose"
        )
    logger.info("step 1: log-probs of policy and reference differ by up to %s nats: rounding", found)


def _loss_at_reference(engine: Engine) -> str | None:
    """Of every pair; None where it differs between pairs."""
    loss = loss_at_reference(engine.loss.options)
    if loss is None:
        return None
    return "ln 2" if math.isclose(loss, math.log(2)) else f"{loss:.6g}"


def policy_rounding(engine: Engine, packs: Sequence[PreferenceBatch]) -> LogpDifference:
    """How much the policy's log-probs on these packs answer to one unit of rounding. Collective over all ranks."""
    pg, batches = engine.pg, [pack.to(engine.device) for pack in packs]
    arguments = (engine.chunks, batches, engine.communicator, pg, engine.pack_format.tokens)
    plain = forward_logps(*arguments)
    parts: list[tuple[Tensor, Tensor]] = []
    for draw in range(DRAWS):
        with rounding_noise(policy_chunks(engine), engine.device, draw):
            noisy = forward_logps(*arguments)
        parts += [
            (disturbed.policy - undisturbed.policy, batch.response_lengths)
            for batch, undisturbed, disturbed in zip(batches, plain, noisy, strict=False)
        ]
    return logp_difference(parts if pg.tp.rank() == 0 else [], engine.device, pg.cp)
