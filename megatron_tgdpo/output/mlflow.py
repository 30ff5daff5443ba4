"""MLflow, for runs that ask for it. Server and experiment are MLflow's own environment variables."""

import json
import os
import time
from dataclasses import asdict
from typing import Any

from megatron_tgdpo.config.loading import to_dict
from megatron_tgdpo.config.resume_compatibility import flatten
from megatron_tgdpo.config.schema import Config
from megatron_tgdpo.output.logger import LoggedStep
from megatron_tgdpo.output.service import Service

EXPERIMENT = "megatron_tgdpo"
# Parameters of a request, and characters of one.
_MOST, _LONGEST = 100, 500


class MlflowLog(Service):
    """An MLflow run with the name of the output directory, which has its database where no server is named."""

    name = "mlflow"

    def open(self, config: Config, run_id: str | None) -> str:
        """Begins the run, or goes on with it."""
        mlflow = self.package()
        self._entities = mlflow.entities
        here = self.directory.resolve()
        server = os.environ.get("MLFLOW_TRACKING_URI")
        self._client: Any = mlflow.MlflowClient(tracking_uri=server or f"sqlite:///{here / 'mlflow.db'}")
        if run_id is None:
            experiment = os.environ.get("MLFLOW_EXPERIMENT_NAME") or EXPERIMENT
            found = self._client.get_experiment_by_name(experiment)
            if found is None:
                artifacts = None if server else (here / "mlartifacts").as_uri()
                experiment_id = self._client.create_experiment(experiment, artifact_location=artifacts)
            else:
                experiment_id = found.experiment_id
            run_id = self._client.create_run(experiment_id, run_name=here.name).info.run_id
        else:
            self._client.set_terminated(run_id, status="RUNNING")
        # Parameters cannot change in MLflow: those of the first start stay.
        known = self._client.get_run(run_id).data.params
        values = {key: str(value)[:_LONGEST] for key, value in flatten(to_dict(config)).items() if value is not None}
        new = [mlflow.entities.Param(key, value) for key, value in values.items() if key not in known]
        for start in range(0, len(new), _MOST):
            self._client.log_batch(run_id, params=new[start : start + _MOST])
        self._run_id: str = run_id
        return run_id

    def send(self, step: LoggedStep) -> None:
        """Logs a step's metrics, and answers as a file."""
        now = int(1000 * time.time())
        metrics = [self._entities.Metric(name, value, now, step.number) for name, value in step.values.items()]
        if step.samples:
            lines = "".join(json.dumps(asdict(sample)) + "\n" for sample in step.samples)
            self._client.log_text(self._run_id, lines, f"samples/step_{step.number:08d}.jsonl")
        self._client.log_batch(self._run_id, metrics=metrics)

    def finish(self) -> None:
        """Says that the run has ended."""
        self._client.set_terminated(self._run_id)
