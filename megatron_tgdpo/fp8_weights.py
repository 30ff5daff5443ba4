"""Weights that Transformer Engine holds in FP8, in and out.

Source: TransformerEngine 2.9 ``module/base.py: reset_parameters`` and ``tensor/quantized_tensor.py``, megatron-core
0.16.1 ``optimizer/distrib_optimizer.py``. Not yet run on a GPU (docs/gpu.md).
"""

from typing import Any

import torch
from megatron.core.dist_checkpointing.utils import force_all_tensors_to_non_fp8
from torch import Tensor


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
    """Delayed scaling: forgets the amax of the memory that the parameter was made from, which nobody initialised, and
    takes the scale of the value instead of 1."""
    quantizer = getattr(parameter, "_quantizer", None)
    if type(quantizer).__name__ != "Float8Quantizer":
        return
    amax = value.abs().max().float()
    quantizer.amax.zero_()
    if amax > 0:
        quantizer.scale.fill_(448.0 / amax)


def dequantised(sharded_state_dict: dict[str, Any]) -> dict[str, Any]:
    """The sharded state dict with FP8 tensors turned into bf16, in place: checkpoints and exports hold no FP8."""
    force_all_tensors_to_non_fp8(sharded_state_dict)
    return sharded_state_dict
