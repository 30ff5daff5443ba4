"""Services get every step once, in one run, whatever becomes of the training and of the service.

The last tests write to the real packages where they are installed, without a server.
"""

import json
import sys
import threading
import types
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from megatron_tgdpo.config.loading import config_from_dict
from megatron_tgdpo.config.schema import Config
from megatron_tgdpo.errors import UserError
from megatron_tgdpo.output import service
from megatron_tgdpo.output.logger import Sample
from megatron_tgdpo.output.metrics_log import LOGGERS, MetricsLog, check_loggers
from tests.launch import PATIENCE
from tests.unit.config.test_loading import VALID

SERVICES = ("wandb", "mlflow", "swanlab")


def make_config(directory: Path, **log: Any) -> Config:
    data = {**VALID["data"], "validation": "more.jsonl"}
    return config_from_dict({**VALID, "data": data, "output_dir": str(directory), "log": log})


@pytest.fixture(autouse=True)
def patience(monkeypatch: pytest.MonkeyPatch) -> None:
    """A busy machine takes its time."""
    for name in ("_OPEN_SECONDS", "_CLOSE_SECONDS"):
        monkeypatch.setattr(service, name, PATIENCE)


SAMPLE = Sample("eval", 1, "pairs.jsonl:8", "Hello?", "Hello.", 3, True)


def log_steps(config: Config, done: int, steps: range, samples: Sequence[Sample] = ()) -> None:
    log = MetricsLog(config, done)
    for step in steps:
        log.write(step, {"train/loss": float(step), "rewards/margins": 0.5}, samples=samples)
    log.close()


class FakeWandb:
    """What W&B's package does: a run by its id, in which a test may let calls fail."""

    def __init__(self) -> None:
        self.calls: list[Any] = []
        self.failing: set[str] = set()
        self.failed = threading.Event()

    def may(self, what: str) -> None:
        assert threading.current_thread() is not threading.main_thread()
        if what in self.failing:
            self.failed.set()
            raise ConnectionError(f"no {what}\ntoday")

    def init(self, **arguments: Any) -> "FakeWandb":
        self.may("init")
        self.calls.append((arguments["id"], arguments["resume"], arguments["config"]["loss"]["alpha"]))
        return self

    def log(self, values: dict[str, float], step: int) -> None:
        self.may("log")
        self.calls.append((step, values["train/loss"]))

    def finish(self) -> None:
        self.calls.append("finished")


@pytest.fixture
def wandb(monkeypatch: pytest.MonkeyPatch) -> FakeWandb:
    fake = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=fake.init))
    return fake


@pytest.mark.parametrize("sent_before_the_kill", [3, 5])
def test_one_run_has_every_step_once(tmp_path: Path, wandb: FakeWandb, sent_before_the_kill: int) -> None:
    """Killed after step 5, of which it may have sent fewer; its newest checkpoint was of step 3."""
    config = make_config(tmp_path, wandb=True)
    log_steps(config, 0, range(1, sent_before_the_kill + 1))
    run_id, sent = (tmp_path / "wandb_run").read_text().split()
    assert int(sent) == sent_before_the_kill
    log_steps(config, 3, range(4, 7))
    begun = (run_id, "allow", 0.5)
    steps = [(step, float(step)) for step in range(1, 7)]
    assert [call for call in wandb.calls if call not in (begun, "finished")] == steps
    assert (wandb.calls.count(begun), wandb.calls.count("finished")) == (2, 2)


def test_a_run_of_before_has_its_id_alone(tmp_path: Path, wandb: FakeWandb) -> None:
    (tmp_path / "wandb_run").write_text("0123abcd")
    log_steps(make_config(tmp_path, wandb=True), 2, range(3, 4))
    assert wandb.calls == [("0123abcd", "allow", 0.5), (3, 3.0), "finished"]


def test_a_service_that_fails_ends_no_training_and_gets_all_later(
    tmp_path: Path, wandb: FakeWandb, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(service, "_RETRY_SECONDS", 0.01)
    log = MetricsLog(make_config(tmp_path, wandb=True), 0)
    wandb.failing.add("log")
    for step in (1, 2):
        log.write(step, {"train/loss": float(step)})
    assert wandb.failed.wait(60)
    log.check()
    wandb.failing.clear()
    log.write(3, {"train/loss": 3.0})
    log.close()
    assert wandb.calls[1:] == [(1, 1.0), (2, 2.0), (3, 3.0), "finished"]
    assert [record.getMessage() for record in caplog.records] == [
        "log.wandb: no log today: metrics are kept and sent later"
    ]
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 3


def test_what_is_lost_is_said(tmp_path: Path, wandb: FakeWandb, caplog: pytest.LogCaptureFixture) -> None:
    config = make_config(tmp_path, wandb=True)
    log = MetricsLog(config, 0)
    wandb.failing.add("log")
    log.write(1, {"train/loss": 1.0})
    log.close()
    assert "log.wandb: step 1 and later are lost (no log today)" in caplog.text


def test_a_service_that_cannot_be_opened_ends_only_a_run_without_steps(
    tmp_path: Path, wandb: FakeWandb, caplog: pytest.LogCaptureFixture
) -> None:
    config = make_config(tmp_path, wandb=True)
    wandb.failing.add("init")
    with pytest.raises(UserError, match=r"log\.wandb is true but wandb cannot begin a run \(no init today\)"):
        MetricsLog(config, 0)
    log = MetricsLog(config, 4)
    assert "log.wandb: cannot be opened (no init today)" in caplog.text
    wandb.failing.clear()
    log.write(5, {"train/loss": 5.0})
    log.close()
    assert wandb.calls[1:] == [(5, 5.0), "finished"]


def test_a_service_that_hangs_is_not_waited_for(
    tmp_path: Path, wandb: FakeWandb, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(service, "_CLOSE_SECONDS", 0.1)
    go_on = threading.Event()
    monkeypatch.setattr(wandb, "may", lambda what: what == "log" and go_on.wait())
    log_steps(make_config(tmp_path, wandb=True), 0, range(1, 3))
    assert "log.wandb: not everything is sent" in caplog.text
    go_on.set()


@pytest.mark.parametrize("name", SERVICES)
def test_a_package_that_is_not_there_is_named(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setitem(sys.modules, name, None)
    config = make_config(Path("run"), **{name: True})
    with pytest.raises(
        UserError, match=rf"^log\.{name} is true but {name} cannot be imported .*pip install {name}, or"
    ):
        check_loggers(config)
    assert LOGGERS[name].wanted(config)


def test_wandb_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    config = make_config(tmp_path, wandb=True)
    log_steps(config, 0, range(1, 4), [SAMPLE])
    log_steps(config, 2, range(3, 6), [SAMPLE])
    assert (tmp_path / "wandb_run").read_text().split()[1] == "5"
    assert len(list((tmp_path / "wandb").glob("offline-run-*/*.wandb"))) == 2
    assert len(list((tmp_path / "wandb").glob("offline-run-*/files/media/table/eval/*.table.json"))) == 5


def test_mlflow_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mlflow = pytest.importorskip("mlflow")
    pytest.importorskip("sqlalchemy")
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.chdir(tmp_path)
    run = tmp_path / "run"
    run.mkdir()
    config = make_config(run, mlflow=True)
    log_steps(config, 0, range(1, 4), [SAMPLE])
    log_steps(config, 2, range(3, 6), [SAMPLE])
    client = mlflow.MlflowClient(tracking_uri=f"sqlite:///{run / 'mlflow.db'}")
    run_id = (run / "mlflow_run").read_text().split()[0]
    history = client.get_metric_history(run_id, "train/loss")
    assert [(metric.step, metric.value) for metric in history] == [(step, float(step)) for step in range(1, 6)]
    assert [item.path for item in client.list_artifacts(run_id, "samples")][-1] == "samples/step_00000005.jsonl"
    found = client.get_run(run_id)
    assert (found.info.run_name, found.info.status, found.data.params["loss.alpha"]) == ("run", "FINISHED", "0.5")
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_swanlab_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("swanlab")
    monkeypatch.setenv("SWANLAB_MODE", "offline")
    monkeypatch.chdir(tmp_path)
    run = tmp_path / "run"
    run.mkdir()
    config = make_config(run, swanlab=True)
    log_steps(config, 0, range(1, 4), [SAMPLE])
    log_steps(config, 2, range(3, 6), [SAMPLE])
    run_id, sent = (run / "swanlab_run").read_text().split()
    assert sent == "5"
    assert len(list((run / "swanlog").glob(f"run-*-{run_id}"))) == 2
    assert len(list((run / "swanlog").glob("run-*/media/**/*.txt"))) == 5
    assert [path.name for path in tmp_path.iterdir()] == ["run"]
    assert len([json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]) == 5
