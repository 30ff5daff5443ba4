"""The energy meter reads NVML by its real functions: their names and units are those of nvidia-ml-py."""

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist

from megatron_tgdpo.config.loading import config_from_dict
from megatron_tgdpo.distributed.ranks import RankEnvironment
from megatron_tgdpo.errors import AgreedError, UserError
from megatron_tgdpo.gpu.energy import EnergyMeter
from megatron_tgdpo.training.run import run
from tests.published_configs import PUBLISHED, write_config
from tests.unit.config.test_loading import VALID

CUDA = torch.device("cuda", 0)


class NVMLError(Exception):
    pass


class Nvml:
    """As much of pynvml as there is to ask: mJ that only grow, of the device with this UUID."""

    NVMLError = NVMLError

    def __init__(self, counter: list[int], fails: str = "") -> None:
        self.counter, self.fails, self.asked = counter, fails, []

    def nvmlInit(self) -> None:
        self._say("nvmlInit")

    def nvmlDeviceGetHandleByUUID(self, uuid: str) -> str:
        self._say(uuid)
        return f"handle of {uuid}"

    def nvmlDeviceGetTotalEnergyConsumption(self, handle: str) -> int:
        self._say(handle)
        return self.counter.pop(0)

    def _say(self, what: str) -> None:
        self.asked.append(what)
        if self.fails and what.startswith(self.fails):
            raise NVMLError("Not Supported")


@pytest.fixture(autouse=True)
def _device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(uuid="4-2"))


def test_joules_of_steps_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Between two steps an evaluation takes 9 kJ."""
    nvml: Any = Nvml([0, 1_000_000, 1_350_500, 10_350_500, 10_360_500])
    monkeypatch.setitem(sys.modules, "pynvml", nvml)
    meter = EnergyMeter(CUDA)
    found = []
    for _ in range(2):
        meter.start()
        found.append(meter.joules())
    assert found == [pytest.approx(350.5), pytest.approx(10.0)]
    assert nvml.asked == ["nvmlInit", "GPU-4-2", *5 * ["handle of GPU-4-2"]]


@pytest.mark.parametrize("fails", ["nvmlInit", "GPU-4-2", "handle"])
def test_what_has_no_counter_is_refused(monkeypatch: pytest.MonkeyPatch, fails: str) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", Nvml([1], fails))
    with pytest.raises(UserError, match=r"log.energy: NVML does not tell the energy of cuda:0 \(Not Supported\)"):
        EnergyMeter(CUDA)


def test_without_a_gpu_or_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match=r"log.energy reads a GPU's counter, and this run is on the CPU"):
        EnergyMeter(torch.device("cpu"))
    monkeypatch.setitem(sys.modules, "pynvml", None)
    with pytest.raises(UserError, match=r"pip install 'megatron-tgdpo\[energy\]'"):
        EnergyMeter(CUDA)


def test_the_real_package_has_these_names() -> None:
    pynvml = pytest.importorskip("pynvml")
    for name in ("nvmlInit", "nvmlDeviceGetHandleByUUID", "nvmlDeviceGetTotalEnergyConsumption"):
        assert callable(getattr(pynvml, name))
    assert issubclass(pynvml.NVMLError, Exception)


def test_a_run_without_a_counter_ends_before_anything_is_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Data and weights are not even there."""
    (tmp_path / "model").mkdir()
    model = write_config(tmp_path / "model", PUBLISHED["Llama-3.2-3B"])
    values = {
        "model": {"policy": str(model)},
        "loss": {"method": "sft"},
        "parallel": {"device": "cpu"},
        "log": {"energy": True},
        "output_dir": str(tmp_path / "run"),
    }
    config = config_from_dict({**VALID, **values})
    monkeypatch.setattr("megatron_tgdpo.training.run.enable_cpu_backend", lambda: None)
    with pytest.raises(AgreedError, match=r"log.energy reads a GPU's counter, and this run is on the CPU"):
        run(config, RankEnvironment(0, 1, 0, None, None), dist.HashStore())
    assert not (tmp_path / "run").exists()
