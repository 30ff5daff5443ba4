"""Counts what collectives send, if each is a ring."""

from typing import Any

import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode


class SentBytes(TorchDispatchMode):
    """Bytes that this rank sends in all-reduces, all-gathers and reduce-scatters, by dtype.

    Over n ranks an all-gather or a reduce-scatter of a tensor sends (n - 1) / n of it, an all-reduce twice as much.
    """

    def __init__(self) -> None:
        super().__init__()
        self.by_dtype: dict[torch.dtype, float] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        match func.name():
            case "c10d::allreduce_":
                self._count(2, args[0], args[1])
            case "c10d::_allgather_base_":
                self._count(1, [args[0]], args[2])
            case "c10d::_reduce_scatter_base_":
                self._count(1, [args[1]], args[2])
            case "c10d::reduce_scatter_tensor_coalesced_":
                self._count(1, args[1], args[2])
        return func(*args, **(kwargs or {}))

    def _count(self, passes: int, whole: list[torch.Tensor], boxed_group: Any) -> None:
        ranks = dist.ProcessGroup.unbox(boxed_group).size()
        for tensor in whole:
            sent = passes * (ranks - 1) / ranks * tensor.nbytes
            self.by_dtype[tensor.dtype] = self.by_dtype.get(tensor.dtype, 0) + sent
