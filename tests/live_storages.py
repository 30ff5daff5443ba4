"""Counts the memory that a computation holds, storage by storage."""

from collections.abc import Iterable
from typing import Any

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveStorages(TorchDispatchMode):
    """Follows every storage that comes out of an operation, except those known before, and keeps the largest sum."""

    def __init__(self, known: Iterable[torch.Tensor]) -> None:
        super().__init__()
        self._known = {tensor.untyped_storage()._cdata for tensor in known}
        self._live: dict[int, tuple[StorageWeakRef, int]] = {}
        self._sum = 0  # of those, some of which may be gone
        self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        out = func(*args, **(kwargs or {}))
        new = False
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                if storage._cdata not in self._known and storage._cdata not in self._live:
                    # The weak reference keeps the address from being used again.
                    self._live[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
                    self._sum += storage.nbytes()
                    new = True
        if new and self._sum > self.peak:
            self.peak = max(self.peak, self.bytes())
        return out

    def bytes(self) -> int:
        """Of the storages that are alive, some of which may have given their memory back (``resize_``)."""
        live = {}
        for key, (reference, _) in self._live.items():
            storage = torch.UntypedStorage._new_with_weak_ptr(reference.cdata)
            if storage is not None:
                live[key] = (reference, storage.nbytes())
        self._live = live
        self._sum = sum(size for _, size in self._live.values())
        return self._sum
