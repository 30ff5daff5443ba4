"""Keeps the layers of frozen models in host memory, or on disk, and brings each to the GPU just before it runs.

A frozen layer is used once per micro batch and never changes, so nothing is copied back: the device copy is dropped
after use. The next layer's copy is under way, on a stream of its own, while a layer runs; two layers are on the device
at most. Embeddings, the final norm and the output weight stay. On the CPU the same code runs without streams.

From disk a GPU's layers come the same way, out of memory that is mapped and not pinned. A CPU reads all weights of a
model where they are mapped, and gives the pages of each layer back when it has run.
"""

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from megatron_tgdpo.gpu.weight_file import MappedWeights, WeightFile


def serve_from_host(layers: Sequence[torch.nn.Module], device: torch.device) -> None:
    """Moves the layers of one model to pinned host memory, and attaches hooks that bring each to the device to run.

    The layers' hooks own all that this needs; it goes when they go.

    Args:
        layers: In the order in which they run; their parameters must not require gradients.
        device: Where they run.

    Raises:
        ValueError: A parameter requires gradients.
    """
    _refuse_trained(layers)
    _attach(_HostLayers(layers, device), layers)


def serve_from_disk(
    model: torch.nn.Module, layers: Sequence[torch.nn.Module], device: torch.device, directory: Path
) -> Callable[[], None]:
    """Moves a model's weights, on a GPU those of its layers, to a file, and has each layer's read when it is to run.

    Args:
        model: All of it.
        layers: In the order in which they run; no parameter of the model may require gradients.
        device: Where they run.
        directory: That the file's bytes are in; no name appears there.

    Returns:
        To be called when nobody reads the model's weights until its next pass: gives their pages back.

    Raises:
        ValueError: A parameter requires gradients.
        UserError: The file cannot be written.
    """
    _refuse_trained([model])
    file = WeightFile(directory)
    files = [file.hold(layer.parameters()) for layer in layers]
    if device.type == "cuda":
        _attach(_HostLayers(layers, device, files), layers)
        return lambda: None
    inside = {parameter for layer in layers for parameter in layer.parameters()}
    others = [parameter for parameter in model.parameters() if parameter not in inside]
    rest = file.hold(others)
    for parameters, held in zip([others, *(list(layer.parameters()) for layer in layers)], [rest, *files], strict=True):
        for parameter, mapped in zip(parameters, held.tensors, strict=True):
            parameter.data = mapped
    _attach(_MappedLayers(files), layers)
    return rest.release


def _refuse_trained(modules: Sequence[torch.nn.Module]) -> None:
    if any(parameter.requires_grad for module in modules for parameter in module.parameters()):
        raise ValueError("only frozen layers can be served from elsewhere: their gradients would be lost")


def _attach(served: "_HostLayers | _MappedLayers", layers: Sequence[torch.nn.Module]) -> None:
    for index, layer in enumerate(layers):
        layer.register_forward_pre_hook(lambda *_, index=index: served.before(index))
        layer.register_forward_hook(lambda *_, index=index: served.after(index))


class _MappedLayers:
    """The layers' parameters in a file that is read where it is mapped."""

    def __init__(self, files: Sequence[MappedWeights]) -> None:
        self._files = files

    def before(self, index: int) -> None:
        """Has the next layer read while this one runs."""
        if index + 1 < len(self._files):
            self._files[index + 1].expect()

    def after(self, index: int) -> None:
        self._files[index].release()


class _HostLayers:
    """The layers' parameters in host memory, or in a file that is mapped there, and those that are on the device."""

    def __init__(
        self, layers: Sequence[torch.nn.Module], device: torch.device, files: Sequence[MappedWeights] | None = None
    ) -> None:
        self._device, self._files = device, files
        self._copies = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._arriving: dict[int, tuple[dict[torch.nn.Parameter, Tensor], torch.cuda.Event | None]] = {}
        if files is None:
            self._host = [{parameter: self._to_host(parameter) for parameter in layer.parameters()} for layer in layers]
            return
        self._host = [
            dict(zip(layer.parameters(), held.tensors, strict=True)) for layer, held in zip(layers, files, strict=True)
        ]
        for index in range(len(layers)):
            self.after(index)

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
        if self._files is not None:
            self._files[index].release()
