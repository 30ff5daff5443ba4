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

from megatron_tgdpo.loss.vocab_chunks import chunk_rows
from megatron_tgdpo.loss.weight_gradient import weight_gradient

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
        result: Tensor = whole[:, 0].index_select(0, logit_positions)
        return result
    result = copy_to_tensor_model_parallel_region(hidden[:, 0].index_select(0, logit_positions), group=tp_group)
    return result


def token_logps(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    vocab_size: int,
    tp_group: dist.ProcessGroup,
    softcap: float | None = None,
    chunk_elements: int | None = None,
    keep_bytes: int = 0,
) -> Tensor:
    """log p(target) of each token, in float32, with memory for one chunk of logits and for those kept for backward.

    Logits that are not kept are computed again in backward.

    A chunk holds all tokens and some rows of the vocabulary, so that each pass reads the weight once. If the weight has
    a ``main_grad`` (megatron-core's fp32 gradient buffer), its gradient is added there, as by megatron-core's fused
    linears.

    Args:
        hidden: [R, H], the same on every rank of ``tp_group``. Its gradient here is this rank's part of the sum.
        weight: [V, H], this rank's rows of the padded output weight.
        targets: [R] int64 token ids below ``vocab_size``.
        vocab_size: True size of the vocabulary.
        tp_group: Tensor-parallel group; two all-reduces of [R] floats in forward, none in backward.
        softcap: c of logits = c * tanh(hidden @ weight.T / c); None for plain logits.
        chunk_elements: Upper bound for tokens x vocabulary rows of a chunk; by device if None.
        keep_bytes: Upper bound for the memory of chunks that are kept; with a softcap none are.

    Returns:
        [R] float32, nats.
    """
    first_row = tp_group.rank() * weight.shape[0]
    valid_rows = min(max(vocab_size - first_row, 0), weight.shape[0])
    chunks = _Chunks(hidden, weight, valid_rows, softcap, chunk_elements, 0 if softcap else keep_bytes)
    result: Tensor = _TokenLogps.apply(hidden, weight, targets - first_row, tp_group, chunks)
    return result


@torch.no_grad()
def greedy_tokens(hidden: Tensor, weight: Tensor, *, vocab_size: int, tp_group: dist.ProcessGroup) -> Tensor:
    """The most likely token after each hidden state, of equals the one with the lowest id.

    A cap of the logits changes nothing about which is the largest. Memory for the logits of all tokens.

    Args:
        hidden: [R, H], the same on every rank of ``tp_group``.
        weight: [V, H], this rank's rows of the padded output weight.
        vocab_size: True size of the vocabulary.
        tp_group: Tensor-parallel group; two all-reduces of [R] numbers.

    Returns:
        [R] int64.
    """
    first_row = tp_group.rank() * weight.shape[0]
    valid_rows = min(max(vocab_size - first_row, 0), weight.shape[0])
    largest = hidden.new_full((hidden.shape[0],), float("-inf"), dtype=torch.float32)
    found = torch.zeros_like(largest, dtype=torch.int64)
    if valid_rows and hidden.shape[0]:
        logits = hidden.new_empty(hidden.shape[0], valid_rows, dtype=torch.float32)
        _product(hidden, weight[:valid_rows].t(), logits)
        largest, found = logits.max(dim=1)
    over_ranks = largest.clone()
    dist.all_reduce(over_ranks, op=dist.ReduceOp.MAX, group=tp_group)
    # Where logits are not numbers, none is equal: any token will do.
    found = torch.where(largest == over_ranks, found + first_row, vocab_size - 1)
    dist.all_reduce(found, op=dist.ReduceOp.MIN, group=tp_group)
    return found


class _Chunks:
    """Logits by chunks of vocabulary rows."""

    def __init__(
        self,
        hidden: Tensor,
        weight: Tensor,
        valid_rows: int,
        softcap: float | None,
        chunk_elements: int | None,
        keep_bytes: int,
    ) -> None:
        tokens = hidden.shape[0]
        rows = chunk_rows(tokens, valid_rows, hidden.device.type, chunk_elements)
        starts = range(0, valid_rows if tokens else 0, rows)
        self.slices = [slice(start, min(start + rows, valid_rows)) for start in starts]
        self.softcap = softcap
        self._buffer_size = tokens * rows
        # As many whole chunks as there is room for.
        self.kept = min(len(self.slices), keep_bytes // max(4 * self._buffer_size, 1))

    def buffer(self, hidden: Tensor) -> Tensor:
        return hidden.new_empty(self._buffer_size, dtype=torch.float32)

    def view(self, buffer: Tensor, hidden: Tensor, part: slice) -> Tensor:
        """A buffer as the chunk of some vocabulary rows."""
        return buffer[: hidden.shape[0] * (part.stop - part.start)].view(hidden.shape[0], -1)

    def logits(self, hidden: Tensor, weight: Tensor, part: slice, buffer: Tensor) -> Tensor:
        """[R, rows] float32; valid until the next call with the same buffer."""
        out = self.view(buffer, hidden, part)
        _product(hidden, weight[part].t(), out)
        return out if self.softcap is None else out.div_(self.softcap).tanh_().mul_(self.softcap)


class _TokenLogps(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, tp_group: dist.ProcessGroup, chunks: _Chunks
    ) -> Tensor:
        """``targets`` are row numbers of this rank's weight, below 0 or beyond it where another rank has the row."""
        maxima = hidden.new_full((hidden.shape[0],), float("-inf"), dtype=torch.float32)
        sums = hidden.new_zeros((2, hidden.shape[0]), dtype=torch.float32)  # of exp(logit - max), of the target's logit
        buffer = chunks.buffer(hidden)
        kept = [] if not any(ctx.needs_input_grad[:2]) else [chunks.buffer(hidden) for _ in range(chunks.kept)]
        kept_maxima = []
        for number, part in enumerate(chunks.slices):
            keep = number < len(kept)
            logits = chunks.logits(hidden, weight, part, kept[number] if keep else buffer)
            own, places = _targets_in(targets, part)
            sums[1] += torch.where(own, logits.gather(1, places[:, None])[:, 0], 0.0)
            higher = torch.maximum(maxima, logits.amax(dim=1))
            sums[0] *= torch.exp(maxima - higher)
            sums[0] += logits.sub_(higher[:, None]).exp_().sum(dim=1)
            maxima = higher
            if keep:
                kept_maxima.append(higher)
        if tp_group.size() > 1:
            # Not in place: the last of the kept maxima is this very tensor.
            local_maxima, maxima = maxima, maxima.clone()
            dist.all_reduce(maxima, op=dist.ReduceOp.MAX, group=tp_group)
            sums[0] *= torch.exp(local_maxima - maxima)
            dist.all_reduce(sums, group=tp_group)
        log_normaliser = maxima + sums[0].log()
        ctx.save_for_backward(hidden, weight, targets, log_normaliser)
        ctx.chunks = chunks
        # exp(logit - maximum so far), of the first chunks; nobody outside sees them, so they need no autograd.
        ctx.kept = list(zip(kept, kept_maxima, strict=True))
        return sums[1] - log_normaliser

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = grads
        hidden, weight, targets, log_normaliser = ctx.saved_tensors
        # With g = d loss / d logp and Z the log-normaliser, d loss / d logit = g (onehot(target) - exp(logit - Z)), or
        #     -sign(g) (exp(logit - (Z - log|g|)) - |g| onehot(target)).
        # The bracket is built in the logits' place, and -sign(g) goes to the hidden states: multiplying the logits by g
        # would read them once more.
        size = grad.abs()
        shift = log_normaliser - size.log()
        sign = -grad.sign()[:, None]
        signed_hidden = hidden * sign.to(hidden.dtype)
        grad_hidden = torch.zeros_like(hidden, dtype=torch.float32)
        # None where the weight is frozen, as under LoRA.
        grad_weight, returned = weight_gradient(weight) if ctx.needs_input_grad[1] else (None, lambda: None)
        chunks, kept = ctx.chunks, ctx.kept
        buffer = chunks.buffer(hidden)
        for number, part in enumerate(chunks.slices):
            slope = None
            if number < len(kept):
                values, maximum = kept[number]
                grad_logits = chunks.view(values, hidden, part).mul_(torch.exp(maximum - shift)[:, None])
            else:
                logits = chunks.logits(hidden, weight, part, buffer)
                if chunks.softcap is not None:
                    # d softcap(x) / dx = 1 - (softcap(x) / c)^2
                    slope = 1 - (logits / chunks.softcap).square_()
                grad_logits = logits.sub_(shift[:, None]).exp_()
            own, places = _targets_in(targets, part)
            grad_logits.scatter_add_(1, places[:, None], torch.where(own, -size, 0.0)[:, None])
            if slope is not None:
                grad_logits.mul_(slope)
            grad_logits = grad_logits.to(hidden.dtype)
            _add_product(grad_logits, weight[part], grad_hidden)
            if grad_weight is not None:
                _add_product(grad_logits.t(), signed_hidden, grad_weight[part])
        return grad_hidden.mul_(sign).to(hidden.dtype), returned(), None, None, None


def _targets_in(targets: Tensor, part: slice) -> tuple[Tensor, Tensor]:
    """Which targets are rows of a chunk, [R] bool, and their places in it, [R] int64, anything where they are not."""
    own = (targets >= part.start) & (targets < part.stop)
    return own, (targets - part.start).clamp(0, part.stop - part.start - 1)


def _product(left: Tensor, right: Tensor, out: Tensor) -> None:
    """``out`` = left @ right in fp32; bf16 inputs are multiplied with fp32 results, not rounded to bf16 in between."""
    if left.dtype == torch.float32:
        torch.mm(left, right, out=out)
    elif left.is_cuda and _MM_HAS_OUT_DTYPE:
        torch.mm(left, right, out_dtype=torch.float32, out=out)
    else:
        torch.mm(left.float(), right.float(), out=out)


def _add_product(left: Tensor, right: Tensor, out: Tensor) -> None:
    """``out`` += left @ right in fp32."""
    if left.dtype == torch.float32:
        out.addmm_(left, right)
    elif left.is_cuda and _MM_HAS_OUT_DTYPE:
        out.add_(torch.mm(left, right, out_dtype=torch.float32))
    else:
        out.addmm_(left.float(), right.float())
