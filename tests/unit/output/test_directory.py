"""The output directory belongs to one run."""

import builtins
import errno
import io
import os
import resource
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megatron_tgdpo.config.loading import config_from_dict, load_config
from megatron_tgdpo.errors import StorageError, UserError
from megatron_tgdpo.output.directory import claim_output_dir, is_done, mark_done, record_start
from megatron_tgdpo.storage.atomic_file import write_atomically
from tests.distributed.common import merged
from tests.unit.config.test_loading import VALID


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


def test_a_run_that_is_continued_with_other_values_is_done_no_more(tmp_path: Path) -> None:
    claim_and_step(tmp_path)
    mark_done(tmp_path / "run", 10)
    longer = values(tmp_path, train={"steps": 20})
    with pytest.raises(UserError, match=r"train\.steps 20, was 10"):
        is_done(config_from_dict(longer))
    asked = config_from_dict(merged(longer, train={"resume": "changed"}))
    assert not is_done(asked)
    claim_output_dir(asked)
    record_start(asked, {}, 10, 20)
    assert not (tmp_path / "run" / "DONE").exists()
    mark_done(tmp_path / "run", 20)
    assert is_done(config_from_dict(longer)), "config.yaml says what the run is by now"
    moved = merged(longer, model={"guide": "elsewhere"})
    assert not is_done(config_from_dict(moved)), "only its content tells whether it is another"


def test_an_unreadable_config_of_a_run_is_named(tmp_path: Path) -> None:
    claim_and_step(tmp_path)
    (tmp_path / "run" / "config.yaml").write_text("a: [1")
    with pytest.raises(UserError, match=r"run/config\.yaml:1: not valid YAML"):
        claim_output_dir(config_from_dict(values(tmp_path)))


@pytest.mark.parametrize("name", ["config.yaml", "inputs.json", "checkpoints", "tgdpo.json"])
def test_what_cannot_be_read_of_a_run_is_not_taken_for_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """Otherwise another run's config would be written over it, or compared with an older checkpoint's."""
    claim_and_step(tmp_path)
    run = tmp_path / "run"
    (run / "inputs.json").write_text("{}")
    (run / "checkpoints" / "step_00000001").mkdir(parents=True)
    before = (run / "config.yaml").read_bytes()

    def fails(function: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(path: Any, *args: Any, **kwargs: Any) -> Any:
            if Path(path).name == name:
                raise OSError(errno.EIO, "Input/output error")
            return function(path, *args, **kwargs)

        return wrapped

    for owner, function in ((Path, "open"), (Path, "read_bytes"), (os, "scandir"), (io, "open"), (builtins, "open")):
        monkeypatch.setattr(owner, function, fails(getattr(owner, function)))
    with pytest.raises(StorageError, match=rf"{name}: cannot be read: Input/output error"):
        claim_output_dir(config_from_dict(values(tmp_path, loss={"alpha": 0.9})))
    monkeypatch.undo()
    assert (run / "config.yaml").read_bytes() == before


def test_a_checkpoint_says_what_the_run_is_unless_it_is_damaged(tmp_path: Path) -> None:
    claim_and_step(tmp_path)
    checkpoint = tmp_path / "run" / "checkpoints" / "step_00000001"
    checkpoint.mkdir(parents=True)
    (checkpoint / "tgdpo.json").write_text('{"format_version": 1, "step": 1')
    claim_output_dir(config_from_dict(values(tmp_path)))
    with pytest.raises(UserError, match=r"run was made with other values: loss\.alpha"):
        claim_output_dir(config_from_dict(values(tmp_path, loss={"alpha": 0.9})))
    (checkpoint / "tgdpo.json").write_text('{"format_version": 99, "step": 1}')
    with pytest.raises(UserError, match="format_version is 99"):
        claim_output_dir(config_from_dict(values(tmp_path)))
