"""What both directions of a conversion share: reading ahead, the progress bar, the line at the end."""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch.distributed as dist
from tqdm import tqdm

from megatron_tgdpo.console import progress

A = TypeVar("A")
T = TypeVar("T")


@dataclass(frozen=True)
class Summary:
    """What a conversion wrote, on all ranks together: ``size`` is in bytes, ``dtype`` as the commands name it."""

    out: Path
    parameters: int
    dtype: str
    size: int
    seconds: float

    def __str__(self) -> str:
        megabytes = self.size / 1e6
        speed = megabytes / max(self.seconds, 1e-9)
        return (
            f"{self.out}: written, {self.parameters:,} parameters in {self.dtype}, {megabytes:,.1f} MB "
            f"({self.seconds:.1f} s, {speed:,.0f} MB/s)"
        )


def read_ahead(read: Callable[[A], T], items: Sequence[A]) -> Iterator[tuple[A, T]]:
    """Yields each item with what ``read`` gives for it, reading the next one meanwhile: two are in memory at most.

    Args:
        read: Called in another thread, for one item at a time and in order; its errors are raised here.
        items: What to read.
    """
    with ThreadPoolExecutor(max_workers=1) as thread:
        upcoming = thread.submit(read, items[0]) if items else None
        for number, item in enumerate(items, start=1):
            assert upcoming is not None
            result = upcoming.result()
            upcoming = thread.submit(read, items[number]) if number < len(items) else None
            yield item, result


def progress_bar(direction: str, total: int, *, quiet: bool = False) -> "tqdm[Any]":
    """:func:`~megatron_tgdpo.console.progress` of bytes on rank 0, showing that rank's share.

    Args:
        direction: What is going on.
        total: Bytes of this rank's share.
        quiet: No bar at all.
    """
    ranks = dist.get_world_size()
    label = direction if ranks == 1 else f"{direction} (rank 0's share of {ranks})"
    return progress(label, total, "B", shown=not quiet and dist.get_rank() == 0)
