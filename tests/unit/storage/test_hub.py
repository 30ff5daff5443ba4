"""Names of the Hub, against a stand-in of it; huggingface_hub reads its settings once, so each case is a process."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

from megatron_tgdpo.storage.hub import HubName, hub_name, local_path
from tests.hub import Hub, serving
from tests.launch import PATIENCE

ROOT = Path(__file__).parents[3]
COMMIT = "0123456789abcdef0123456789abcdef01234567"
PAIR = '{"prompt": "p", "chosen": "c", "rejected": "r"}\n'
FETCH = """
import sys
from megatron_tgdpo.errors import StorageError, UserError
from megatron_tgdpo.storage.hub import fetch, hub_name, local_path
kind, text = sys.argv[1:]
try:
    pinned = fetch(hub_name(text), kind)
    path = local_path(str(pinned), kind)
    print(pinned, *sorted(str(file.relative_to(path)) for file in path.rglob("*") if file.is_file()), sep="\\n")
except UserError as error:
    print(type(error).__name__, error, sep="\\n")
"""


@pytest.fixture
def hub() -> Iterator[Hub]:
    with serving() as served:
        yield served


def python(code: str, *arguments: str, environment: Mapping[str, str]) -> list[str]:
    """Lines that a program prints."""
    inherited = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], cwd=ROOT, env={**inherited, "PYTHONPATH": str(ROOT), **environment},
        capture_output=True, text=True, timeout=PATIENCE,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_what_is_a_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert hub_name("owner/name") == HubName("owner/name", None)
    assert hub_name("owner/Name-1.5B@v1.0") == HubName("owner/Name-1.5B", "v1.0")
    assert hub_name(f"owner/name@{COMMIT}").pinned  # type: ignore[union-attr]
    assert not hub_name("owner/name@main").pinned  # type: ignore[union-attr]
    for path in ("name", "/a/b", "./a/b", "a/b/c", "../a", "~/a", "data/pairs.jsonl", "data/pairs.json.gz", "a/b*"):
        assert hub_name(path) is None, path
    (tmp_path / "owner/name").mkdir(parents=True)
    assert hub_name("owner/name") is None
    assert local_path("owner/name") == Path("owner/name")
    assert local_path(f"other/name@{COMMIT}").parts[-3:] == ("models--other--name", "snapshots", COMMIT)


def test_a_model_is_fetched_once_and_pinned(hub: Hub, tmp_path: Path) -> None:
    files = ("config.json", "model.safetensors", "tokenizer.json", "chat_template.jinja")
    unwanted = ("pytorch_model.bin", "modeling.py", "original/params.json", "consolidated.safetensors", "a.gguf")
    commit = hub.commit("models/owner/name", dict.fromkeys((*files, *unwanted), "{}"))
    environment = hub.environment(tmp_path)
    assert python(FETCH, "model", "owner/name", environment=environment) == [f"owner/name@{commit}", *sorted(files)]
    # Another commit changes nothing for whom the first is pinned, and nothing is asked or fetched again.
    newer = hub.commit("models/owner/name", {**dict.fromkeys(files, "{}"), "config.json": '{"newer": 1}'})
    hub.requests.clear()
    assert python(FETCH, "model", f"owner/name@{commit}", environment=environment)[0] == f"owner/name@{commit}"
    assert [request for request in hub.requests if request.startswith("GET owner")] == []
    assert python(FETCH, "model", "owner/name", environment=environment)[0] == f"owner/name@{newer}"


@pytest.mark.parametrize("kind", ["model", "dataset"])
def test_a_cache_of_the_library_serves_offline(hub: Hub, tmp_path: Path, kind: str) -> None:
    commit = hub.commit(f"{kind}s/owner/name", {"config.json": "{}", "train.jsonl": PAIR, "x.safetensors": "x"})
    environment, offline = hub.environment(tmp_path), {"HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1"}
    error, line = python(FETCH, kind, "owner/name", environment=offline)
    assert error == "UserError"
    options = " --repo-type dataset" if kind == "dataset" else ""
    assert "HF_HUB_OFFLINE is set" in line
    assert line.endswith(f"hf download owner/name{options}; or name a directory that has it")
    # As that command does.
    download = "import sys, huggingface_hub as h; print(h.snapshot_download('owner/name', repo_type=sys.argv[1]))"
    snapshot = python(download, kind, environment=environment)[-1]
    assert Path(snapshot).name == commit
    assert python(FETCH, kind, "owner/name", environment=offline)[0] == f"owner/name@{commit}"


def test_a_part_of_a_repository_is_not_taken_for_the_whole(hub: Hub, tmp_path: Path) -> None:
    hub.commit("datasets/owner/name", {"train-0.jsonl": PAIR, "train-1.jsonl": PAIR})
    download = (
        "import huggingface_hub as h; h.snapshot_download('owner/name', repo_type='dataset', allow_patterns='*-0*')"
    )
    python(download, environment=hub.environment(tmp_path))
    offline = {"HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1"}
    error, line = python(FETCH, "dataset", "owner/name", environment=offline)
    assert error == "UserError"
    assert "not all of it" in line


def test_errors_are_one_line_that_says_what_to_do(hub: Hub, tmp_path: Path) -> None:
    hub.commit("models/owner/private", {"config.json": "{}"})
    hub.commit("models/owner/gated", {"config.json": "{}"})
    hub.repositories["models/owner/private"].token = "secret"
    hub.repositories["models/owner/gated"].gated = True
    environment = hub.environment(tmp_path)
    for text, message in (
        ("owner/none", "owner/none: no such file or directory, and no such model on the Hub"),
        ("owner/private", "or a private one: set HF_TOKEN"),
        ("owner/gated", "owner/gated: a gated model of the Hub: accept its conditions"),
    ):
        error, line = python(FETCH, "model", text, environment=environment)
        assert error == "UserError"
        assert message in line
    granted = {**environment, "HF_TOKEN": "secret"}
    assert python(FETCH, "model", "owner/private", environment=granted)[1:] == ["config.json"]
    error, line = python(FETCH, "model", "owner/private@v2", environment=granted)
    assert (error, "no revision 'v2'" in line) == ("UserError", True)
    unreachable = {**environment, "HF_ENDPOINT": "http://127.0.0.1:9"}
    error, line = python(FETCH, "model", "owner/none", environment=unreachable)
    assert (error, "http://127.0.0.1:9 cannot be reached" in line) == ("UserError", True)


def test_files_of_a_datasets_split(hub: Hub, tmp_path: Path) -> None:
    names = ("data/train-00000-of-00002.jsonl", "data/train-00001-of-00002.jsonl", "data/test-00000-of-00001.jsonl")
    commit = hub.commit("datasets/owner/pairs", dict.fromkeys(names, PAIR))
    code = """
import json, sys
from megatron_tgdpo.data.sources import Source, find_files
from megatron_tgdpo.errors import UserError
try:
    print(json.dumps(find_files(Source("owner/pairs", sys.argv[1] or None))))
except UserError as error:
    print(error)
"""
    environment = hub.environment(tmp_path)
    snapshot = tmp_path / "hub/datasets--owner--pairs/snapshots" / commit
    (line,) = python(code, "train", environment=environment)
    assert json.loads(line) == [str(snapshot / name) for name in names[:2]]
    (line,) = python(code, "", environment={"HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1"})
    assert line == "owner/pairs: holds the splits train, test: say which, as {path: owner/pairs, split: train}"
