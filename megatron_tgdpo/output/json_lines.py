"""Files of the output directory with a JSON object a line, each with the number of its step."""

import abc
import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, ClassVar

from megatron_tgdpo.config.schema import Config
from megatron_tgdpo.output.logger import LoggedStep, Logger
from megatron_tgdpo.output.metrics_file import METRICS_FILE, parse_line


class JsonLines(Logger):
    """Appends a step's records, whole or to be cut off when the file is opened again.

    Attributes:
        name: Of the file.
    """

    name: ClassVar[str]

    def __init__(self, config: Config, step: int) -> None:
        path = Path(config.output_dir) / self.name
        # Unbuffered: what one write could not write would be written by the next.
        self._lines = open(path, "ab", buffering=0)  # noqa: SIM115 - kept open for the run
        try:
            # Needs no room, unlike a shorter copy.
            os.truncate(self._lines.fileno(), _end_of(path, step))
        except BaseException:
            self._lines.close()
            raise

    @abc.abstractmethod
    def records(self, step: LoggedStep) -> Iterable[Mapping[str, Any]]:
        """What is written of a step."""

    def write(self, step: LoggedStep) -> None:
        """Writes a step's records."""
        for record in self.records(step):
            text = json.dumps({"step": step.number, **record}, separators=(",", ":"))
            line = memoryview((text + "\n").encode())
            while line:
                line = line[self._lines.write(line) :]

    def close(self) -> None:
        """Closes the file."""
        self._lines.close()


class MetricsFile(JsonLines):
    """``metrics.jsonl``: one record a step."""

    name = METRICS_FILE

    def records(self, step: LoggedStep) -> Iterable[Mapping[str, Any]]:
        """The step's metrics."""
        return [step.values]


class SamplesFile(JsonLines):
    """``samples.jsonl``: one record an answer."""

    name = "samples.jsonl"

    def records(self, step: LoggedStep) -> Iterable[Mapping[str, Any]]:
        """The answers that followed the step."""
        return [asdict(sample) for sample in step.samples]


def _end_of(path: Path, step: int) -> int:
    """Bytes of a file up to the end of a step's records; steps follow one another in it."""
    end = 0
    with path.open("rb") as file:
        for line in file:
            record = parse_line(line)
            if record is None or record["step"] > step:
                break
            end += len(line)
    return end
