"""Weights & Biases, for runs that ask for it. Project, entity and mode are W&B's own environment variables."""

import importlib
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_tgdpo.config.loading import to_dict
from megatron_tgdpo.config.schema import Config
from megatron_tgdpo.errors import UserError
from megatron_tgdpo.output.logger import Logger
from megatron_tgdpo.output.metrics import StepMetrics
from megatron_tgdpo.storage.atomic_file import write_atomically

_ID_FILE = "wandb_run"


def import_wandb() -> Any:
    """The ``wandb`` module.

    Raises:
        UserError: It is not installed.
    """
    try:
        return importlib.import_module("wandb")
    except ImportError as error:
        raise UserError(
            f"log.wandb is true but wandb cannot be imported ({error}): pip install wandb, or set log.wandb=false"
        ) from error


class WandbLog(Logger):
    """One W&B run for the whole of a training, however often it is interrupted.

    W&B drops steps that it has already, so those that are repeated after a resume do not appear twice. ``output_dir``
    keeps the W&B run's id, and W&B's files.
    """

    def __init__(self, config: Config, step: int) -> None:
        del step
        directory = Path(config.output_dir)
        id_file = directory / _ID_FILE
        if not id_file.exists():
            write_atomically(id_file, secrets.token_hex(4))
        self._run = import_wandb().init(
            id=id_file.read_text(encoding="utf-8"),
            name=directory.resolve().name,
            dir=str(directory),
            config=to_dict(config),
            resume="allow",
        )

    @classmethod
    def check(cls) -> None:
        """Raises a UserError if wandb is not installed."""
        import_wandb()

    def write(self, step: int, values: Mapping[str, float], evaluations: Mapping[str, StepMetrics]) -> None:
        """Writes a step's metrics."""
        del evaluations
        self._run.log(dict(values), step=step)

    def close(self) -> None:
        """Sends what is left."""
        self._run.finish()
