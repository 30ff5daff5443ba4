"""Where a weight's gradient is added up by functions that make it themselves."""

from collections.abc import Callable

import torch
from torch import Tensor


def weight_gradient(weight: Tensor) -> tuple[Tensor, Callable[[], Tensor]]:
    """An fp32 buffer to add the weight's gradient to, and what backward has to return after that.

    With megatron-core's ``main_grad`` what is returned only makes autograd's hooks run: ``grad_added_to_main_grad``
    tells them that its values mean nothing, ``zero_out_wgrad`` (of a weight that is the embedding's too, and has a
    gradient from there) that they are added all the same. Source: ``distributed_data_parallel.py`` and
    ``tensor_parallel/layers.py`` of megatron-core 0.16.1.
    """
    if not hasattr(weight, "main_grad"):
        gradient = torch.zeros_like(weight, dtype=torch.float32)
        return gradient, lambda: gradient.to(weight.dtype)
    weight.grad_added_to_main_grad = True  # type: ignore[attr-defined]
    zeros = getattr(weight, "zero_out_wgrad", False)
    return weight.main_grad, lambda: torch.zeros_like(weight) if zeros else torch.empty_like(weight)
