"""Hands a run's steps to all of its loggers."""

import contextlib
import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_tgdpo.config.schema import Config
from megatron_tgdpo.output.json_lines import MetricsFile, SamplesFile
from megatron_tgdpo.output.logger import LoggedStep, Logger, Sample
from megatron_tgdpo.output.metrics import StepMetrics
from megatron_tgdpo.output.mlflow import MlflowLog
from megatron_tgdpo.output.swanlab import SwanLabLog
from megatron_tgdpo.output.tensorboard import TensorBoard
from megatron_tgdpo.output.wandb import WandbLog
from megatron_tgdpo.storage.files import write_error

logger = logging.getLogger(__name__)

_RETRY_SECONDS = 60.0


@dataclass(frozen=True)
class LoggerKind:
    """A logger.

    Attributes:
        logger: The class.
        wanted: Whether a run has it.
        on_disk: It writes to the output directory, and the run's steps are not done before it has them: what a full
            disk refuses is kept and written again. Others get every step once, and look after themselves.
    """

    logger: type[Logger]
    wanted: Callable[[Config], bool]
    on_disk: bool


LOGGERS: dict[str, LoggerKind] = {
    MetricsFile.name: LoggerKind(MetricsFile, lambda config: True, on_disk=True),
    "tensorboard": LoggerKind(TensorBoard, lambda config: True, on_disk=True),
    SamplesFile.name: LoggerKind(SamplesFile, lambda config: config.eval.generate.prompts > 0, on_disk=True),
    WandbLog.name: LoggerKind(WandbLog, lambda config: config.log.wandb, on_disk=False),
    MlflowLog.name: LoggerKind(MlflowLog, lambda config: config.log.mlflow, on_disk=False),
    SwanLabLog.name: LoggerKind(SwanLabLog, lambda config: config.log.swanlab, on_disk=False),
}


def check_loggers(config: Config) -> None:
    """Checks that the loggers of a run can be had, before anything is loaded.

    Raises:
        UserError: One cannot; the message names its key.
    """
    for kind in LOGGERS.values():
        if kind.wanted(config):
            kind.logger.check()


def _open(config: Config, step: int, *, on_disk: bool) -> Iterator[Logger]:
    for kind in LOGGERS.values():
        if kind.on_disk == on_disk and kind.wanted(config):
            yield kind.logger(config, step)


class MetricsLog:
    """Gives each step to the run's loggers.

    Steps that cannot be written, as on a full disk, are kept and written later; :meth:`check` says whether all are.

    Args:
        config: The run.
        step: Last completed step; what an interrupted run logged after it is cut off, so no step appears twice.

    Raises:
        UserError: A logger cannot be opened, or write its files; a StorageError where that may pass.
    """

    def __init__(self, config: Config, step: int) -> None:
        self._config = config
        self._directory = Path(config.output_dir)
        on_disk = [name for name, kind in LOGGERS.items() if kind.on_disk and kind.wanted(config)]
        self._what = f"{config.output_dir}: {' or '.join(on_disk)}"
        self._written = step
        self._unwritten: list[LoggedStep] = []
        self._files: _Files | None = None
        self._failure: OSError | None = None
        self._failed_at = 0.0
        try:
            self._others = list(_open(config, step, on_disk=False))
        except OSError as error:
            raise write_error(self._directory, error) from error
        self._try()

    def write(
        self,
        step: int,
        values: dict[str, float],
        evaluations: Mapping[str, StepMetrics] | None = None,
        samples: Sequence[Sample] = (),
    ) -> None:
        """Logs a step.

        Args:
            step: Its number.
            values: Its metrics, with those of evaluations that followed it.
            evaluations: Those, by the group of their metrics, for their histograms.
            samples: Answers of the policy after the step.
        """
        logged = LoggedStep(step, values, evaluations or {}, samples)
        self._unwritten.append(logged)
        # Each attempt begins an event file.
        if self._failure is None or time.monotonic() - self._failed_at > _RETRY_SECONDS:
            self._try()
        for other in self._others:
            other.write(logged)

    def check(self) -> None:
        """Writes what could not be written before. Call it before a checkpoint is saved: a run that continues from
        there does not make its steps again.

        Raises:
            StorageError: It still cannot be written.
            UserError: Nor will it be: the directory does not let this process write.
        """
        if self._failure is not None:
            self._try()
        if self._failure is not None:
            raise write_error(self._what, self._failure)

    def close(self) -> None:
        """Closes the files; what :meth:`check` did not get written is lost."""
        with contextlib.suppress(OSError):
            if self._files is not None:
                self._files.close()
        for other in self._others:
            other.close()

    def _try(self) -> None:
        try:
            if self._files is None:
                # As when a run continues: what a failed write left behind the last whole step goes.
                self._files = _Files(self._config, self._written)
            while self._unwritten:
                self._files.write(self._unwritten[0])
                self._written = self._unwritten.pop(0).number
            self._failure = None
        except OSError as error:
            if self._failure is None:
                logger.warning(
                    "%s: cannot be written (%s): metrics are kept and written later",
                    self._what,
                    error.strerror or error,
                )
            self._failure, self._failed_at = error, time.monotonic()
            if self._files is not None:
                with contextlib.suppress(OSError):
                    self._files.close()
                self._files = None


class _Files:
    """The files of a log, open; any error leaves them to be closed and opened again.

    Args:
        config: The run.
        step: The last step that is whole in them; what follows it is removed.

    Raises:
        OSError: They cannot be opened; as by every method.
    """

    def __init__(self, config: Config, step: int) -> None:
        self._loggers: list[Logger] = []
        try:
            for opened in _open(config, step, on_disk=True):
                self._loggers.append(opened)
        except BaseException:
            self.close()
            raise

    def write(self, step: LoggedStep) -> None:
        for each in self._loggers:
            each.write(step)

    def close(self) -> None:
        with contextlib.ExitStack() as closing:
            for each in self._loggers:
                closing.callback(each.close)
