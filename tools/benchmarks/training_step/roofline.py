"""How near a step is to the machine's limit: its model FLOP by the rate of matrix products alone."""

import time
from collections.abc import Callable, Sequence

import numpy as np
import torch
from transformers import PretrainedConfig

from megatron_tgdpo.planning.model_flops import step_flops, step_models

# Square products, large enough that a machine is at its best.
_SIZE = {"cpu": 2048, "cuda": 8192}
_REPETITIONS = 5
# Of each of three tensors.
_MEMORY_BYTES = {"cpu": 128 << 20, "cuda": 1 << 30}


def product_rate(
    device: torch.device,
    dtype: torch.dtype,
    shape: tuple[int, int, int] | None = None,
    clock: Callable[[], float] = time.perf_counter,
) -> float:
    """The fastest of some matrix products, FLOP/s, with the threads that this process has.

    Args:
        device: Where.
        dtype: Of operands and result.
        shape: Rows, inner size and columns; by default large squares, with which a machine is at its best.
        clock: In seconds.
    """
    rows, inner, columns = shape or (_SIZE[device.type],) * 3
    left, right = (
        torch.ones(rows, inner, device=device, dtype=dtype),
        torch.ones(columns, inner, device=device, dtype=dtype),
    )
    out = torch.empty(rows, columns, device=device, dtype=dtype)
    return 2 * rows * inner * columns * _rate(lambda: torch.mm(left, right.t(), out=out), device, clock)


def memory_rate(device: torch.device, clock: Callable[[], float] = time.perf_counter) -> float:
    """The fastest of some sums of two tensors that no cache holds, bytes/s read and written."""
    one, other, out = (torch.ones(_MEMORY_BYTES[device.type] // 4, device=device) for _ in range(3))
    return 3 * one.nbytes * _rate(lambda: torch.add(one, other, out=out), device, clock)


def _rate(action: Callable[[], object], device: torch.device, clock: Callable[[], float]) -> float:
    """How often a second an action can be done: the fastest of some."""
    seconds = []
    for _ in range(1 + _REPETITIONS):
        _wait(device)
        begun = clock()
        action()
        _wait(device)
        seconds.append(clock() - begun)
    # The first one has what is prepared once to do.
    return 1 / min(seconds[1:])


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
