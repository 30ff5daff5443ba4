"""A journal survives what kills leave behind, and refuses what is not its own."""

from pathlib import Path

import pytest

from megatron_tgdpo.errors import UserError
from tgdpo.generation.journal import Journal, write_whole

SETTINGS = {"seed": 1, "model": "a"}


def test_torn_lines_are_cut_and_the_rest_goes_on(tmp_path: Path) -> None:
    path = tmp_path / "new" / "journal"
    with Journal(path, SETTINGS, created=5.0) as journal:
        journal.fill(7, 3, "item", lambda parts: ([f"é{i}" for i in items] for items in parts))
    whole = path.read_bytes()
    header = whole.index(b"\n") + 1
    for end in (len(whole) - 1, len(whole) - 4, whole.index(b"\n", header) + 2, header, header - 1, 3, 0):
        path.write_bytes(whole[:end])
        made: list[range] = []

        def make(items: range, made: list[range] = made) -> list[str]:
            made.append(items)
            return [f"é{i}" for i in items]

        with Journal(path, SETTINGS, created=5.0) as journal:
            assert journal.done == max(whole[:end].count(b"\n") - 1, 0)
            journal.fill(7, 3, "item", lambda parts, make=make: map(make, parts))
            assert [text for part in journal.parts() for text in part] == [f"é{i}" for i in range(7)]
        assert path.read_bytes() == whole
        assert len(made) == 3 - max(whole[:end].count(b"\n") - 1, 0)


def test_the_first_start_time_is_kept(tmp_path: Path) -> None:
    for created in (5.0, 9.0):
        with Journal(tmp_path / "journal", SETTINGS, created=created) as journal:
            assert journal.created == 5.0


def test_other_settings_are_refused_by_name(tmp_path: Path) -> None:
    with Journal(tmp_path / "journal", SETTINGS, created=0.0):
        pass
    with (
        pytest.raises(UserError, match=r"unfinished run with seed 1, this one has 2"),
        Journal(tmp_path / "journal", {**SETTINGS, "seed": 2}, created=0.0),
    ):
        pass


def test_a_journal_in_use_is_refused(tmp_path: Path) -> None:
    with Journal(tmp_path / "journal", SETTINGS, created=0.0) as first:
        first.append("x")
        with pytest.raises(UserError, match="another process"), Journal(first.path, SETTINGS, created=0.0):
            pass
        assert list(first.parts()) == ["x"]


def test_a_failed_write_leaves_the_file_as_it_was(tmp_path: Path) -> None:
    path = tmp_path / "out"
    write_whole(path, ["old"])

    def chunks():
        yield "new"
        raise UserError("no more")

    with pytest.raises(UserError, match="no more"):
        write_whole(path, chunks())
    assert path.read_text() == "old"
    assert [file.name for file in tmp_path.iterdir()] == ["out"]
