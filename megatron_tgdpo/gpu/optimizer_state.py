"""Adam's moments and the main copy of bf16 weights in fewer bytes: megatron-core's precision-aware optimizer.

It works with Transformer Engine's Adam only. Source: megatron-core 0.16.1 and 0.19.2 ``optimizer_config.py`` and
``optimizer/__init__.py``; Transformer Engine 2.11 and 2.20 ``fused_adam.py`` and ``multi_tensor/adam.cu``.
"""

from typing import Any

import torch

from megatron_tgdpo.config.schema import Config, OptimizerSettings
from megatron_tgdpo.errors import UserError
from megatron_tgdpo.gpu.capabilities import Capabilities
from megatron_tgdpo.planning.memory import StateBytes

# First and second moment. Of FP8 (E4M3, one scale a tensor) the second one is bf16: gradients' squares span more than
# FP8 does, and where they became zero Adam would step as far as eps lets it (Peng et al. 2023, arXiv 2310.18313, keep
# them in 16 bits, too). megatron-core and Transformer Engine write FP8 as uint8.
_MOMENTS = {
    "fp32": (torch.float32, torch.float32),
    "bf16": (torch.bfloat16, torch.bfloat16),
    "fp8": (torch.uint8, torch.bfloat16),
}


def is_default(settings: OptimizerSettings) -> bool:
    """Whether all of the optimizer's state is fp32."""
    return settings.moments == "fp32" and settings.main_weights == "fp32"


def check_optimizer_state(config: Config, found: Capabilities) -> None:
    """Refuses state that nothing here updates.

    Raises:
        UserError: With the key, the reason and the way out.
    """
    settings, fp8 = config.optimizer, config.precision.fp8
    if is_default(settings):
        return
    key = "moments" if settings.moments != "fp32" else "main_weights"
    asked = f"optimizer.{key}={getattr(settings, key)}"
    if found.device != "cuda" or found.adam != "transformer_engine":
        raise UserError(
            f"{asked} is what Transformer Engine's Adam does, on a GPU; here it would be {found.adam}'s on "
            f"{found.device}: set optimizer.{key}=fp32"
        )
    if config.train.fused == "off":
        raise UserError(f"{asked} needs Transformer Engine's Adam, which train.fused=off leaves out: set it to auto")
    if config.offload.optimizer:
        raise UserError(f"{asked} does not go with offload.optimizer, whose state is fp32: set one of them back")
    if settings.moments != "fp32" and config.precision.dtype == "fp32":
        raise UserError(
            f"{asked} with precision.dtype=fp32, beside whose weights that Adam would keep fp32 copies: set it to "
            "fp32, or precision.dtype=bf16"
        )
    if settings.main_weights == "remainder" and config.precision.dtype != "bf16":
        raise UserError(
            "optimizer.main_weights=remainder is the rest of bf16 weights: set precision.dtype=bf16, or fp32"
        )
    if fp8 in ("none", "delayed"):
        return
    if settings.main_weights == "remainder":
        raise UserError(
            f"optimizer.main_weights=remainder with precision.fp8={fp8}: megatron-core keeps whole fp32 main weights "
            "there; set it to fp32"
        )
    if settings.moments == "fp8":
        raise UserError(
            f"optimizer.moments=fp8 with precision.fp8={fp8}: megatron-core would load them without their scales; set "
            "it to bf16"
        )


def optimizer_state_kwargs(settings: OptimizerSettings) -> dict[str, Any]:
    """What the state's precision adds to megatron-core's OptimizerConfig."""
    if is_default(settings):
        return {}
    first, second = _MOMENTS[settings.moments]
    return {
        "use_precision_aware_optimizer": True,
        "exp_avg_dtype": first,
        "exp_avg_sq_dtype": second,
        "store_param_remainders": settings.main_weights == "remainder",
    }


def state_bytes(config: Config) -> StateBytes:
    """What a trained parameter takes in the optimizer, for plans."""
    moments = sum(dtype.itemsize for dtype in _MOMENTS[config.optimizer.moments])
    if config.precision.dtype == "fp32":
        return StateBytes(main=0, moments=moments)
    return StateBytes(main=2 if config.optimizer.main_weights == "remainder" else 4, moments=moments)
