"""SwanLab, for runs that ask for it. Workspace and mode are SwanLab's own environment variables."""

import secrets

from megatron_tgdpo.config.loading import to_dict
from megatron_tgdpo.config.schema import Config
from megatron_tgdpo.output.logger import LoggedStep
from megatron_tgdpo.output.service import Service

PROJECT = "megatron_tgdpo"


class SwanLabLog(Service):
    """A SwanLab run with the name of the output directory, which has SwanLab's files."""

    name = "swanlab"

    def open(self, config: Config, run_id: str | None) -> str:
        """Begins the run, or goes on with it."""
        run_id = run_id or secrets.token_hex(8)
        self._run = self.package().init(
            id=run_id,
            project=PROJECT,
            name=self.directory.resolve().name,
            log_dir=str(self.directory / "swanlog"),
            config=to_dict(config),
            resume="allow",
        )
        return run_id

    def send(self, step: LoggedStep) -> None:
        """Logs a step's metrics, and answers as texts."""
        text = self.package().Text
        texts = {f"{each.group}/samples/{each.number}": text(each.answer, caption=each.prompt) for each in step.samples}
        self._run.log({**step.values, **texts}, step=step.number)

    def finish(self) -> None:
        """Sends what is left."""
        self._run.finish()
