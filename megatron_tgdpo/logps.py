"""Token log-probs from hidden states and a vocabulary-parallel output weight, without the logits of a sequence.

Legend: S_local tokens on this rank, H hidden, R response tokens, V vocabulary rows on this rank. Padded vocabulary rows
never take part: each rank's weight is cut to its rows below the true vocabulary size first.
"""

from typing import Any

import torch
import torch.distributed as dist
from megatron.core.tensor_parallel import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
)
from torch import Tensor

# Elements of the one logits buffer (fp32: 128 MiB): wide enough to keep the matrix units busy, and for a vocabulary of
# 128,256 a sixteenth of what the logits of 4,096 tokens take.
CHUNK_ELEMENTS = 2**25

_MM_HAS_OUT_DTYPE = tuple(int(part) for part in torch.__version__.split(".")[:2]) >= (2, 8)


def response_hidden(
    hidden: Tensor, logit_positions: Tensor, *, sequence_parallel: bool, tp_group: dist.ProcessGroup
) -> Tensor:
    """Picks the hidden states that predict response tokens, whole on every tensor rank.

    Args:
        hidden: [S_local, 1, H] of the last stage; S_local = S / tp under sequence parallelism.
        logit_positions: [R] int64 positions in the whole row.
        sequence_parallel: Whether ``hidden`` is split along the sequence.
        tp_group: Tensor-parallel group. Forward: all-gather under sequence parallelism, else nothing. Backward:
            reduce-scatter, or all-reduce, of the ranks' partial gradients.

    Returns:
        [R, H].
    """
    if sequence_parallel:
        whole = gather_from_sequence_parallel_region(hidden, tensor_parallel_output_grad=True, group=tp_group)
        return whole[:, 0].index_select(0, logit_positions)
    return copy_to_tensor_model_parallel_region(hidden[:, 0].index_select(0, logit_positions), group=tp_group)


def token_logps(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    vocab_size: int,
    tp_group: dist.ProcessGroup,
    softcap: float | None = None,
    chunk_elements: int = CHUNK_ELEMENTS,
) -> Tensor:
    """log p(target) of each token, in float32, with memory for one chunk of logits; logits are recomputed in backward.

    Args:
        hidden: [R, H], the same on every rank of ``tp_group``. Its gradient here is this rank's part of the sum.
        weight: [V, H], this rank's rows of the padded output weight.
        targets: [R] int64 token ids below ``vocab_size``.
        vocab_size: True size of the vocabulary.
        tp_group: Tensor-parallel group; two all-reduces of [R] floats in forward, none in backward.
        softcap: c of logits = c * tanh(hidden @ weight.T / c); None for plain logits.
        chunk_elements: Upper bound for tokens x V of a chunk.

    Returns:
        [R] float32, nats.
    """
    first_row = tp_group.rank() * weight.shape[0]
    valid_rows = min(max(vocab_size - first_row, 0), weight.shape[0])
    return _TokenLogps.apply(hidden, weight, targets, first_row, valid_rows, tp_group, softcap, chunk_elements)


class _TokenLogps(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        targets: Tensor,
        first_row: int,
        valid_rows: int,
        tp_group: dist.ProcessGroup,
        softcap: float | None,
        chunk_elements: int,
    ) -> Tensor:
        rows = weight[:valid_rows]
        local = _local_targets(targets, first_row, valid_rows)
        num_tokens = hidden.shape[0]
        maxima = hidden.new_full((num_tokens,), float("-inf"), dtype=torch.float32)
        sums = hidden.new_zeros((2, num_tokens), dtype=torch.float32)  # of exp(logit - max), of the target's logit
        if valid_rows:
            for part in _chunks(num_tokens, valid_rows, chunk_elements):
                logits = _logits(hidden[part], rows, softcap)
                own = local[part] >= 0
                target_logits = logits.gather(1, local[part].clamp(min=0)[:, None])[:, 0]
                sums[1, part] = torch.where(own, target_logits, 0.0)
                maxima[part] = logits.amax(dim=1)
                sums[0, part] = logits.sub_(maxima[part, None]).exp_().sum(dim=1)
        if tp_group.size() > 1:
            local_maxima = maxima.clone()
            dist.all_reduce(maxima, op=dist.ReduceOp.MAX, group=tp_group)
            sums[0] *= torch.exp(local_maxima - maxima)
            dist.all_reduce(sums, group=tp_group)
        log_normaliser = maxima + sums[0].log()
        ctx.save_for_backward(hidden, weight, local, log_normaliser)
        ctx.valid_rows, ctx.softcap, ctx.chunk_elements = valid_rows, softcap, chunk_elements
        return sums[1] - log_normaliser

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = grads
        hidden, weight, local, log_normaliser = ctx.saved_tensors
        rows = weight[: ctx.valid_rows]
        grad_hidden = torch.zeros_like(hidden)
        grad_weight = torch.zeros_like(weight, dtype=torch.float32)
        if ctx.valid_rows:
            for part in _chunks(hidden.shape[0], ctx.valid_rows, ctx.chunk_elements):
                # d logp / d logit = onehot(target) - softmax
                logits = _logits(hidden[part], rows, ctx.softcap)
                # d softcap(x) / dx = 1 - (softcap(x) / c)^2
                slope = None if ctx.softcap is None else 1 - (logits / ctx.softcap).square_()
                grad_logits = logits.sub_(log_normaliser[part, None]).exp_().neg_()
                own = (local[part] >= 0).to(grad_logits.dtype)
                grad_logits.scatter_add_(1, local[part].clamp(min=0)[:, None], own[:, None])
                if slope is not None:
                    grad_logits.mul_(slope)
                grad_logits = grad_logits.mul_(grad[part, None]).to(hidden.dtype)
                grad_hidden[part] = grad_logits @ rows
                if hidden.dtype == torch.float32:
                    grad_weight[: ctx.valid_rows].addmm_(grad_logits.t(), hidden[part])
                else:
                    grad_weight[: ctx.valid_rows] += grad_logits.t() @ hidden[part]
        return grad_hidden, grad_weight.to(weight.dtype), None, None, None, None, None, None


def _local_targets(targets: Tensor, first_row: int, valid_rows: int) -> Tensor:
    """Targets as row numbers of this rank; -1 where another rank has the row."""
    local = targets - first_row
    return torch.where((local >= 0) & (local < valid_rows), local, -1)


def _chunks(num_tokens: int, valid_rows: int, chunk_elements: int) -> list[slice]:
    size = max(1, chunk_elements // valid_rows)
    return [slice(start, min(start + size, num_tokens)) for start in range(0, num_tokens, size)]


def _logits(hidden: Tensor, rows: Tensor, softcap: float | None) -> Tensor:
    """[tokens, rows] float32 logits; bf16 inputs are multiplied with fp32 results, not rounded to bf16 in between."""
    if hidden.dtype == torch.float32:
        logits = hidden @ rows.t()
    elif hidden.is_cuda and _MM_HAS_OUT_DTYPE:
        logits = torch.mm(hidden, rows.t(), out_dtype=torch.float32)
    else:
        logits = hidden.float() @ rows.float().t()
    return logits if softcap is None else logits.div_(softcap).tanh_().mul_(softcap)
