"""The output directory belongs to one run."""

import resource
from pathlib import Path
from typing import Any

import pytest

from megatron_tgdpo.config import config_from_dict, load_config
from megatron_tgdpo.errors import StorageError, UserError
from megatron_tgdpo.run_directory import claim_output_dir, write_atomically
from tests.unit.test_config import VALID


def values(tmp_path: Path, **sections: Any) -> dict[str, Any]:
    changed = {name: dict(v) if isinstance(v, dict) else v for name, v in VALID.items()}
    for name, section in sections.items():
        changed[name] = {**changed.get(name, {}), **section}
    return {**changed, "output_dir": str(tmp_path / "run")}


def claim_and_step(tmp_path: Path) -> None:
    claim_output_dir(config_from_dict(values(tmp_path)))
    (tmp_path / "run" / "metrics.jsonl").write_text('{"step": 1}\n')


def test_a_run_that_made_no_step_may_be_configured_anew(tmp_path: Path) -> None:
    claim_output_dir(config_from_dict(values(tmp_path)))
    claim_output_dir(config_from_dict(values(tmp_path, loss={"alpha": 0.9})))
    assert load_config(tmp_path / "run" / "config.yaml").loss.alpha == 0.9


def test_the_same_run_may_come_back_on_another_layout(tmp_path: Path) -> None:
    claim_and_step(tmp_path)
    again = values(tmp_path, parallel={"tensor": 2}, checkpoint={"keep": 5}, train={"exit_step": 3})
    claim_output_dir(config_from_dict(again))


@pytest.mark.parametrize(
    ("section", "changes", "named"),
    [
        ("loss", {"alpha": 0.9}, "loss.alpha"),
        ("model", {"guide": "other"}, "model.guide"),
        ("train", {"seed": 5}, "train.seed"),
        ("batch", {"global_pairs": 16}, "batch.global_pairs"),
        ("optimizer", {"lr": 1e-3}, "optimizer.lr"),
    ],
)
def test_another_run_is_refused(tmp_path: Path, section: str, changes: dict[str, Any], named: str) -> None:
    claim_and_step(tmp_path)
    with pytest.raises(UserError, match=named):
        claim_output_dir(config_from_dict(values(tmp_path, **{section: changes})))


def test_a_full_disk_leaves_the_file_that_was_there(tmp_path: Path) -> None:
    file = tmp_path / "file.json"
    write_atomically(file, "before")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, hard))
    try:
        with pytest.raises(StorageError, match=r"file\.json: cannot be written: File too large"):
            write_atomically(file, "after" * 1000)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {"file.json": "before"}
