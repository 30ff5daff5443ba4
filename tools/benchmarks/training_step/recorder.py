"""What a variant reports from its own process: losses, times and memory of its steps."""

import gc
import os
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from tools.benchmarks.training_step.roofline import product_rate

_STATUS = Path("/proc/self/status")
# Linux: sets the peak of the resident set back to its present size.
_RESET_PEAK = "5"


@dataclass(frozen=True)
class VariantResult:
    """What one variant did in one process.

    Attributes:
        losses: Mean loss over the pairs of each step, the warm-up first.
        seconds: Of each timed step, from its pairs' token ids to the updated parameters.
        imported_bytes: Memory of the process after imports, before any model.
        weight_bytes: Of the weights of all models that the variant holds.
        peak_bytes: Largest memory during the steps, warm-up included.
        product_flops: FLOP/s of matrix products alone, in the same process after the steps.
    """

    losses: list[float]
    seconds: list[float]
    imported_bytes: int
    weight_bytes: int
    peak_bytes: int
    product_flops: float

    @property
    def added_bytes(self) -> int:
        """What training needs beyond imports and weights: gradients, optimizer state, activations, logits."""
        return self.peak_bytes - self.imported_bytes - self.weight_bytes


@dataclass
class Recorder:
    """Watches the steps of a variant; created in its process after its imports.

    Memory is the resident set on a CPU, and what the allocator handed out on a GPU.
    """

    device: torch.device
    imported_bytes: int = 0
    weight_bytes: int = 0
    losses: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    _begun: float = 0.0

    def __post_init__(self) -> None:
        self.imported_bytes = 0 if self.device.type == "cuda" else resident_bytes("VmRSS")

    def built(self, weights: Iterable[Tensor]) -> None:
        """To be called once, when models and optimizer are there: what loading needed for a moment is forgotten."""
        self.weight_bytes = sum(weight.nbytes for weight in weights)
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        else:
            reset_peak()

    def begin(self) -> None:
        """A step begins."""
        self._wait()
        self._begun = time.perf_counter()

    def end(self, loss: float) -> None:
        """The step has updated the parameters; ``loss`` is its mean over pairs."""
        self._wait()
        self.seconds.append(time.perf_counter() - self._begun)
        self.losses.append(loss)

    def result(self, dtype: torch.dtype) -> VariantResult:
        """What was recorded, and how fast products of this dtype are made on the device."""
        peak = torch.cuda.max_memory_allocated() if self.device.type == "cuda" else resident_bytes("VmHWM")
        rate = product_rate(self.device, dtype)
        return VariantResult(self.losses, self.seconds[1:], self.imported_bytes, self.weight_bytes, peak, rate)

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()


def reset_peak() -> None:
    """Sets ``VmHWM`` back to ``VmRSS``."""
    Path("/proc/self/clear_refs").write_text(_RESET_PEAK)


def resident_bytes(field_name: str) -> int:
    """A field of /proc/self/status. Not ``ru_maxrss``: a child begins with its parent's."""
    if not _STATUS.exists():
        raise OSError(f"memory is read from {_STATUS}, which {os.uname().sysname} does not have")
    line = next(line for line in _STATUS.read_text().splitlines() if line.startswith(field_name))
    return int(line.split()[1]) * 1024
