"""RMSNorm for the local layer spec: PyTorch only, and usable with sequence parallelism; and over heads of many ranks.

megatron-core's own fallback (``WrappedTorchNorm``) refuses sequence parallelism. Under it every tensor-parallel rank
normalises its slice of the sequence, so the weight's gradient is a partial sum; marking the parameter
``sequence_parallel`` makes megatron-core add those sums over the tensor group (``finalize_model_grads.py``).
"""

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import (
    copy_to_tensor_model_parallel_region,
    reduce_from_tensor_model_parallel_region,
)
from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint
from torch import Tensor


class RMSNorm(torch.nn.Module):
    """Root-mean-square norm over the last dimension, with the constructor that megatron-core gives its norms.

    Args:
        config: The model's configuration; ``params_dtype``, ``sequence_parallel``, ``use_cpu_initialization`` and
            ``layernorm_zero_centered_gamma`` (the scale is 1 + weight) count.
        hidden_size: Size of the normalised dimension.
        eps: Added to the mean square.
    """

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5) -> None:
        super().__init__()
        device = torch.device("cpu") if config.use_cpu_initialization else torch.cuda.current_device()
        self.eps = eps
        self.zero_centered = config.layernorm_zero_centered_gamma
        self.weight = torch.nn.Parameter(torch.ones(hidden_size, dtype=config.params_dtype, device=device))
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, hidden: Tensor) -> Tensor:
        """Normalises ``hidden`` [..., hidden_size]; same shape and dtype out."""
        if not self.zero_centered:
            return _rms_norm(hidden, self.weight, self.eps)
        # In float32 until the end: 1 + weight would lose most of a bf16 weight's digits.
        return _rms_norm(hidden.float(), 1.0 + self.weight.float(), self.eps).type_as(hidden)


def _rms_norm(hidden: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Normalises [..., H]; only on GPUs PyTorch has a kernel for it, elsewhere autograd goes through its parts."""
    if hidden.device.type == "cpu":
        result: Tensor = _RMSNorm.apply(hidden, weight, eps)
        return result
    return F.rms_norm(hidden, (hidden.shape[-1],), weight, eps)


class _RMSNorm(torch.autograd.Function):
    """Keeps its input and one number a row. Computes in float32, and rounds the result alone to the input's dtype."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, eps: float) -> Tensor:
        wide = hidden.float()
        scale = (wide.square().mean(dim=-1, keepdim=True) + eps).rsqrt_()
        ctx.save_for_backward(hidden, weight, scale)
        result: Tensor = (wide * scale).mul_(weight)
        return result.to(hidden.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        # With n = x s, s = (mean(x^2) + eps)^-1/2 and the gradient g of n: d loss / d x = s (g - n mean(g n)).
        (grad,), (hidden, weight, scale) = grads, ctx.saved_tensors
        normalised, wide_grad = hidden.float() * scale, grad.float()
        product = wide_grad * normalised
        grad_weight = None
        if ctx.needs_input_grad[1]:
            grad_weight = product.flatten(0, -2).sum(0).to(weight.dtype)
        mean = (product @ weight.float())[..., None] / hidden.shape[-1]
        result = (wide_grad * weight).addcmul_(normalised, mean, value=-1).mul_(scale)
        return result.to(hidden.dtype), grad_weight, None


class ProjectionRMSNorm(torch.nn.Module):
    """Root-mean-square norm over all heads of a projection, those of the other tensor-parallel ranks included.

    Its weight is split over the ranks as the heads are. For both layer specs.

    Args:
        config: The model's configuration; ``params_dtype`` and ``use_cpu_initialization`` count.
        heads: On this rank.
        head_size: Of each.
        pg: Process groups; ``pg.tp`` counts.
    """

    def __init__(self, config: TransformerConfig, heads: int, head_size: int, pg: ProcessGroupCollection) -> None:
        super().__init__()
        device = torch.device("cpu") if config.use_cpu_initialization else torch.cuda.current_device()
        self.eps, self.tp_group = config.layernorm_epsilon, pg.tp
        self.size = heads * head_size * pg.tp.size()
        self.weight = torch.nn.Parameter(torch.ones(heads * head_size, dtype=config.params_dtype, device=device))
        set_tensor_model_parallel_attributes(self.weight, True, 0, 1)

    def forward(self, hidden: Tensor) -> Tensor:
        """[S, 1, heads, head size], of the whole sequence; same shape and dtype out.

        Sums [S, 1] over the tensor-parallel ranks, in backward too: every rank's heads are scaled by that sum.
        """
        wide = hidden.flatten(2).float()
        squares = wide.square().sum(dim=-1, keepdim=True)
        squares = reduce_from_tensor_model_parallel_region(squares, group=self.tp_group)
        squares = copy_to_tensor_model_parallel_region(squares, group=self.tp_group)
        normalised = wide * torch.rsqrt(squares / self.size + self.eps) * self.weight.float()
        return normalised.type_as(hidden).view_as(hidden)

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple[Any, ...] = (), metadata: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        """megatron-core's sharded tensor of the weight."""
        groups: dict[str, dist.ProcessGroup] = {"dp_cp_group": metadata["dp_cp_group"]} if metadata else {}
        result: dict[str, Any] = make_sharded_tensors_for_checkpoint(
            {"weight": self.weight}, prefix, {"weight": 0}, sharded_offsets, tp_group=self.tp_group, **groups
        )
        return result
