"""SiLU-gated linear units for the local layer spec: two elementwise passes forward, and nothing kept but the input.

megatron-core's plain form keeps the activated gate and a copy of the up-projection besides (it adds its offset of 0),
and joins the two gradients by a copy; its fused form is compiled, and for GPUs.
"""

from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor


class SwiGLU(MegatronModule):
    """What ``MLPSubmodules.activation_func`` makes, which megatron-core asks where ``use_te_activation_func`` is set.

    Args:
        config: The model's configuration.
    """

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__(config=config)

    def forward(self, hidden: Tensor) -> Tensor:
        """silu(gate) * up: [..., 2 F], the gate's F first -> [..., F], in the input's dtype."""
        result: Tensor = _SwiGLU.apply(hidden)
        return result


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor) -> Tensor:
        ctx.save_for_backward(hidden)
        gate, up = hidden.chunk(2, dim=-1)
        return F.silu(gate).mul_(up)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        (grad,), (hidden,) = grads, ctx.saved_tensors
        gate, up = hidden.chunk(2, dim=-1)
        result = torch.empty_like(hidden)
        of_gate, of_up = result.chunk(2, dim=-1)
        # Without another tensor; in the order of autograd's own formulas, so that the digits are the plain form's.
        torch.mul(grad, up, out=of_up)
        torch.ops.aten.silu_backward.grad_input(of_up, gate, grad_input=of_gate)
        torch.ops.aten.silu.out(gate, out=of_up).mul_(grad)
        return result
