"""Several processes give the bytes that one gives; one that fails or is killed is named, and the job goes on later."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_tgdpo.errors import UserError
from tests.launch import PATIENCE, environment
from tests.tiny_models import make_llama
from tests.unit.commands.test_build_preferences import PROMPTS
from tests.unit.commands.test_build_preferences import arguments as build_arguments
from tests.unit.commands.test_evaluate import evaluate, write_pairs
from tests.unit.commands.test_generate import run as answer_benchmark
from tests.unit.commands.test_judge import COUNT, alpaca
from tests.unit.commands.work import make_state, refuse_three, see, seen, slow_if_even
from tgdpo.build_preferences import parse_arguments
from tgdpo.generation.build_pairs import build
from tgdpo.generation.workers import Workers, process_count
from tgdpo.judge import main as judge


def test_results_come_in_order_from_all_processes() -> None:
    with Workers(2, make_state) as workers:
        results = list(workers.map(slow_if_even, range(9)))
        workers.everywhere(see, 7, "telling all")
        assert list(workers.map(seen, range(4))) == [7] * 4
    assert [item for item, _ in results] == list(range(9))
    pids = {pid for _, pid in results}
    assert len(pids) == 2
    assert os.getpid() not in pids
    for pid in pids:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


@pytest.mark.parametrize(
    ("item", "message"),
    [
        (3, r"^process [01]: prompts.jsonl:3: no text$"),
        (4, r"^process [01]: ValueError: broken in two lines$"),
        (5, r"^process [01] was ended by SIGKILL; start the same command again$"),
    ],
)
def test_a_failed_process_is_named(item: int, message: str) -> None:
    with pytest.raises(UserError, match=message), Workers(2, make_state) as workers:
        list(workers.map(refuse_three, [0, 1, item, 2]))


def test_more_processes_than_gpus_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    assert process_count(3) == 3  # no GPU is visible here, or as many
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    assert (process_count(None), process_count(1)) == (2, 1)
    with pytest.raises(UserError, match="--nproc is 3, but 2 GPUs are visible"):
        process_count(3)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("workers")
    return {name: make_llama(folder / name, layers=2, seed=seed) for seed, name in enumerate(("reference", "guide"))}


def test_benchmark_answers_are_the_same(
    models: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("time.time", lambda: 1.5e9)  # it is in the answers
    outputs = []
    for nproc in (1, 2):
        folder = tmp_path / str(nproc)
        folder.mkdir()
        answer_benchmark(models["guide"], folder, "mt_bench", nproc=nproc)
        outputs.append([(folder / name).read_bytes() for name in ("tiny.jsonl", "tiny.jsonl.summary.json")])
    assert outputs[0] == outputs[1]


def test_metrics_of_compared_models_are_the_same(
    models: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tgdpo.generation.logps.TOKENS_PER_BATCH", 20)
    pairs = write_pairs(tmp_path / "pairs.jsonl", models)
    outputs = []
    for nproc in (1, 2):
        status, out = evaluate(tmp_path, pairs, **models, nproc=nproc)
        assert status == 0
        outputs.append((out.read_bytes(), capsys.readouterr().out))
    assert outputs[0] == outputs[1]


def test_judgments_of_a_model_are_the_same(
    models: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files = [alpaca(tmp_path / f"{name}.json", name, lambda i, word=name: f"{word} {i}") for name in ("ours", "base")]
    outputs = []
    for nproc in (1, 2):
        out = tmp_path / str(nproc)
        options = ["--judge", str(models["guide"]), "--batch", "2", "--max-new-tokens", "3", "--nproc", str(nproc)]
        assert judge(["--answers", str(files[0]), "--against", str(files[1]), *options, "--out", str(out)]) == 0
        said = capsys.readouterr().out.replace(str(out), "OUT")
        outputs.append((said, *(path.read_bytes() for path in sorted(out.iterdir()))))
    assert outputs[0] == outputs[1]
    assert len(outputs[0]) == 1 + len(("judge.png", "judgments.jsonl", "results.json"))
    assert outputs[0][2].count(b'"replies"') == COUNT


def test_a_killed_process_ends_the_command_which_continues_to_the_same_pairs(
    models: dict[str, Path], tmp_path: Path
) -> None:
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"instruction": text}) + "\n" for text in PROMPTS))
    score = "tests.unit.commands.scores:even_words_killed_once"
    whole, resumed = tmp_path / "whole.jsonl", tmp_path / "resumed.jsonl"
    build(parse_arguments(build_arguments(models["guide"], prompts, whole, score=score)))
    given = build_arguments(models["guide"], prompts, resumed, score=score, nproc=2)
    command = [sys.executable, "-m", "tgdpo.build_preferences", *given]
    (tmp_path / "KILL").touch()
    killed = subprocess.run(
        command, cwd=tmp_path, env=environment(), capture_output=True, text=True, timeout=PATIENCE, check=False
    )
    assert killed.returncode == 1
    line = killed.stderr.splitlines()[-1]
    assert line.startswith("error: process ")
    assert line.endswith(" was ended by SIGKILL; start the same command again")
    assert not resumed.exists()
    assert resumed.with_name("resumed.jsonl.unfinished").exists()
    finished = subprocess.run(
        command, cwd=tmp_path, env=environment(), capture_output=True, text=True, timeout=PATIENCE, check=False
    )
    assert finished.returncode == 0
    # On a slow machine it says that it goes on.
    assert all(line.startswith(("starting 2 processes: ", "answers: ")) for line in finished.stderr.splitlines())
    assert resumed.read_bytes() == whole.read_bytes()
    summaries = [path.with_name(path.name + ".summary.json").read_bytes() for path in (whole, resumed)]
    assert summaries[0] == summaries[1]
