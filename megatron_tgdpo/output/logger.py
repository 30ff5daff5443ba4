"""What a logger is; metrics_log.py has a row for each."""

import abc
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from megatron_tgdpo.config.schema import Config
from megatron_tgdpo.output.metrics import StepMetrics


@dataclass(frozen=True)
class Sample:
    """An answer of the policy to a prompt.

    Attributes:
        group: Of the validation set, as its metrics have it.
        number: Of the prompt in the group, from 1.
        source: File and record of the pair whose prompt it is, as in error messages and the token report.
        prompt: As the policy gets it, with special tokens.
        answer: Without them.
        tokens: Of the answer, with the one that ended it.
        ended: Whether one did; else the answer was cut.
    """

    group: str
    number: int
    source: str
    prompt: str
    answer: str
    tokens: int
    ended: bool


@dataclass(frozen=True)
class LoggedStep:
    """What a run says of a step.

    Attributes:
        number: From 1.
        values: Metrics by name, with those of evaluations that followed it.
        evaluations: Those, by the group of their metrics, for their histograms.
        samples: Answers of the policy after the step.
    """

    number: int
    values: Mapping[str, float]
    evaluations: Mapping[str, StepMetrics] = field(default_factory=dict)
    samples: Sequence[Sample] = ()


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
