"""Weights that Transformer Engine holds in FP8, in and out.

Source: TransformerEngine 2.9 ``module/base.py: reset_parameters`` and ``tensor/quantized_tensor.py``, megatron-core
0.16.1 ``optimizer/distrib_optimizer.py``.
"""

from typing import Any

import torch
from megatron.core.dist_checkpointing.utils import force_all_tensors_to_non_fp8
from megatron.core.fp8_utils import dequantize_fp8_tensor, is_float8tensor
from torch import Tensor

# Weights are E4M3 in every format that Transformer Engine offers.
_LARGEST_E4M3 = 448.0


@torch.no_grad()
def write_parameter(parameter: torch.nn.Parameter, value: Tensor) -> None:
    """Sets a parameter, in FP8 or not, to ``value`` (any dtype and device, same shape).

    A trainable FP8 parameter carries the value it was made from, in high precision on the CPU, until the optimizer has
    taken its fp32 copy from it; that one is set too, so that training starts from the checkpoint's digits and not from
    FP8's.
    """
    _scale_for(parameter, value)
    parameter.copy_(value.to(parameter.dtype))
    high_precision = getattr(parameter, "get_high_precision_init_val", None)
    kept = high_precision() if high_precision is not None else None
    if kept is not None:
        kept.copy_(value)


def _scale_for(parameter: Any, value: Tensor) -> None:
    """Gives a parameter of delayed scaling the scale that its value asks for.

    It was made from memory that nobody initialised, whose largest value would else set the scale for as long as the
    history of amax goes back.
    """
    quantizer = getattr(parameter, "_quantizer", None)
    if quantizer is None or type(quantizer).__name__ != "Float8Quantizer":
        return
    quantizer.amax.zero_()
    amax = value.abs().max().float()
    if amax > 0:
        quantizer.scale.fill_(_LARGEST_E4M3 / amax)


def dequantised(sharded_state_dict: dict[str, Any]) -> dict[str, Any]:
    """The sharded state dict with FP8 tensors turned into bf16, in place: checkpoints and exports hold no FP8."""
    force_all_tensors_to_non_fp8(sharded_state_dict)
    return sharded_state_dict


def plain_part(parameter: Tensor, start: int, end: int) -> Tensor:
    """Elements [start, end) of a parameter, (end - start,), without FP8.

    A view of the parameter, but of an FP8 tensor bf16 in host memory.
    """
    if is_float8tensor(parameter):
        return dequantize_fp8_tensor(parameter).detach().flatten()[start:end].to("cpu", copy=True)
    return parameter.detach().flatten()[start:end]
