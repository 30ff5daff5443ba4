"""What `data.train` may name, and the files that it stands for."""

import json
import os
from pathlib import Path

import datasets
import pytest

from megatron_tgdpo.data.records import read_records
from megatron_tgdpo.data.sources import Source, find_files, read_sets, read_sources
from megatron_tgdpo.errors import UserError

RECORDS = [{"prompt": f"p{n}", "chosen": "c", "rejected": "r"} for n in range(7)]


def write(directory: Path, *names: str) -> None:
    for name in names:
        path = directory / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text('{"prompt": "p", "chosen": "c", "rejected": "r"}\n')


def found(path: Path | str, split: str | None = None, subset: str | None = None) -> list[str]:
    return [os.path.relpath(file, path) for file in find_files(Source(str(path), split, subset))]


def test_entries() -> None:
    assert read_sources("a.jsonl", "data.train") == (Source("a.jsonl"),)
    assert read_sources(["a", {"path": "b", "weight": 2, "split": "s"}], "data.train") == (
        Source("a"),
        Source("b", split="s", weight=2.0),
    )
    assert read_sets(None, "data.validation") == {}
    assert read_sets("a", "data.validation") == read_sets({"path": "a"}, "data.validation") == {"": (Source("a"),)}
    named = read_sets({"short": "a", "long": ["b", {"path": "c"}]}, "data.validation")
    assert named == {"short": (Source("a"),), "long": (Source("b"), Source("c"))}


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ([], "data.train is an empty list"),
        (3, "data.train is 3: give a path"),
        (["a", 3], r"data.train\[1\] is 3: give a path"),
        ({"file": "a"}, "data.train: unknown key 'file': an entry has path, split, subset, weight"),
        ({"split": "a"}, r"data.train.path is None: give a path"),
        ([{"path": "a", "weight": 0}], r"data.train\[0\].weight is 0: give a number above 0"),
        ({"path": "a", "weight": True}, "data.train.weight is True"),
        ({"path": "a", "weight": float("nan")}, "data.train.weight is nan"),
        ({"path": "a", "weight": 1e9}, "at most 1000"),
        ({"path": "a", "split": 3}, "data.train.split is 3: give a name"),
    ],
)
def test_entries_that_are_none(value: object, message: str) -> None:
    with pytest.raises(UserError, match=message):
        read_sources(value, "data.train")


@pytest.mark.parametrize("name", ["", "a/b", "a b", "-a"])
def test_names_of_sets(name: str) -> None:
    with pytest.raises(UserError, match="may have letters"):
        read_sets({name: "a"}, "data.validation")


def test_a_glob_gives_files_by_name(tmp_path: Path) -> None:
    write(tmp_path, "b.jsonl", "a.jsonl", "sub/c.jsonl", "d.json")
    assert found(f"{tmp_path}/*.jsonl") == ["../a.jsonl", "../b.jsonl"]
    assert len(find_files(Source(f"{tmp_path}/**/*.jsonl"))) == 3
    with pytest.raises(UserError, match=r"none\*: no file matches"):
        find_files(Source(f"{tmp_path}/none*"))
    write(tmp_path, "odd[1].jsonl")
    assert find_files(Source(f"{tmp_path}/odd[1].jsonl")) == [f"{tmp_path}/odd[1].jsonl"]


def test_a_directory_of_shards(tmp_path: Path) -> None:
    write(tmp_path, *(f"train-0000{n}-of-00003.jsonl" for n in range(3)), "README.md", "dataset_info.json")
    assert found(tmp_path) == [f"train-0000{n}-of-00003.jsonl" for n in range(3)]
    assert found(tmp_path, "train") == found(tmp_path)


def test_splits_are_never_mixed(tmp_path: Path) -> None:
    write(tmp_path, "harmless/train.jsonl", "harmless/test.jsonl", "helpful/train.jsonl")
    with pytest.raises(UserError, match=r"holds the splits train, test: say which, as \{path: .*, split: train\}"):
        found(tmp_path)
    assert found(tmp_path, "train") == ["harmless/train.jsonl", "helpful/train.jsonl"]
    assert found(tmp_path, "test") == ["harmless/test.jsonl"]
    with pytest.raises(UserError, match=r"no split 'dev': the dataset has train, test"):
        found(tmp_path, "dev")


@pytest.mark.parametrize("other", ["more.jsonl", "rows.parquet", "sub/table.csv", "more.jsonl.gz"])
def test_no_file_is_left_out_without_a_word(tmp_path: Path, other: str) -> None:
    write(tmp_path, "train-0.jsonl", "train-1.jsonl", other)
    with pytest.raises(UserError, match=rf"{other}: in none of the splits"):
        found(tmp_path)


def test_a_readme_says_what_is_read(tmp_path: Path) -> None:
    write(tmp_path, "data/prefs-0.jsonl", "other.jsonl")
    configs = [
        {"config_name": "one", "data_files": [{"split": "prefs", "path": "data/prefs-*"}]},
        {"config_name": "two", "data_files": "other.jsonl"},
    ]
    (tmp_path / "README.md").write_text(f"---\nconfigs: {json.dumps(configs)}\n---\n")
    assert found(tmp_path, "prefs", "one") == ["data/prefs-0.jsonl"]
    assert found(tmp_path, None, "two") == ["other.jsonl"]
    with pytest.raises(UserError, match=r"available configs: \['one', 'two'\]"):
        found(tmp_path)


def test_a_directory_without_data(tmp_path: Path) -> None:
    write(tmp_path, "part-0")
    with pytest.raises(UserError, match=r"no dataset in this directory .* name files by a list or a glob") as error:
        found(tmp_path)
    assert "\n" not in str(error.value)
    with pytest.raises(UserError, match="split 'train' is given, but this is no directory"):
        find_files(Source(f"{tmp_path}/part-0", split="train"))


def test_what_save_to_disk_leaves(tmp_path: Path) -> None:
    one = datasets.Dataset.from_list(RECORDS)
    one.save_to_disk(tmp_path / "one", num_shards=2)
    files = find_files(Source(str(tmp_path / "one")))
    assert [Path(file).name for file in files] == ["data-00000-of-00002.arrow", "data-00001-of-00002.arrow"]
    assert [record.payload for file in files for record in read_records(file, "arrow")] == RECORDS
    datasets.DatasetDict(train=one, test=one.select(range(2))).save_to_disk(tmp_path / "two")
    assert found(tmp_path / "two", "test") == ["test/data-00000-of-00001.arrow"]
    with pytest.raises(UserError, match="holds the splits train, test"):
        found(tmp_path / "two")
    Path(files[1]).unlink()
    with pytest.raises(UserError, match=r"data-00001-of-00002\.arrow: missing: the dataset is incomplete"):
        found(tmp_path / "one")
    (tmp_path / "one/state.json").write_text("{")
    with pytest.raises(UserError, match=r"state\.json: not readable"):
        found(tmp_path / "one")
