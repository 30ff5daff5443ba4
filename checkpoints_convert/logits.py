"""Whole logits of short inputs, for checking a conversion; training never makes them.

Legend: S tokens of the row, H hidden, V vocabulary of the HF model.
"""

import torch
import torch.distributed as dist
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.process_groups_config import ProcessGroupCollection
from torch import Tensor

from megatron_tgdpo.models import LanguageModel


def packing_of(lengths: list[int]) -> PackedSeqParams:
    """Describes sequences that lie back to back at the start of a row."""
    ends = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
    longest = max(lengths, default=0)
    return PackedSeqParams(
        qkv_format="sbhd", cu_seqlens_q=ends, cu_seqlens_kv=ends, max_seqlen_q=longest, max_seqlen_kv=longest
    )


@torch.no_grad()
def packed_logits(
    model: LanguageModel, tokens: Tensor, lengths: list[int], pg: ProcessGroupCollection
) -> Tensor | None:
    """Runs a packed row through all pipeline stages, one after another.

    Collective over the model-parallel ranks.

    Args:
        model: This rank's slice.
        tokens: [S] int64, the same on all ranks; S a multiple of tp. What follows the sequences is padding.
        lengths: Of the sequences.
        pg: Process groups.

    Returns:
        [S, V] on the last stage's ranks, None elsewhere.
    """
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
    logits = torch.cat(_all_gather(hidden[:, 0] @ model.output_weight().T, pg.tp), dim=1)[:, : model.true_vocab_size]
    return logits if model.logit_softcap is None else torch.tanh(logits / model.logit_softcap) * model.logit_softcap


def _all_gather(tensor: Tensor, group: dist.ProcessGroup) -> list[Tensor]:
    # gloo sends wrong data for tensors that are not contiguous
    parts = [torch.empty_like(tensor, memory_format=torch.contiguous_format) for _ in range(group.size())]
    dist.all_gather(parts, tensor.contiguous(), group=group)
    return parts
