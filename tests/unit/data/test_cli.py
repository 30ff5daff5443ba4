"""The command, as a user runs it."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable

import pytest

from megatron_tgdpo.data.dataset import PreferenceDataset
from tests.launch import PATIENCE, ROOT
from tests.unit.data.conftest import plain_record


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "tgdpo", "preprocess", *arguments],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        check=False,
    )


def test_command_writes_a_dataset_and_a_summary(tmp_path, hf_directory, write_jsonl):
    records = [plain_record(index) for index in range(150)]
    records[7] = {"prompt": "Q", "chosen": "same", "rejected": "same"}
    prefix = str(tmp_path / "out" / "pairs")
    source = write_jsonl(records)
    arguments = ["--input", source, "--tokenizer", hf_directory, "--output", prefix]
    result = run(*arguments, "--max-length", "20", "--max-prompt-length", "8", "--workers", "2")
    assert result.returncode == 0, result.stderr
    # Before it lines of progress, where this takes its time.
    *_, warning = result.stderr.splitlines()
    assert warning.startswith(f"WARNING: {prefix}: 97.3 % of the responses (290 of 298) are cut")
    assert f"{prefix}: 149 pairs" in result.stdout
    assert "dropped: 1 (identical 1)" in result.stdout
    dataset = PreferenceDataset(prefix)
    assert dataset.lengths[:, 0].max() == 8
    assert (dataset.manifest["options"]["max_length"], dataset.source(7)) == (20, f"{source}:9")

    again = run(*arguments)
    assert (again.returncode, again.stdout) == (1, "")
    assert again.stderr.startswith("error: ")
    assert "--overwrite" in again.stderr


@pytest.mark.parametrize("workers", ["1", "2"])
def test_bad_input_is_one_line_and_status_one(tmp_path, sp_model, write_jsonl, workers):
    source = write_jsonl([*(plain_record(index) for index in range(70)), {"prompt": "Q", "chosen": "A"}])
    result = run(*("--input", source, "--tokenizer", sp_model, "--output", str(tmp_path / "out")), "--workers", workers)
    assert result.returncode == 1
    assert result.stderr == f"error: {source}:71: key 'rejected' is missing (keys: prompt, chosen)\n"
    assert [path.name for path in tmp_path.iterdir()] == ["pairs.jsonl"]


def test_a_tokenizer_of_the_hub_that_is_not_there_names_the_option(tmp_path, write_jsonl, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    result = run("--input", write_jsonl([plain_record(0)]), "--tokenizer", "owner/name", "--output", "x")
    assert result.returncode == 1
    (line,) = result.stderr.splitlines()
    assert line.startswith("error: --tokenizer: owner/name: no such file or directory, not")


def test_options_out_of_range_too(tmp_path, sp_model):
    result = run("--input", "x", "--tokenizer", sp_model, "--output", str(tmp_path / "o"), "--max-length", "0")
    assert (result.returncode, result.stderr.count("\n")) == (1, 1)
    assert result.stderr.startswith("error: max_length is 0")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_killed_run_leaves_no_worker_and_no_dataset(tmp_path, sp_model, write_jsonl, number):
    source = write_jsonl([plain_record(index, length=200) for index in range(20_000)])
    output = tmp_path / "out"
    arguments = ["--input", source, "--tokenizer", sp_model, "--output", str(output / "pairs"), "--workers", "2"]
    parent = subprocess.Popen(
        [sys.executable, "-m", "tgdpo", "preprocess", *arguments],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    wait_until(lambda: output.exists() and any(path.stat().st_size for path in output.iterdir()))
    parent.send_signal(number)
    assert parent.wait(timeout=PATIENCE) in (128 + number, -number)
    wait_until(lambda: not group_is_alive(parent.pid))
    left = [path.suffix for path in output.iterdir()]
    # Nothing can clean up after a SIGKILL; what it leaves has no manifest.
    assert left == ([] if number == signal.SIGTERM else [".bin"])


def wait_until(condition: Callable[[], bool], seconds: float = PATIENCE) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.05)


def group_is_alive(group: int) -> bool:
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True
