"""The energy that a GPU takes, by NVML's counter."""

import importlib
from typing import Any

import torch

from megatron_tgdpo.config.schema import Config
from megatron_tgdpo.errors import UserError, one_line

_MILLI = 1e-3


class EnergyMeter:
    """Counts what this rank's GPU takes in a step.

    Args:
        device: The rank's.

    Raises:
        UserError: There is no GPU, NVML's Python is not installed, or this GPU has no such counter (those before Volta,
            and parts of a GPU).
    """

    def __init__(self, device: torch.device) -> None:
        if device.type != "cuda":
            raise UserError("log.energy reads a GPU's counter, and this run is on the CPU: set it to false")
        try:
            self._nvml: Any = importlib.import_module("pynvml")
        except ImportError as error:
            raise UserError(
                "log.energy needs NVML's Python: pip install 'megatron-tgdpo[energy]', or set it to false"
            ) from error
        try:
            self._nvml.nvmlInit()
            # By UUID: NVML's numbers are those of the machine, torch's those that CUDA_VISIBLE_DEVICES leaves.
            uuid = f"GPU-{torch.cuda.get_device_properties(device).uuid}"
            self._handle = self._nvml.nvmlDeviceGetHandleByUUID(uuid)
            self.start()
        except self._nvml.NVMLError as error:
            raise UserError(
                f"log.energy: NVML does not tell the energy of {device} ({one_line(error)}): set it to false"
            ) from error

    def _counter(self) -> int:
        """mJ since the driver was loaded."""
        count: int = self._nvml.nvmlDeviceGetTotalEnergyConsumption(self._handle)
        return count

    def start(self) -> None:
        """Begins a step: what evaluations and saves took since the last one is not counted."""
        self._first = self._counter()

    def joules(self) -> float:
        """J since the last :meth:`start`."""
        return (self._counter() - self._first) * _MILLI


def check_energy(config: Config, device: torch.device) -> None:
    """Refuses ``log.energy`` where this rank's device has no such counter, before anything is loaded.

    Raises:
        UserError: As :class:`EnergyMeter`.
    """
    if config.log.energy:
        EnergyMeter(device)
