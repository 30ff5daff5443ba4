"""A launcher learns whether a run is finished, and when restarts no longer help."""

import json
from pathlib import Path

import pytest

from megatron_tgdpo.checkpoints import listing, manifest
from megatron_tgdpo.config.loading import config_from_dict
from megatron_tgdpo.errors import AgreedError, AgreedStorageError, BadNodeError, StorageError, UserError
from megatron_tgdpo.output.directory import claim_output_dir, is_done, mark_done
from megatron_tgdpo.resilience import requeue
from megatron_tgdpo.signals import StoppedEarly
from tests.unit.output.test_directory import values


@pytest.fixture
def at_step(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Says in a file which step the newest checkpoint is of."""
    file = tmp_path / "step"
    monkeypatch.setattr(listing, "newest_checkpoint", lambda output_dir: file)
    monkeypatch.setattr(manifest, "read_metadata", lambda path: {"step": int(path.read_text())})
    return file


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (StoppedEarly("stopped"), 75), (KeyboardInterrupt(), 130), (BadNodeError("x"), 76), (StorageError("x"), 74),
        (AgreedStorageError("x"), 74), (UserError("x"), 1), (AgreedError("x"), 1), (RuntimeError("x"), 70),
    ],
)  # fmt: skip
def test_exit_status(error: BaseException, status: int) -> None:
    assert requeue.exit_status(error) == status


def test_restarts_at_one_step_are_limited(at_step: Path, tmp_path: Path) -> None:
    at_step.write_text("8")
    assert [requeue.count_restart(tmp_path / "run", "7", limit=2) for _ in range(3)] == [0, 1, 2]
    with pytest.raises(UserError, match=r"restarted 2 times without a new checkpoint \(still at step 8\)"):
        requeue.count_restart(tmp_path / "run", "7", limit=2)
    assert requeue.count_restart(tmp_path / "run", "8", limit=2) == 0, "submitting again counts anew"


def test_a_new_checkpoint_counts_anew(at_step: Path, tmp_path: Path) -> None:
    counts = []
    for step in ("8", "8", "9", "9"):
        at_step.write_text(step)
        counts.append(requeue.count_restart(tmp_path / "run", "7", limit=1))
    assert counts == [0, 1, 0, 1]


def test_only_the_very_run_is_done(tmp_path: Path) -> None:
    config = config_from_dict(values(tmp_path))
    claim_output_dir(config)
    assert not is_done(config)
    mark_done(tmp_path / "run", 5)
    assert is_done(config)
    with pytest.raises(UserError, match=r"loss\.alpha"):
        is_done(config_from_dict(values(tmp_path, loss={"alpha": 0.9})))


def test_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "config.yaml").write_text(json.dumps(values(tmp_path)))
    monkeypatch.setattr("sys.argv", ["restarts", str(tmp_path / "config.yaml"), "--job", "7"])
    assert requeue.main() == 0
    assert capsys.readouterr().out.strip() == str(tmp_path / "run")
    claim_output_dir(config_from_dict(values(tmp_path)))
    mark_done(tmp_path / "run", 5)
    assert requeue.main() == requeue.FINISHED_STATUS
    monkeypatch.setattr("sys.argv", ["restarts", str(tmp_path / "config.yaml"), "loss.betta=1"])
    assert requeue.main() == 1
    assert capsys.readouterr().err.startswith("error: ")
