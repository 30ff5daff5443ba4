"""Files are read once, by all ranks together, and again when anything says that they may have changed."""

import errno
import io
import os
import time
from concurrent.futures import ThreadPoolExecutor
from hashlib import sha256
from pathlib import Path
from unittest import mock

import pytest
import torch.distributed as dist

from megatron_tgdpo import signals
from megatron_tgdpo.checkpoints.model_directory import model_files
from megatron_tgdpo.data.manifest import FileDigest, digest_file
from megatron_tgdpo.distributed.ranks import RankEnvironment
from megatron_tgdpo.errors import AgreedStorageError, StorageError, UserError
from megatron_tgdpo.setup import fingerprints
from megatron_tgdpo.setup.fingerprints import hash_files, shares, weights_fingerprint
from megatron_tgdpo.signals import StoppedEarly
from megatron_tgdpo.storage.files import read_error
from tests.launch import PATIENCE

ALONE = RankEnvironment(0, 1, 0, None, None)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    directory = tmp_path / "model"
    directory.mkdir()
    (directory / "config.json").write_text("{}")
    for number in range(3):
        (directory / f"model-{number}.safetensors").write_bytes(bytes([number]) * 1000)
    return directory


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the files that are read, in their order."""
    names: list[str] = []

    def digest(path: str) -> FileDigest:
        names.append(Path(path).name)
        return digest_file(path)

    monkeypatch.setattr(fingerprints, "digest_file", digest)
    return names


def hashes(model: Path, again: bool = False) -> dict[str, str]:
    return hash_files(lambda: model_files(model), model.parent / "hashes.json", ALONE, dist.HashStore(), again=again)


def test_long_hashing_says_that_it_goes_on(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written = io.StringIO()
    monkeypatch.setattr("sys.stderr", written)
    monkeypatch.setattr("megatron_tgdpo.console._LOG_SECONDS", 0.001)
    until = time.monotonic() + PATIENCE

    def digest(path: str) -> FileDigest:
        while "hashing models and data: " not in written.getvalue():
            assert time.monotonic() < until, "nothing was said"
            time.sleep(0.001)
        return digest_file(path)

    monkeypatch.setattr(fingerprints, "digest_file", digest)
    assert len(hashes(model)) == 4


def test_files_are_read_once_and_on_request(model: Path, reads: list[str]) -> None:
    first = hashes(model)
    assert first[str(model / "config.json")] == sha256(b"{}").hexdigest()
    assert sorted(reads) == ["config.json", *(f"model-{number}.safetensors" for number in range(3))]
    assert hashes(model) == first
    assert len(reads) == 4
    assert hashes(model, again=True) == first
    assert len(reads) == 8


def test_other_bytes_in_place_are_noticed_even_with_the_old_time(model: Path, reads: list[str]) -> None:
    before = weights_fingerprint(model, hashes(model))
    file = model / "model-1.safetensors"
    stat = file.stat()
    with open(file, "r+b") as stream:
        stream.write(b"x")
    os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert (file.stat().st_size, file.stat().st_ino) == (stat.st_size, stat.st_ino)
    reads.clear()
    assert weights_fingerprint(model, hashes(model)) != before
    assert reads == ["model-1.safetensors"]


def test_a_model_that_moved_is_the_same(model: Path) -> None:
    before = weights_fingerprint(model, hashes(model))
    moved = model.rename(model.with_name("moved"))
    assert weights_fingerprint(moved, hashes(moved)) == before


@pytest.mark.parametrize("record", ["", "[1", "[]", '{"a": 1}', '{"a": [{"size": 1}, "b"]}'])
def test_a_damaged_record_is_made_again(model: Path, reads: list[str], record: str) -> None:
    first = hashes(model)
    (model.parent / "hashes.json").write_text(record)
    assert hashes(model) == first
    assert len(reads) == 8
    assert hashes(model) == first
    assert len(reads) == 8


def on_ranks(model: Path, ranks: int) -> list[dict[str, str] | Exception]:
    """What each of several ranks, in threads, gets or raises."""
    store = dist.HashStore()
    record = model.parent / "hashes.json"

    def one(rank: int) -> dict[str, str] | Exception:
        place, own = RankEnvironment(rank, ranks, rank, None, None), dist.PrefixStore("all", store)
        try:
            return hash_files(lambda: model_files(model), record, place, own)
        except (UserError, StoppedEarly) as error:
            return error

    with ThreadPoolExecutor(ranks) as pool:
        return list(pool.map(one, range(ranks)))


def test_ranks_share_the_files_and_the_first_knows_all_hashes(model: Path, reads: list[str]) -> None:
    answers = on_ranks(model, 3)
    assert answers[1:] == [{}, {}]
    assert sorted(reads) == ["config.json", *(f"model-{number}.safetensors" for number in range(3))]
    assert hashes(model) == answers[0]
    assert len(reads) == 4


def test_a_file_that_one_rank_cannot_read_is_an_error_on_all(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def digest(path: str) -> FileDigest:
        if path.endswith("model-1.safetensors"):
            raise read_error(path, OSError(errno.EIO, "Input/output error"))
        return digest_file(path)

    monkeypatch.setattr(fingerprints, "digest_file", digest)
    errors = on_ranks(model, 3)
    assert [type(error) for error in errors] == [AgreedStorageError] * 3
    said = f"rank 1: {model}/model-1.safetensors: cannot be read: Input/output error"
    assert {str(error) for error in errors} == {said}
    assert not (model.parent / "hashes.json").exists()


def test_storage_that_fails_on_the_first_rank_may_work_later_on_all(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On listing the files, on looking at one, on reading the record and on writing it."""
    fails = OSError(errno.ESTALE, "Stale file handle")
    for owner, name in ((Path, "iterdir"), (Path, "stat"), (Path, "read_text"), (Path, "mkdir")):
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, mock.Mock(side_effect=fails))
            errors = on_ranks(model, 2)
        assert [type(error) for error in errors] == [StorageError, AgreedStorageError], name
        assert "Stale file handle" in str(errors[1])
    assert isinstance(on_ranks(model, 2)[1], dict)


def test_a_stop_ends_the_reading_on_all_ranks(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(signals, "_requested", True)
    answers = on_ranks(model, 2)
    assert [type(answer) for answer in answers] == [StoppedEarly] * 2
    assert not (model.parent / "hashes.json").exists()


def test_shares_are_of_about_one_size() -> None:
    sizes = {"a": 50, "b": 40, "c": 30, "d": 20, "e": 10, "f": 0}
    found = shares(sizes, 3)
    assert sorted(path for share in found for path in share) == sorted(sizes)
    assert [sum(sizes[path] for path in share) for share in found] == [50, 50, 50]
    assert shares({"a": 1}, 3) == [["a"], [], []]


def test_a_directory_without_weights_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no weight files"):
        model_files(tmp_path)
    with pytest.raises(UserError, match="absent: cannot be read"):
        model_files(tmp_path / "absent")
