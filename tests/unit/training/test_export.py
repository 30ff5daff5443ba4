"""When a checkpoint of a run is exported, and what is said when that fails; the exporter itself is a stand-in."""

import os
import shlex
from collections.abc import Callable
from pathlib import Path

import pytest

from megatron_tgdpo.config.schema import ExportKind
from megatron_tgdpo.errors import AgreedError, AgreedStorageError, StorageError, UserError
from megatron_tgdpo.training.export import export

pytestmark = pytest.mark.usefixtures("one_rank")


class Exports:
    """Writes a directory that is as new as the clock says, and counts."""

    def __init__(self) -> None:
        self.made: list[str] = []

    def __call__(self, checkpoint: Path, out: Path, group: object, *, verify: bool, kind: str) -> None:
        assert not out.exists()
        out.mkdir(parents=True)
        (out / ("adapter_config.json" if kind == "adapter" else "config.json")).write_text("{}")
        self.made.append(out.name)


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    path = tmp_path / "a run" / "checkpoints" / "step_00000004"
    path.mkdir(parents=True)
    (path / "tgdpo.json").write_text("{}")
    return path


def export_it(exporter: Callable[..., None], checkpoint: Path, kind: ExportKind = "model") -> Path:
    return export(exporter, checkpoint.parent.parent, checkpoint, verify=True, kind=kind)


def test_a_checkpoint_is_exported_once(checkpoint: Path) -> None:
    exports = Exports()
    assert export_it(exports, checkpoint) == export_it(exports, checkpoint)
    assert exports.made == ["step_00000004"]


def test_an_export_of_a_step_that_was_made_again_is_replaced(checkpoint: Path) -> None:
    exports = Exports()
    out = export_it(exports, checkpoint)
    (out / "left.txt").write_text("of the first")
    later = (out / "config.json").stat().st_mtime_ns + 10**9
    os.utime(checkpoint / "tgdpo.json", ns=(later, later))
    export_it(exports, checkpoint)
    assert len(exports.made) == 2
    assert [file.name for file in out.iterdir()] == ["config.json"]
    assert [path.name for path in out.parent.iterdir()] == [out.name]


def test_an_adapter_gives_way_to_a_whole_model(checkpoint: Path) -> None:
    exports = Exports()
    assert export_it(exports, checkpoint, "adapter") == (out := export_it(exports, checkpoint, "adapter"))
    assert len(exports.made) == 1
    export_it(exports, checkpoint, "merged")
    assert [file.name for file in out.iterdir()] == ["config.json"]


@pytest.mark.parametrize(("raised", "kind"), [(UserError, AgreedError), (StorageError, AgreedStorageError)])
def test_a_failure_says_how_to_export_by_hand(checkpoint: Path, raised: type[UserError], kind: type) -> None:
    def fails(*arguments: object, **options: object) -> None:
        raise raised("no room")

    with pytest.raises(kind) as caught:
        export_it(fails, checkpoint)
    why, command = str(caught.value).split(", to export it again: ")
    assert why == "no room; the checkpoint is as it was"
    out = checkpoint.parent.parent / "hf" / checkpoint.name
    assert shlex.split(command) == ["tgdpo", "convert", "to-hf", "--megatron", str(checkpoint), "--out", str(out)]
