"""How long a step is in collectives, and in exchanges between stages, by the profiler's events of some steps."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch.profiler import ProfilerActivity, profile

# Names of NCCL's kernels, of which one sends and receives, and of gloo's operations, which do both at once.
_COMMUNICATION = ("nccl", "gloo:")
_EXCHANGES = ("sendrecv", "gloo:recv")
_BESIDE_AN_EXCHANGE = "gloo:send"


class SampledTimes:
    """Watches every so many steps, which the profiler makes slower, and says nothing of the others.

    Args:
        every_steps: How many; None for no step.
        device: This rank's.
    """

    def __init__(self, every_steps: int | None, device: torch.device) -> None:
        self._every, self._device = every_steps, device
        self._seconds: tuple[float, float] | None = None

    @contextmanager
    def around(self, step: int) -> Iterator[None]:
        """What is inside is a step, counted from 1."""
        if self._every is None or step % self._every:
            yield
            return
        cuda = self._device.type == "cuda"
        with profile(activities=[ProfilerActivity.CUDA if cuda else ProfilerActivity.CPU]) as profiler:
            yield
            if cuda:
                torch.cuda.synchronize()
        self._seconds = communication_seconds(
            (event.name, event.time_range.elapsed_us()) for event in profiler.events()
        )

    def take(self) -> tuple[float, float] | None:
        """Of the step that was watched last, once: seconds in collectives, and in exchanges between stages."""
        seconds, self._seconds = self._seconds, None
        return seconds


def communication_seconds(events: Iterable[tuple[str, float]]) -> tuple[float, float]:
    """Seconds of collectives and of exchanges between stages, waiting for other ranks included.

    Args:
        events: Names and microseconds of kernels, or of operations on a CPU.
    """
    collectives = exchanges = 0.0
    for name, microseconds in events:
        lower = name.lower()
        if not lower.startswith(_COMMUNICATION) or lower == _BESIDE_AN_EXCHANGE:
            continue
        if any(mark in lower for mark in _EXCHANGES):
            exchanges += microseconds
        else:
            collectives += microseconds
    return collectives / 1e6, exchanges / 1e6
