"""What layers save for backward waits elsewhere, is what it was, and is gone when it was used."""

from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from megatron_tgdpo.gpu.activation_offload import ActivationOffload

CPU = torch.device("cpu")
ROWS, WIDTH = 64, 32
TENSOR = ROWS * WIDTH * 4


class Layer(torch.nn.Module):
    """Saves its input, for the linear, and the product twice: for tanh, which saves its output, and the square."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = torch.nn.Linear(WIDTH, WIDTH)
        self.storages: list[StorageWeakRef] = []

    def forward(self, x: Tensor) -> Tensor:
        squashed = torch.tanh(self.linear(x))
        self.storages = [StorageWeakRef(squashed.untyped_storage())]
        return squashed * squashed + 1


class Block(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = torch.nn.ModuleList([Layer() for _ in range(3)])

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


def trained(block: Block, **hooks: Any) -> list[Tensor]:
    """The block's output and all gradients, of two passes before the first's backward, as a pipeline has them."""
    for each in hooks.values():
        each(block)
    generator = torch.Generator().manual_seed(1)
    inputs = [torch.randn(ROWS, WIDTH, generator=generator, requires_grad=True) for _ in range(2)]
    outputs = [block(x) for x in inputs]
    for output in outputs:
        output.sum().backward()
    return [*outputs, *(x.grad for x in inputs), *(weight.grad for weight in block.parameters())]  # type: ignore[misc]


def test_nothing_changes_to_the_bit() -> None:
    offloads = []
    wanted, block = trained(Block()), Block()
    found = trained(block, attach=lambda block: offloads.append(ActivationOffload(block, CPU, least_bytes=TENSOR)))
    assert all(torch.equal(one, other) for one, other in zip(found, wanted, strict=True))
    # Two passes through three layers, each with its input and what tanh gave; that is saved three times, and kept once.
    assert offloads[0].host_bytes == 2 * 3 * 2 * TENSOR


def test_what_waits_elsewhere_is_not_here_and_comes_a_layer_ahead() -> None:
    block, fetched = Block(), list[Any]()
    offload = ActivationOffload(block, CPU, least_bytes=TENSOR)
    block.layers[1].register_full_backward_pre_hook(lambda *_: fetched.append("backward of layer 1"))
    output = block(torch.randn(ROWS, WIDTH, requires_grad=True))
    assert all(storage.expired() for layer in block.layers for storage in layer.storages)
    begin = offload._fetch

    def fetch(waiting: Any) -> None:
        if waiting.back is None and waiting.host is not None:
            fetched.append(waiting.layer)
        begin(waiting)

    offload._fetch = fetch  # type: ignore[method-assign]
    output.sum().backward()
    # Layer 1's are on their way before its backward begins, layer 0's while it goes on; each comes once.
    assert fetched == [2, 2, 1, 1, "backward of layer 1", 0, 0]


def test_only_passes_with_gradients_and_large_tensors() -> None:
    block = Block()
    offload = ActivationOffload(block, CPU, least_bytes=TENSOR + 1)
    block(torch.randn(ROWS, WIDTH, requires_grad=True)).sum().backward()
    with torch.no_grad():
        block(torch.randn(2 * ROWS, WIDTH))
    assert offload.host_bytes == 0
    # Weights stay, however large: linears save them too.
    wide = ActivationOffload(block, CPU, least_bytes=WIDTH * WIDTH * 4)
    block(torch.randn(2, WIDTH, requires_grad=True)).sum().backward()
    assert wide.host_bytes == 0


def test_a_graph_that_is_dropped_within_a_layer_takes_no_other_with_it() -> None:
    class Dropping(Layer):
        def forward(self, x: Tensor) -> Tensor:
            (x * x).sum()
            return x * x

    results = []
    for attached in (False, True):
        block = Block()
        block.layers = torch.nn.ModuleList([Dropping()])
        offload = [ActivationOffload(block, CPU, least_bytes=TENSOR)] if attached else []
        x = torch.arange(float(ROWS * WIDTH)).view(ROWS, WIDTH).requires_grad_()
        block(x).sum().backward()
        results.append(x.grad)
        assert not offload or offload[0].host_bytes >= TENSOR
    assert torch.equal(results[0], results[1])  # type: ignore[arg-type]
