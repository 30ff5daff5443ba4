"""Layers served from host memory or disk compute what they did, and are on the device only while they run."""

import errno
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_tgdpo.errors import UserError
from megatron_tgdpo.gpu.layer_offload import serve_from_disk, serve_from_host
from megatron_tgdpo.gpu.weight_file import WeightFile

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


def resident_file_bytes() -> int:
    """Of this process: pages of files that are mapped and in memory."""
    (line,) = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("RssFile")]
    return int(line.split()[1]) * 1024


def test_from_disk_the_results_are_the_same_and_pages_are_given_back(tmp_path: Path) -> None:
    size = 1024  # 4 MiB a weight
    net = torch.nn.Sequential(*(torch.nn.Linear(size, size, bias=number == 1) for number in range(4)))
    net = net.requires_grad_(False)
    x = torch.randn(2, size, generator=torch.Generator().manual_seed(1))
    wanted = net(x)
    during: list[int] = []
    release = serve_from_disk(net, list(net[:3]), CPU, tmp_path)
    assert list(tmp_path.iterdir()) == []
    before = resident_file_bytes()
    for layer in net:
        layer.register_forward_hook(lambda *_: during.append(resident_file_bytes() - before))
    for _ in range(2):
        assert torch.equal(net(x), wanted)
        release()
        assert resident_file_bytes() - before < 2**20
    # Hooks run in the order in which they were attached: the first three layers' pages are gone by then, and the
    # last, as an output weight, is nobody's but the caller's.
    assert max(during[:3]) < 2**20 < 3 * 2**20 < during[3]


def test_what_is_held_on_disk_is_what_was_given(tmp_path: Path) -> None:
    file = WeightFile(tmp_path)
    given = [torch.randn(3, 5), torch.randn(7).bfloat16(), torch.arange(9).view(3, 3).t(), torch.tensor(2.0)]
    for _ in range(2):
        held = file.hold(given)
        assert all(torch.equal(a, b) and a.dtype == b.dtype for a, b in zip(held.tensors, given, strict=True))


def test_a_full_disk_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file: Any = WeightFile(tmp_path)

    class Full:
        def __getattr__(self, name: str) -> Any:
            def fail(*_: Any) -> None:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

            return fail if name == "write" else lambda *_: 0

    monkeypatch.setattr(file, "_file", Full())
    with pytest.raises(UserError, match=rf"^{tmp_path}: the weights .* \(No space left on device\): make room"):
        file.hold([torch.zeros(3)])


def test_a_directory_that_cannot_be_is_said(tmp_path: Path) -> None:
    """As a UserError, which all ranks hear of: the others would wait for one that left with another."""
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"file/run: the weights of frozen models cannot be written there"):
        WeightFile(tmp_path / "file" / "run")


def test_weights_that_train_stay(tmp_path: Path) -> None:
    net = torch.nn.Sequential(torch.nn.Linear(2, 2).requires_grad_(False), torch.nn.Linear(2, 2))
    with pytest.raises(ValueError, match="only frozen layers"):
        serve_from_disk(net, [net[0]], CPU, tmp_path)


def test_a_file_of_no_weights_is_held(tmp_path: Path) -> None:
    """A stage between the first and the last has layers alone, as has a chunk."""
    file = WeightFile(tmp_path)
    for _ in range(2):
        held = file.hold([])
        assert held.tensors == []
        held.release()
    weight = torch.arange(5.0)
    assert torch.equal(file.hold([weight]).tensors[0], weight)
