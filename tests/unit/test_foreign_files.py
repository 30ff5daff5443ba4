"""Files of a run, of a dataset or of a model that are JSON but not what was written there: one line, no traceback."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_tgdpo.checkpoints import listing as checkpoint_directory
from megatron_tgdpo.checkpoints.manifest import FORMAT, _own_digest, read_manifest
from megatron_tgdpo.data.manifest import DATA_SUFFIXES
from megatron_tgdpo.data.manifest import read_manifest as read_dataset_manifest
from megatron_tgdpo.errors import DamageError, UserError
from megatron_tgdpo.guidance.cache import MANIFEST_FILE, GuidanceCache
from megatron_tgdpo.models.hf_config import read_hf_config
from megatron_tgdpo.models.hf_weights.reader import HfCheckpoint
from megatron_tgdpo.output import json_lines
from megatron_tgdpo.output.directory import recorded_run
from megatron_tgdpo.resilience.requeue import count_restart
from megatron_tgdpo.storage.files import FileDigest
from megatron_tgdpo.storage.json_text import parse_json

DEEP = "[" * 100_000


def test_an_error_of_bad_input_is_one_printable_line() -> None:
    error = UserError("a\nb\u2028c\x1b[31m \udcff é 'x'")
    assert str(error) == "a\\nb\\u2028c\\x1b[31m \\udcff é 'x'"


def test_json_nested_too_deeply_is_a_value_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="nested too deeply"):
        parse_json(DEEP)
    (tmp_path / "megatron").mkdir()
    for name in (
        "config.json",
        "model.safetensors.index.json",
        MANIFEST_FILE,
        "d.manifest.json",
        "megatron/tgdpo.json",
    ):
        (tmp_path / name).write_text(DEEP)
    for read in (
        lambda: read_hf_config(tmp_path),
        lambda: HfCheckpoint(tmp_path),
        lambda: read_manifest(tmp_path / "megatron"),
        lambda: GuidanceCache(tmp_path, np.ones((3, 3), np.int64), use_guide=False),
        lambda: read_dataset_manifest(str(tmp_path / "d")),
    ):
        with pytest.raises(UserError, match="nested too deeply"):
            read()


@pytest.mark.parametrize("line", ["3", "[]", "{}", '{"step": null}', '{"step": "3"}', DEEP])
def test_lines_of_metrics_that_no_run_writes_are_cut_off(tmp_path: Path, line: str) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n' + line + "\n")
    assert json_lines._end_of(tmp_path / "metrics.jsonl", 2) == len('{"step": 1}\n')


@pytest.mark.parametrize("count", ["x", None, [], {}, "1e9"])
def test_a_count_of_restarts_that_is_none_begins_anew(tmp_path: Path, count: Any) -> None:
    (tmp_path / "restarts.json").write_text(json.dumps({"job": "7", "step": 0, "without_progress": count}))
    assert count_restart(tmp_path, "7", 5) == 0
    assert count_restart(tmp_path, "7", 5) == 1


def test_a_checkpoint_that_names_no_step_counts_as_any_other(tmp_path: Path) -> None:
    checkpoint = tmp_path / "checkpoints" / "step_00000004"
    (checkpoint / "hf").mkdir(parents=True)
    for name in (".metadata", "common.pt", "hf/config.json"):
        (checkpoint / name).write_text("{}")
    (checkpoint / "metadata.json").write_text(json.dumps(FORMAT))
    (checkpoint / "tgdpo.json").write_text('{"format_version": 1}')
    assert checkpoint_directory.newest_checkpoint(tmp_path) == checkpoint
    assert [count_restart(tmp_path, "7", 5) for _ in range(3)] == [0, 1, 2]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"step": "4"}, "step is '4'"),
        ({"config": 3}, "config is 3"),
        ({"inputs": {"data.train": 3}}, "inputs are not fingerprints"),
        ({"changes": [3]}, "changes are not changes"),
        ({"files": {"/etc/passwd": {"size": 1, "sha256": ""}}}, "leads out of the checkpoint"),
        ({"files": {"hf/../../x": {"size": 1, "sha256": ""}}}, "leads out of the checkpoint"),
        ({"files": {"a\0b": {"size": 1, "sha256": ""}}}, "leads out of the checkpoint"),
        ({"files": {"x": {"size": "1", "sha256": ""}}}, "has the digest"),
    ],
)
def test_a_checkpoint_s_manifest_says_what_is_read_of_it(tmp_path: Path, changes: dict[str, Any], said: str) -> None:
    content = {"format_version": 1, "step": 4, **changes}
    if files := content.pop("files", None):
        digests = {name: FileDigest(**entry) for name, entry in files.items()}
        content |= {"files": files, "sha256": _own_digest(content, digests)}
    (tmp_path / "tgdpo.json").write_text(json.dumps(content))
    with pytest.raises(DamageError, match="not readable") as caught:
        read_manifest(tmp_path)
    assert said in str(caught.value)


@pytest.mark.parametrize("text", ["3", "[]", '[["a", "b"]]', '{"data.train": 3}', DEEP])
def test_inputs_of_a_run_that_are_none(tmp_path: Path, text: str) -> None:
    for name, content in (("config.yaml", ""), ("metrics.jsonl", ""), ("inputs.json", text)):
        (tmp_path / name).write_text(content)
    with pytest.raises(UserError, match=r"inputs\.json: "):
        recorded_run(tmp_path)


KEY = dict.fromkeys(("data", "tokenizer", "template", "reference", "guide", "dtype"), "x")


@pytest.mark.parametrize("changes", [{"key": {**KEY, "data": True}}, {"key": {**KEY, "dtype": None}}, {"shards": "ab"}])
def test_a_cache_s_manifest_names_its_inputs(tmp_path: Path, changes: dict[str, Any]) -> None:
    manifest = {"format_version": 1, "key": KEY, "pairs": 3, "block_pairs": 2, "shards": ["a", "b"], **changes}
    (tmp_path / MANIFEST_FILE).write_text(json.dumps(manifest))
    with pytest.raises(UserError, match="damaged, or of another version"):
        GuidanceCache(tmp_path, np.ones((3, 3), np.int64), use_guide=False)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"files": {}}, r"the manifest\.files lacks '\.bin'"),
        ({"files": {suffix: {"size": "3", "sha256": ""} for suffix in DATA_SUFFIXES}}, r"size is '3', not of type int"),
        ({"tokenizer": None}, r"the manifest\.tokenizer is 'None', not of type dict"),
        ({"sources": [{"path": 3, "kind": "json"}]}, r"the manifest\.sources\[0\]\.path is '3', not of type str"),
        ({"max_token_id": True}, r"the manifest\.max_token_id is 'True', not of type int"),
        ({"options": {}}, r"the manifest\.options lacks 'max_length'"),
    ],
)
def test_a_dataset_s_manifest_says_what_is_read_of_it(tmp_path: Path, changes: dict[str, Any], said: str) -> None:
    manifest = {
        "format_version": 1,
        "files": {suffix: {"size": 0, "sha256": ""} for suffix in DATA_SUFFIXES},
        "pairs": 1,
        "dropped": {},
        "truncated": {},
        "lengths": {},
        "tokenizer": {"path": "", "fingerprint": "", "template_fingerprint": "", "vocab_size": 1},
        "max_token_id": 0,
        "options": {"max_length": 2, "max_prompt_length": None, "overlong_prompt": None},
        "sources": [],
    }
    for suffix in DATA_SUFFIXES:
        (tmp_path / f"d{suffix}").touch()
    (tmp_path / "d.manifest.json").write_text(json.dumps(manifest))
    assert read_dataset_manifest(str(tmp_path / "d")) == manifest
    (tmp_path / "d.manifest.json").write_text(json.dumps({**manifest, **changes}))
    with pytest.raises(UserError, match=said):
        read_dataset_manifest(str(tmp_path / "d"))
