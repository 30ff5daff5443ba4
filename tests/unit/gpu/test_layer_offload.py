"""Layers served from host memory compute what they did, and are on the device only while they run."""

import pytest
import torch

from megatron_tgdpo.gpu.layer_offload import serve_from_host

CPU = torch.device("cpu")


class Layer(torch.nn.Module):
    """Notes where every layer's weights are while it runs."""

    def __init__(self, watch: list[list[bool]], layers: torch.nn.ModuleList) -> None:
        super().__init__()
        self.linear = torch.nn.Linear(8, 8)
        self._watch, self._others = watch, (layers,)
        self.host = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self._watch.append([layer.linear.weight.data_ptr() != layer.host for layer in self._others[0]])
        return torch.tanh(self.linear(x))


def model(watch: list[list[bool]]) -> torch.nn.ModuleList:
    torch.manual_seed(0)
    layers = torch.nn.ModuleList()
    layers.extend([Layer(watch, layers) for _ in range(3)])
    return layers.requires_grad_(False)


def run(layers: torch.nn.ModuleList, x: torch.Tensor) -> torch.Tensor:
    for layer in layers:
        x = layer(x)
    return x


def test_the_same_results_with_one_layer_on_the_device_at_a_time() -> None:
    watch: list[list[bool]] = []
    x = torch.randn(4, 8, generator=torch.Generator().manual_seed(1))
    wanted = run(model([]), x)
    layers = model(watch)
    serve_from_host(list(layers), CPU)
    for layer in layers:
        layer.host = layer.linear.weight.data_ptr()
    for _ in range(2):
        assert torch.equal(run(layers, x), wanted)
    # Elsewhere than in host memory is the layer that runs, and no other.
    assert watch == 2 * [[i == j for j in range(3)] for i in range(3)]
    assert all(layer.linear.weight.data_ptr() == layer.host for layer in layers)


def test_layers_that_train_are_refused() -> None:
    with pytest.raises(ValueError, match="only frozen layers"):
        serve_from_host([torch.nn.Linear(2, 2)], CPU)
