"""Keeps the layers of frozen models in host memory and brings each to the GPU just before it runs.

A frozen layer is used once per micro batch and never changes, so nothing is copied back: the device copy is dropped
after use. The next layer's copy is under way, on a stream of its own, while a layer runs; two layers are on the device
at most. Embeddings, the final norm and the output weight stay. On the CPU the same code runs without streams.
"""

from collections.abc import Sequence

import torch
from torch import Tensor


def serve_from_host(layers: Sequence[torch.nn.Module], device: torch.device) -> None:
    """Moves the layers of one model to pinned host memory, and attaches hooks that bring each to the device to run.

    The layers' hooks own all that this needs; it goes when they go.

    Args:
        layers: In the order in which they run; their parameters must not require gradients.
        device: Where they run.

    Raises:
        ValueError: A parameter requires gradients.
    """
    if any(parameter.requires_grad for layer in layers for parameter in layer.parameters()):
        raise ValueError("only frozen layers can be served from host memory: their gradients would be lost")
    copies = _HostLayers(layers, device)
    for index, layer in enumerate(layers):
        layer.register_forward_pre_hook(lambda *_, index=index: copies.before(index))
        layer.register_forward_hook(lambda *_, index=index: copies.after(index))


class _HostLayers:
    """The layers' parameters in host memory, and those that are on the device."""

    def __init__(self, layers: Sequence[torch.nn.Module], device: torch.device) -> None:
        self._device = device
        self._copies = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._arriving: dict[int, tuple[dict[torch.nn.Parameter, Tensor], torch.cuda.Event | None]] = {}
        self._host = [{parameter: self._to_host(parameter) for parameter in layer.parameters()} for layer in layers]

    def _to_host(self, parameter: torch.nn.Parameter) -> Tensor:
        pinned = self._copies is not None
        host = torch.empty(parameter.shape, dtype=parameter.dtype, pin_memory=pinned)
        host.copy_(parameter.detach())
        parameter.data = host
        return host

    def _start(self, index: int) -> None:
        """Begins the copy of a layer to the device."""
        if index in self._arriving:
            return
        if self._copies is None:
            self._arriving[index] = ({p: host.clone() for p, host in self._host[index].items()}, None)
            return
        with torch.cuda.stream(self._copies):
            copies = {p: host.to(self._device, non_blocking=True) for p, host in self._host[index].items()}
        self._arriving[index] = (copies, self._copies.record_event())

    def before(self, index: int) -> None:
        """Puts a layer on the device, waiting for its copy, and begins that of the next layer."""
        self._start(index)
        copies, arrived = self._arriving.pop(index)
        if arrived is not None:
            torch.cuda.current_stream().wait_event(arrived)
        for parameter, copy in copies.items():
            if copy.is_cuda:
                # Made on the other stream: its memory must not be given away there while this one still reads it.
                copy.record_stream(torch.cuda.current_stream())
            parameter.data = copy
        if index + 1 < len(self._host):
            self._start(index + 1)

    def after(self, index: int) -> None:
        """Drops a layer's copy on the device."""
        for parameter, host in self._host[index].items():
            parameter.data = host
