"""Forward passes through the pipeline without a loss, as for token log-probs alone."""

from collections.abc import Callable, Iterator, Sequence
from itertools import tee
from typing import Any

import torch
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.process_groups_config import ProcessGroupCollection

from megatron_tgdpo.batching.collate import PreferenceBatch
from megatron_tgdpo.frozen.colocated import TokenLogps
from megatron_tgdpo.frozen.communicator import ColocatedCommunicator


def forward_logps(
    chunks: Sequence[torch.nn.Module],
    batches: Sequence[PreferenceBatch],
    communicator: ColocatedCommunicator | None,
    pg: ProcessGroupCollection,
    seq_length: int,
) -> list[TokenLogps]:
    """Runs packs through the pipeline for their log-probs alone; arguments as for :func:`forward_only`."""
    result: list[TokenLogps] = forward_only(_logps_step, chunks, batches, communicator, pg, seq_length)
    return result


@torch.no_grad()
def forward_only(
    step: Callable[[Iterator[PreferenceBatch], torch.nn.Module], tuple[Any, Any]],
    chunks: Sequence[torch.nn.Module],
    batches: Sequence[PreferenceBatch],
    communicator: ColocatedCommunicator | None,
    pg: ProcessGroupCollection,
    seq_length: int,
) -> list[Any]:
    """Runs packs through the pipeline, without gradients.

    Collective over the ranks of one data-parallel replica, and over tensor, context and pipeline ranks only.

    Args:
        step: Runs the next pack through a chunk; returns what it leaves, and the function that makes a result of that.
        chunks: The (wrapped) co-located model; with the interleaved schedule, its chunks on this stage.
        batches: This replica's packs, on the model's device; a multiple of the stages where they are interleaved.
        communicator: Between pipeline stages; None with one stage.
        pg: Process groups.
        seq_length: Tokens of a pack.

    Returns:
        On the last stage one result for each pack, in order; nothing elsewhere.
    """
    interleaved = len(chunks) > 1
    pipeline = {} if communicator is None else {"p2p_communicator": communicator}
    result: list[Any] = get_forward_backward_func(pp_size=pg.pp.size(), vp_size=len(chunks) if interleaved else None)(
        forward_step_func=step,
        data_iterator=list(tee(batches, len(chunks))) if interleaved else iter(batches),
        model=list(chunks),
        num_microbatches=len(batches),
        seq_length=seq_length,
        micro_batch_size=1,
        forward_only=True,
        collect_non_loss_data=True,
        pg_collection=pg,
        **pipeline,
    )
    return result


def _logps_step(batches: Iterator[PreferenceBatch], model: torch.nn.Module) -> tuple[Any, Any]:
    def collect(logps: TokenLogps, non_loss_data: bool) -> TokenLogps:
        assert non_loss_data
        return logps

    return model(next(batches)), collect
