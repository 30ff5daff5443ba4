"""Damage is found wherever it is, and named; what cannot be read is not called damage."""

import errno
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing.mapping import ShardedTensor

from megatron_tgdpo.checkpoints import integrity
from megatron_tgdpo.checkpoints import listing as checkpoint_directory
from megatron_tgdpo.checkpoints.integrity import find_damage
from megatron_tgdpo.checkpoints.manifest import read_manifest
from megatron_tgdpo.checkpoints.model_directory import copy_hf_files
from megatron_tgdpo.errors import AgreedError, AgreedStorageError, StorageError, UserError
from megatron_tgdpo.resilience.requeue import count_restart
from megatron_tgdpo.training.resume import newest_undamaged
from tests.checkpoints import flip, is_complete, save, without_manifest
from tests.tiny_models import make_llama


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory, single_rank_group: dist.ProcessGroup) -> Path:
    root = tmp_path_factory.mktemp("checkpoint")
    data = torch.randn(300, 40, generator=torch.Generator().manual_seed(0))
    state = {name: ShardedTensor.from_rank_offsets(name, data + i) for i, name in enumerate(("one", "two"))}
    save(root / "saved", {**state, "step": 5}, make_llama(root / "hf", layers=1), {"step": 5})
    return root / "saved"


FILES = ("__0_0.distcp", ".metadata", "common.pt", "metadata.json", "hf/config.json", "hf/tokenizer.json")


@pytest.fixture
def copy(saved: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "copy"))


@pytest.fixture
def older(copy: Path) -> Path:
    """A checkpoint without a manifest."""
    return without_manifest(copy)


@pytest.fixture
def run(saved: Path, tmp_path: Path) -> Path:
    """An output directory with the checkpoints of steps 4 and 8."""
    for step in (4, 8):
        shutil.copytree(saved, tmp_path / "run" / "checkpoints" / f"step_{step:08d}")
    return tmp_path / "run"


def names(run: Path) -> list[str]:
    return sorted(path.name for path in (run / "checkpoints").iterdir())


def test_nothing_is_found_where_nothing_is_wrong(saved: Path, older: Path, one_rank: None) -> None:
    for path in (saved, older):
        assert find_damage(path) is None
        assert find_damage(path, content=False) is None


def test_the_manifest_names_every_file(saved: Path) -> None:
    manifest = read_manifest(saved)
    there = {str(file.relative_to(saved)) for file in saved.rglob("*") if file.is_file()}
    assert manifest.files is not None
    assert manifest.files.keys() == there - {"tgdpo.json"}
    assert there >= set(FILES)


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("part", [0.0, 0.3, 0.7])
def test_one_flipped_bit(copy: Path, one_rank: None, name: str, part: float) -> None:
    file = copy / name
    flip(file, int(file.stat().st_size * part))
    assert find_damage(copy) == f"{file}: its bytes are not those that were written"


@pytest.mark.parametrize("name", FILES)
def test_a_truncated_an_empty_and_a_missing_file(copy: Path, one_rank: None, name: str) -> None:
    file = copy / name
    size = file.stat().st_size
    for left in (size - 1, 0):
        os.truncate(file, left)
        for content in (True, False):
            assert find_damage(copy, content=content) == f"{file}: {left:,} bytes, {size:,} were written"
    assert not is_complete(copy)
    file.unlink()
    assert find_damage(copy) == f"{file}: missing"


def test_a_damaged_manifest(copy: Path, one_rank: None) -> None:
    file = copy / "tgdpo.json"
    text = file.read_text()
    for damaged in (text[: len(text) // 2], "", "[]", text.replace('"step": 5', '"step": 6'), "null"):
        file.write_text(damaged)
        damage = find_damage(copy)
        assert damage is not None, damaged
        assert damage.startswith(f"{file}: "), damaged
    content = json.loads(text)
    del content["sha256"]
    file.write_text(json.dumps(content))
    assert find_damage(copy) == f"{file}: its content is not what was written: its sha256 is another"


def test_a_newer_format_is_not_damage(copy: Path, one_rank: None) -> None:
    (copy / "tgdpo.json").write_text(json.dumps({"format_version": 99}))
    with pytest.raises(AgreedError, match="format_version is 99"):
        find_damage(copy)


@pytest.mark.parametrize("part", [0.3, 0.7])
def test_one_flipped_bit_of_a_tensor_without_a_manifest(older: Path, one_rank: None, part: float) -> None:
    file = older / "__0_0.distcp"
    flip(file, int(file.stat().st_size * part))
    damage = find_damage(older)
    assert damage == f"{file}: the bytes of {'one' if part < 0.5 else 'two'} are not those that were written"


def test_every_flipped_bit_of_the_plain_values_is_found_or_harmless(older: Path, one_rank: None) -> None:
    file = older / "common.pt"
    whole = file.read_bytes()
    for position in range(0, len(whole), 7):
        flip(file, position)
        if find_damage(older) is None:
            # In padding, or in a field of the archive that no reader uses.
            assert torch.load(file, weights_only=True) == {"step": 5}
        file.write_bytes(whole)


def test_damaged_files_without_a_manifest(older: Path, one_rank: None) -> None:
    os.truncate(older / "__0_0.distcp", (older / "__0_0.distcp").stat().st_size - 10)
    assert str(find_damage(older)).startswith(f"{older}/__0_0.distcp: ends before byte")
    flip(older / ".metadata", 0)
    assert str(find_damage(older)).startswith(f"{older}/.metadata: ")
    flip(older / ".metadata", 0)
    (older / "metadata.json").write_bytes(b"")
    assert str(find_damage(older)).startswith(f"{older}/metadata.json: not readable")
    for name in ("metadata.json", "common.pt", "__0_0.distcp", ".metadata"):
        (older / name).unlink()
    assert find_damage(older) == f"{older}/.metadata: missing"


def fail_reading(monkeypatch: pytest.MonkeyPatch, name: str, error: BaseException) -> None:
    """Opening a file of this name fails from now on, in every way that checkpoints are read."""
    plain = Path.open

    def opened(path: Path, *arguments: Any, **options: Any) -> Any:
        if path.name == name:
            raise error
        return plain(path, *arguments, **options)

    monkeypatch.setattr(Path, "open", opened)


@pytest.mark.parametrize("number", [errno.EIO, errno.ESTALE, errno.EMFILE, errno.EACCES, None])
@pytest.mark.parametrize("name", [*FILES, "tgdpo.json"])
def test_what_cannot_be_read_stops_the_run_and_nothing_is_renamed(
    run: Path, one_rank: None, monkeypatch: pytest.MonkeyPatch, name: str, number: int | None
) -> None:
    error = MemoryError() if number is None else OSError(number, os.strerror(number))
    fail_reading(monkeypatch, Path(name).name, error)
    before = names(run)
    kind = AgreedError if number == errno.EACCES else AgreedStorageError
    with pytest.raises(kind, match=rf"step_00000008/{name}: cannot be read: "):
        newest_undamaged(run, verify=True)
    assert names(run) == before


def test_a_tensor_that_cannot_be_read_is_not_damaged(
    older: Path, one_rank: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without a manifest the readers of zip archives are in between, which make their own errors of it."""
    preadv = os.preadv

    def failing(descriptor: int, buffers: Any, offset: int) -> int:
        if offset > 20_000:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return preadv(descriptor, buffers, offset)

    monkeypatch.setattr(os, "preadv", failing)
    with pytest.raises(AgreedStorageError, match=r"__0_0\.distcp: cannot be read: Input/output error"):
        find_damage(older)


def test_a_directory_that_cannot_be_listed_is_not_empty(
    run: Path, one_rank: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(path: Path) -> Any:
        raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))

    monkeypatch.setattr(os, "scandir", failing)
    with pytest.raises(AgreedStorageError, match="checkpoints: cannot be read: Stale"):
        newest_undamaged(run, verify=True)
    with pytest.raises(StorageError, match="checkpoints: cannot be read: Stale"):
        checkpoint_directory.newest_checkpoint(run)


DAMAGES: dict[str, Callable[[Path], object]] = {
    "no plain values": lambda path: (path / "common.pt").unlink(),
    "emptied metadata.json": lambda path: (path / "metadata.json").write_bytes(b""),
    "truncated tgdpo.json": lambda path: os.truncate(path / "tgdpo.json", 100),
    "no tgdpo.json": lambda path: (path / "tgdpo.json").unlink(),
    "truncated tokenizer": lambda path: os.truncate(path / "hf" / "tokenizer.json", 100),
    "nothing left": lambda path: [shutil.rmtree(path), path.mkdir()],
}


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("verify", [True, False])
def test_the_one_before_a_damaged_one_is_used_and_its_name_is_free(
    run: Path, one_rank: None, damage: str, verify: bool
) -> None:
    newest, before = run / "checkpoints" / "step_00000008", run / "checkpoints" / "step_00000004"
    DAMAGES[damage](newest)
    # What lists checkpoints, and with it every launcher and tool, sees the same.
    assert checkpoint_directory.newest_checkpoint(run) == before
    assert count_restart(run, "7", limit=2) == 0
    assert json.loads((run / "restarts.json").read_text())["step"] == 5  # what the checkpoint of this test says
    assert newest_undamaged(run, verify) == before
    assert names(run) == ["step_00000004", "step_00000008.damaged"]
    shutil.copytree(before, newest)
    DAMAGES[damage](newest)
    assert newest_undamaged(run, verify) == before
    assert names(run) == ["step_00000004", "step_00000008.damaged", "step_00000008.damaged1"]


def test_a_run_never_begins_again_by_itself(run: Path, one_rank: None) -> None:
    for path in (run / "checkpoints").iterdir():
        (path / "common.pt").unlink()
    for _ in range(2):
        with pytest.raises(AgreedError, match=r"common.pt: missing: no undamaged .* put one back, or delete"):
            newest_undamaged(run, verify=True)
        assert names(run) == ["step_00000004", "step_00000008"]
    shutil.rmtree(run / "checkpoints" / "step_00000004")
    (run / "checkpoints" / "step_00000008").rename(run / "checkpoints" / "step_00000008.damaged")
    with pytest.raises(AgreedError, match=r"step_00000008.damaged: set aside .* no undamaged checkpoint is left"):
        newest_undamaged(run, verify=True)
    shutil.rmtree(run / "checkpoints" / "step_00000008.damaged")
    assert newest_undamaged(run, verify=True) is None
    assert newest_undamaged(run / "absent", verify=True) is None


@pytest.mark.parametrize("text", ["", "[]", "{", '{"job": "7", "step": 5}', "null"])
def test_damaged_notes_of_restarts_do_not_keep_a_run_from_starting(run: Path, text: str) -> None:
    (run / "restarts.json").write_text(text)
    assert count_restart(run, "7", limit=2) in (0, 1)
    assert count_restart(run, "7", limit=2) in (1, 2)


def two_ranks(monkeypatch: pytest.MonkeyPatch, finder: int, second: Any) -> None:
    """This process is rank ``finder`` of two, and the other one reports nothing at first and ``second`` then."""

    def gather(reports: list[Any], mine: Any, group: Any = None) -> None:
        reports[:] = [mine if rank == finder else None for rank in range(2)]

    def broadcast(values: list[Any], src: int, group: Any = None) -> None:
        assert src == 1 - finder
        values[0] = second

    for name, function in (("all_gather_object", gather), ("broadcast_object_list", broadcast)):
        monkeypatch.setattr(integrity.dist, name, function)
    monkeypatch.setattr(integrity.dist, "get_rank", lambda: finder)
    monkeypatch.setattr(integrity.dist, "get_world_size", lambda: 2)


@pytest.mark.parametrize("finder", [0, 1])
def test_what_one_rank_finds_and_another_does_not_is_no_damage(
    copy: Path, monkeypatch: pytest.MonkeyPatch, finder: int
) -> None:
    """A rank whose mount is bad sees an empty directory."""
    shutil.rmtree(copy)
    copy.mkdir()
    two_ranks(monkeypatch, finder, None)
    found_by = "" if finder == 0 else "rank 1: "
    with pytest.raises(AgreedStorageError, match=rf"^{found_by}{copy}: not .* rank {1 - finder} finds no damage there"):
        find_damage(copy)
    again = integrity._Finding("the same", 0, True, AgreedError)
    two_ranks(monkeypatch, finder, again)
    assert str(find_damage(copy)).startswith(f"{copy}: not a complete Megatron checkpoint")


def test_a_copy_checks_its_source(copy: Path, tmp_path: Path) -> None:
    (tmp_path / "target").mkdir()
    flip(copy / "hf" / "tokenizer.json", 10)
    with pytest.raises(UserError, match=r"hf/tokenizer\.json: its bytes are not those that were written"):
        copy_hf_files(copy, tmp_path / "target")
