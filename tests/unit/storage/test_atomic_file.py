"""Of two writers at a time neither harms the other, and what dead ones left does not stay."""

import os
import subprocess
import sys
import time
from pathlib import Path
from unittest import mock

import pytest

from megatron_tgdpo.errors import UserError
from megatron_tgdpo.storage import atomic_file
from megatron_tgdpo.storage.atomic_file import replacing, write_atomically


@pytest.fixture
def dead() -> int:
    """The id of a process that has ended."""
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def left_by(path: Path, pid: int, start: int, host: str | None = None) -> Path:
    """What a writer of ``path`` left."""
    ours, namespace = atomic_file._here()
    left = path.with_name(f"{path.name}.{host or ours}-{namespace}-{pid}-{start}-00c0ffee.tmp")
    left.write_text("half")
    return left


def test_every_writer_has_a_name_of_its_own(tmp_path: Path) -> None:
    names = {atomic_file.temporary_path(tmp_path / "out") for _ in range(100)}
    assert len(names) == 100
    for name in names:
        name.touch()
    assert set(atomic_file.leftovers(tmp_path / "out")) == names
    assert atomic_file.leftovers(tmp_path / "ou") == []
    assert atomic_file.leftovers(tmp_path / "absent" / "out") == []


def test_only_what_dead_writers_left_is_removed(tmp_path: Path, dead: int) -> None:
    path, other = tmp_path / "out", tmp_path / "out.json"
    parent = atomic_file._started(os.getppid())
    assert parent is not None
    live = left_by(path, os.getppid(), parent)
    another_host = left_by(path, dead, 1, "elsewhere")
    kept = [live, another_host, left_by(other, dead, 1)]
    gone = [left_by(path, dead, 1), left_by(path, os.getppid(), parent - 1)]  # the second: a number that came again
    write_atomically(path, "new")
    assert path.read_text() == "new"
    assert [file.exists() for file in kept] == [True, True, True]
    assert [file.exists() for file in gone] == [False, False]
    two_days_ago = time.time() - 2 * 24 * 3600
    os.utime(another_host, (two_days_ago, two_days_ago))
    write_atomically(path, "newer")
    assert not another_host.exists()
    assert live.exists()


def test_a_writer_that_fails_leaves_the_file_as_it_was(tmp_path: Path) -> None:
    path = tmp_path / "out"
    write_atomically(path, "old")

    def fail() -> None:
        with atomic_file.replacing(path) as file:
            file.write_text("half")
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert [entry.name for entry in tmp_path.iterdir()] == ["out"]
    assert path.read_text() == "old"


def test_a_live_writer_is_named(tmp_path: Path, dead: int) -> None:
    path = tmp_path / "out"
    left_by(path, dead, 1)
    atomic_file.temporary_path(path).touch()  # our own
    atomic_file.refuse_live(path)
    parent = atomic_file._started(os.getppid())
    assert parent is not None
    left_by(path, os.getppid(), parent)
    with pytest.raises(UserError, match=f"out: process {os.getppid()} is writing it .*wait for its end, or stop it"):
        atomic_file.refuse_live(path)


def test_a_process_that_started_has_a_time_and_another_has_none(dead: int) -> None:
    assert atomic_file._started(os.getpid()) == atomic_file._started(os.getpid())
    assert atomic_file._started(dead) is None


@pytest.mark.parametrize("synced", [True, False])
def test_a_file_is_synced_unless_that_takes_too_long(tmp_path: Path, synced: bool) -> None:
    with mock.patch("os.fsync", side_effect=os.fsync) as fsync, replacing(tmp_path / "f", synced=synced) as temporary:
        temporary.write_text("new")
    assert bool(fsync.call_count) == synced
    assert [path.name for path in tmp_path.iterdir()] == ["f"]
