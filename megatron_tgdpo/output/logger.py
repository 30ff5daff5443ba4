"""What a logger is; metrics_log.py has a row for each."""

import abc
from collections.abc import Mapping
from dataclasses import dataclass, field

from megatron_tgdpo.config.schema import Config
from megatron_tgdpo.output.metrics import StepMetrics


@dataclass(frozen=True)
class LoggedStep:
    """What a run says of a step.

    Attributes:
        number: From 1.
        values: Metrics by name, with those of evaluations that followed it.
        evaluations: Those, by the group of their metrics, for their histograms.
    """

    number: int
    values: Mapping[str, float]
    evaluations: Mapping[str, StepMetrics] = field(default_factory=dict)


class Logger(abc.ABC):
    """Writes a run's steps somewhere, on the first rank only.

    Args:
        config: The run.
        step: Last completed step. What an interrupted run wrote after it is made again, and must not appear twice.

    Raises:
        OSError: A file cannot be written; as by every method.
    """

    @abc.abstractmethod
    def __init__(self, config: Config, step: int) -> None: ...

    @classmethod  # noqa: B027 - most need nothing
    def check(cls) -> None:
        """Raises a UserError where what it needs is not installed; called before the models are loaded."""

    @abc.abstractmethod
    def write(self, step: LoggedStep) -> None:
        """Writes a step."""

    @abc.abstractmethod
    def close(self) -> None:
        """Writes what is left."""
