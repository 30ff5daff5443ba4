"""Whole logits and token log-probs of short inputs, for checking a conversion; training never makes the logits.

Legend: S tokens of the row, H hidden, V vocabulary of the HF model.
"""

from dataclasses import dataclass
from itertools import accumulate, pairwise

import torch
import torch.distributed as dist
from megatron.core.process_groups_config import ProcessGroupCollection
from torch import Tensor

from megatron_tgdpo.batching.packed_sequence import PackedSequence, Segment, pack_segments
from megatron_tgdpo.loss.vocab_parallel_logps import token_logps
from megatron_tgdpo.models.language_model import LanguageModel


@dataclass(frozen=True)
class RowOutputs:
    """What the last stage makes of a row: logits [S, V], and [S] log-probs of each next token (0 after a last one)."""

    logits: Tensor
    logps: Tensor


def packing_of(lengths: list[int]) -> PackedSequence:
    """Describes sequences that lie back to back at the start of a row."""
    return pack_segments([Segment(*bounds) for bounds in pairwise(accumulate([0, *lengths]))])


@torch.no_grad()
def packed_outputs(
    model: LanguageModel, tokens: Tensor, lengths: list[int], pg: ProcessGroupCollection
) -> RowOutputs | None:
    """Runs a packed row through all pipeline stages, one after another.

    Collective over the model-parallel ranks.

    Args:
        model: This rank's slice.
        tokens: [S] int64, the same on all ranks; S a multiple of tp. What follows the sequences is padding.
        lengths: Of the sequences.
        pg: Process groups.

    Returns:
        On the last stage's ranks; None elsewhere. The log-probs are computed as training does.
    """
    hidden = _last_hidden(model, tokens, lengths, pg)
    if hidden is None:
        return None
    logits = torch.cat(_all_gather(hidden @ model.output_weight().T, pg.tp), dim=1)[:, : model.true_vocab_size]
    if model.logit_softcap is not None:
        logits = torch.tanh(logits / model.logit_softcap) * model.logit_softcap
    logps = torch.zeros(len(tokens), dtype=torch.float32, device=tokens.device)
    ends = torch.tensor(lengths).cumsum(0)
    inside = torch.ones(len(tokens), dtype=torch.bool)
    inside[ends - 1] = False
    inside[int(ends[-1]) :] = False
    positions = inside.nonzero()[:, 0].to(tokens.device)
    logps[positions] = token_logps(
        hidden[positions],
        model.output_weight(),
        tokens[positions + 1],
        vocab_size=model.true_vocab_size,
        tp_group=pg.tp,
        softcap=model.logit_softcap,
    )
    return RowOutputs(logits, logps)


def _last_hidden(model: LanguageModel, tokens: Tensor, lengths: list[int], pg: ProcessGroupCollection) -> Tensor | None:
    """[S, H] hidden states after the final norm on the last stage's ranks, None elsewhere."""
    positions = torch.cat([torch.arange(n) for n in [*lengths, len(tokens) - sum(lengths)]]).to(tokens.device)
    first_rows = len(tokens) // (pg.tp.size() if model.config.sequence_parallel else 1)
    stage, stages = pg.pp.rank(), pg.pp.size()
    if stage > 0:
        shape = (first_rows, 1, model.config.hidden_size)
        received = torch.empty(shape, dtype=model.config.params_dtype, device=tokens.device)
        dist.recv(received, dist.get_global_rank(pg.pp, stage - 1))
        model.set_input_tensor(received)
    hidden = model(tokens[None], positions[None], packing_of(lengths))
    if stage < stages - 1:
        dist.send(hidden.contiguous(), dist.get_global_rank(pg.pp, stage + 1))
        return None
    if model.config.sequence_parallel:
        hidden = torch.cat(_all_gather(hidden, pg.tp))
    result: Tensor | None = hidden[:, 0]
    return result


def _all_gather(tensor: Tensor, group: dist.ProcessGroup) -> list[Tensor]:
    # gloo sends wrong data for tensors that are not contiguous
    parts = [torch.empty_like(tensor, memory_format=torch.contiguous_format) for _ in range(group.size())]
    dist.all_gather(parts, tensor.contiguous(), group=group)
    return parts
