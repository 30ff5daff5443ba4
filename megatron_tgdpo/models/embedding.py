"""The embedding of a model without a GPU: its gradient has the rows of the tokens that are there, not the vocabulary's.

PyTorch's own makes a tensor as large as the embedding for every pack, of which all but the pack's rows are zero, and
adds it to the gradient buffer. On a GPU that costs little, and to find the rows would make the CPU wait for it.

Legend: S tokens of the pack, V rows of the embedding on this rank, H hidden.
"""

from typing import Any

import torch
from megatron.core.tensor_parallel.layers import VocabParallelEmbedding
from megatron.core.tensor_parallel.mappings import (
    reduce_from_tensor_model_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
)
from torch import Tensor

from megatron_tgdpo.loss.weight_gradient import weight_gradient


class RowGradientEmbedding(VocabParallelEmbedding):
    """megatron-core's vocabulary-parallel embedding, to the bit, with a backward pass over the rows that were read."""

    @classmethod
    def in_place_of(cls, other: VocabParallelEmbedding) -> "RowGradientEmbedding":
        """The same weight, with this forward and backward."""
        made = cls.__new__(cls)
        made.__dict__ = other.__dict__
        return made

    def forward(self, input_: Tensor) -> Tensor:
        """Looks tokens up.

        Args:
            input_: [1, S] int64 token ids.

        Returns:
            [1, S, H], or under sequence parallelism [S / tp, 1, H]. Collective over the tensor ranks: an all-reduce, or
            a reduce-scatter.
        """
        places = input_ - self.vocab_start_index
        absent = (places < 0) | (places >= self.weight.shape[0])
        output: Tensor = _Rows.apply(self.weight, places.masked_fill(absent, 0))
        if self.tp_group.size() > 1:
            output = output.masked_fill(absent[..., None], 0.0)
        if self.reduce_scatter_embeddings:
            transposed = output.transpose(0, 1).contiguous()
            scattered: Tensor = reduce_scatter_to_sequence_parallel_region(transposed, group=self.tp_group)
            return scattered
        reduced: Tensor = reduce_from_tensor_model_parallel_region(output, group=self.tp_group)
        return reduced


class _Rows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: Tensor, places: Tensor) -> Tensor:
        ctx.save_for_backward(weight, places)
        return torch.nn.functional.embedding(places, weight)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, None]:
        weight, places = ctx.saved_tensors
        rows, numbers = torch.unique(places, return_inverse=True)
        summed = torch.ops.aten.embedding_dense_backward(grads[0], numbers, len(rows), -1, False)
        buffer, returned = weight_gradient(weight)
        buffer.index_add_(0, rows, summed.to(buffer.dtype))
        return returned(), None
