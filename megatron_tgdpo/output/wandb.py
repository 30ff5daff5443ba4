"""Weights & Biases, for runs that ask for it. Project, entity and mode are W&B's own environment variables."""

import secrets
from dataclasses import asdict

from megatron_tgdpo.config.loading import to_dict
from megatron_tgdpo.config.schema import Config
from megatron_tgdpo.output.logger import LoggedStep
from megatron_tgdpo.output.service import Service


class WandbLog(Service):
    """A W&B run with the name of the output directory, which has W&B's files."""

    name = "wandb"

    def open(self, config: Config, run_id: str | None) -> str:
        """Begins the run, or goes on with it."""
        run_id = run_id or secrets.token_hex(4)
        self._run = self.package().init(
            id=run_id,
            name=self.directory.resolve().name,
            dir=str(self.directory),
            config=to_dict(config),
            resume="allow",
        )
        return run_id

    def send(self, step: LoggedStep) -> None:
        """Logs a step's metrics, and answers as a table."""
        samples = [asdict(sample) for sample in step.samples]
        tables = {}
        if samples:
            rows = [list(sample.values()) for sample in samples]
            tables["eval/samples"] = self.package().Table(columns=list(samples[0]), data=rows)
        self._run.log({**step.values, **tables}, step=step.number)

    def finish(self) -> None:
        """Sends what is left."""
        self._run.finish()
