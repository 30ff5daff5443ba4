"""How near a step is to the machine's limit: its model FLOP by the rate of matrix products alone."""

import time
from collections.abc import Sequence

import numpy as np
import torch
from transformers import PretrainedConfig

from megatron_tgdpo.planning.model_flops import step_flops, step_models

# Square products, large enough that a machine is at its best.
_SIZE = {"cpu": 2048, "cuda": 8192}
_REPETITIONS = 5


def product_rate(device: torch.device, dtype: torch.dtype) -> float:
    """The fastest of some matrix products, FLOP/s, with the threads that this process has."""
    size, rates = _SIZE[device.type], []
    left, right = (torch.ones(size, size, device=device, dtype=dtype) for _ in range(2))
    out = torch.empty_like(left)
    for _ in range(1 + _REPETITIONS):
        _wait(device)
        begun = time.perf_counter()
        torch.mm(left, right, out=out)
        _wait(device)
        rates.append(2 * size**3 / (time.perf_counter() - begun))
    # The first one has what is prepared once to do.
    return max(rates[1:])


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def variant_flops(
    hf_config: PretrainedConfig, lengths: np.ndarray, *, frozen: int, adapter: bool, shared_prompts: bool
) -> int:
    """Model FLOP of a variant over pairs: what it computes again, or for padding, does not count.

    Args:
        hf_config: Of all its models.
        lengths: [P, 3] int64: prompt, chosen and rejected tokens of the pairs.
        frozen: Models without a backward pass.
        adapter: Whether an adapter trains, and so no weight has a gradient.
        shared_prompts: Whether a pair's prompt is computed once.
    """
    others: Sequence[PretrainedConfig] = [hf_config] * frozen
    models, responses = step_models(hf_config, others, adapter=adapter), int(lengths[:, 1:].sum())
    return step_flops(models, lengths, responses, shared_prompts=shared_prompts, chosen_only=False)
