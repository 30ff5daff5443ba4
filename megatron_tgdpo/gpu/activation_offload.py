"""Keeps what the policy's layers save for backward in pinned host memory, and brings it back just before it is used.

PyTorch's hooks on saved tensors (``torch.autograd.graph.saved_tensors_hooks``) see all of it, whatever recomputation
leaves. Its memory is copied to the host, on a stream of its own, while the layers go on, once for all views of it; no
layer begins before the copies of the one before the last are there, or memory would fill where copies are slower. In
backward, on another stream, the copies of the layer before are under way while one layer's are used. Weights stay, and
what is small. On the CPU the same code runs without streams, for tests.
"""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

# Smaller tensors stay: their copies would take longer to be told than to be made.
LEAST_BYTES = 2**20


@dataclass
class _Waiting:
    """What one storage held, on the host.

    Attributes:
        host: The copy, [bytes] uint8; None when no node holds it any more.
        arrived: What tells when it is whole; None on the CPU.
        layer: Of which it is, counted from the first of the forward pass.
        device: Where it was.
        uses: How many nodes of the graph hold it.
        back: The copy on the device, and what tells when it is there; None before it was begun.
    """

    host: Tensor | None
    arrived: torch.cuda.Event | None
    layer: int
    device: torch.device
    uses: int = 0
    back: tuple[Tensor, torch.cuda.Event | None] | None = None


class _Saved:
    """What a node of the graph holds instead of a tensor, until it has made its backward pass."""

    def __init__(self, waiting: _Waiting, tensor: Tensor) -> None:
        self.waiting = waiting
        self._dtype = tensor.dtype
        self._place = (tensor.storage_offset(), tensor.shape, tensor.stride())
        waiting.uses += 1

    def within(self, copy: Tensor) -> Tensor:
        """The tensor, strides and all, in a copy of its storage."""
        return torch.empty(0, dtype=self._dtype, device=copy.device).set_(copy.untyped_storage(), *self._place)

    def __del__(self) -> None:
        self.waiting.uses -= 1
        if not self.waiting.uses:
            self.waiting.back = self.waiting.host = None


@dataclass
class _Pass:
    """One forward pass of the layers.

    Attributes:
        waiting: What they saved, by layer.
        seen: By storage and version; the weak reference keeps an address from being used again.
        layer: That runs.
        copied: What tells that the copies of each layer are on the host.
    """

    waiting: list[list[_Waiting]] = field(default_factory=lambda: [[]])
    copied: list[torch.cuda.Event] = field(default_factory=list)
    seen: dict[Any, tuple[StorageWeakRef, _Waiting]] = field(default_factory=dict)
    layer: int = 0


class ActivationOffload:
    """Attaches itself to a block of layers; the block's hooks own it.

    Args:
        block: megatron-core's ``TransformerBlock``, called with gradients for what is to be offloaded.
        device: Where it runs.
        least_bytes: Smaller storages stay.

    Attributes:
        host_bytes: That the forward passes so far have copied to the host.
    """

    def __init__(self, block: torch.nn.Module, device: torch.device, least_bytes: int = LEAST_BYTES) -> None:
        self._to, self._from = (torch.cuda.Stream(device) if device.type == "cuda" else None for _ in range(2))
        self._block, self._least_bytes = block, least_bytes
        self._pass: _Pass | None = None
        self._hooks: torch.autograd.graph.saved_tensors_hooks | None = None
        self._weights: set[int] = set()
        self.host_bytes = 0
        block.register_forward_pre_hook(lambda *_: self._begin())
        block.register_forward_hook(lambda *_: self._end(), always_call=True)
        for layer in block.layers:  # type: ignore[union-attr]
            layer.register_forward_hook(lambda *_: self._next_layer())

    def _begin(self) -> None:
        if not torch.is_grad_enabled():
            return
        self._weights = {weight.untyped_storage().data_ptr() for weight in self._block.parameters()}
        current = self._pass = _Pass()
        self._hooks = torch.autograd.graph.saved_tensors_hooks(
            lambda tensor: self._pack(current, tensor), lambda packed: self._unpack(current, packed)
        )
        self._hooks.__enter__()

    def _end(self) -> None:
        if self._hooks is not None:
            self._hooks.__exit__()
        if self._pass is not None:
            self._pass.seen = {}
        self._hooks = self._pass = None

    def _next_layer(self) -> None:
        # Layers that run again in backward belong to no pass.
        if self._pass is None:
            return
        self._pass.layer += 1
        self._pass.waiting.append([])
        if self._to is not None:
            self._pass.copied.append(self._to.record_event())
            if len(self._pass.copied) > 1:
                self._pass.copied[-2].synchronize()

    def _pack(self, current: _Pass, tensor: Tensor) -> Tensor | _Saved:
        storage = tensor.untyped_storage()
        if storage.nbytes() < self._least_bytes or storage.data_ptr() in self._weights:
            return tensor
        key = (storage._cdata, tensor._version)
        # A copy is gone with the last node that held it, also within the pass.
        if key not in current.seen or current.seen[key][1].host is None:
            waiting = _Waiting(*self._to_host(storage), current.layer, tensor.device)
            current.seen[key] = (StorageWeakRef(storage), waiting)
            current.waiting[-1].append(waiting)
            self.host_bytes += storage.nbytes()
        return _Saved(current.seen[key][1], tensor)

    def _to_host(self, storage: torch.UntypedStorage) -> tuple[Tensor, torch.cuda.Event | None]:
        tensor = torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)
        if self._to is None:
            return tensor.clone(), None
        host = torch.empty(tensor.shape, dtype=torch.uint8, pin_memory=True)
        self._to.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._to):
            host.copy_(tensor, non_blocking=True)
        # Its memory must not be given away while it is still read.
        tensor.record_stream(self._to)
        return host, self._to.record_event()

    def _fetch(self, waiting: _Waiting) -> None:
        """Begins the copy back."""
        if waiting.back is not None or waiting.host is None:
            return
        if self._from is None or waiting.arrived is None:
            waiting.back = (waiting.host.clone(), None)
            return
        self._from.wait_event(waiting.arrived)
        with torch.cuda.stream(self._from):
            copy = waiting.host.to(waiting.device, non_blocking=True)
        waiting.back = (copy, self._from.record_event())

    def _unpack(self, current: _Pass, packed: Tensor | _Saved) -> Tensor:
        if isinstance(packed, Tensor):
            return packed
        waiting = packed.waiting
        self._fetch(waiting)
        for layer in (waiting.layer, waiting.layer - 1):
            for other in reversed(current.waiting[layer]) if layer >= 0 else ():
                self._fetch(other)
        assert waiting.back is not None, "what a layer saved was given up before its backward pass"
        copy, arrived = waiting.back
        if arrived is not None:
            torch.cuda.current_stream().wait_event(arrived)
            copy.record_stream(torch.cuda.current_stream())
        return packed.within(copy)
