"""Pairs from a tiny model: the best against the worst, the same after a kill, and errors that name the culprit."""

import json
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer

from megatron_tgdpo.data.dataset import open_or_preprocess
from megatron_tgdpo.data.fields import Message
from megatron_tgdpo.data.options import PreprocessOptions
from megatron_tgdpo.errors import UserError
from tests.launch import PATIENCE, environment
from tests.tiny_models import make_llama, make_tokenizer
from tests.unit.commands.scores import even_words
from tgdpo.build_preferences import main, parse_arguments
from tgdpo.generation.build_pairs import NoPairError, build, pick_pair
from tgdpo.generation.rewards import RewardModelScorer

PROMPTS = [f"w{number} w5" for number in (9, 11, 13, 15, 17, 19, 21)]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_llama(tmp_path_factory.mktemp("build") / "model", layers=2)


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps({"instruction": text}) + "\n" for text in PROMPTS))
    return path


def arguments(model: Path, prompts: Path, out: Path, **options: object) -> list[str]:
    chosen = {
        "model": model, "prompts": prompts, "out": out, "score": "tests.unit.commands.scores:even_words",
        "max_new_tokens": 6, "batch": 2, "samples": 4, **options,
    }  # fmt: skip
    return [part for key, value in chosen.items() for part in (f"--{key.replace('_', '-')}", str(value))]


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_best_against_worst_in_a_file_that_training_reads(model: Path, prompts: Path, tmp_path: Path) -> None:
    out = tmp_path / "pairs.jsonl"
    summary = build(parse_arguments(arguments(model, prompts, out)))
    records = read(out)
    # All answers to the first prompt, about w9, have the same score.
    assert summary["ties"] == 1
    assert [record["source"] for record in records] == [2, 3, 4, 5, 6, 7]
    assert summary["pairs"] == len(records) == 6
    assert summary["prompts"] == 7
    for record in records:
        assert record["prompt"] == [{"role": "user", "content": PROMPTS[record["source"] - 1]}]
        assert len(record["samples"]) == 4
        assert record["scores"] == even_words(record["prompt"], record["samples"])
        by_score = dict(zip(record["samples"], record["scores"], strict=True))
        assert by_score[record["chosen"][0]["content"]] == max(record["scores"])
        assert by_score[record["rejected"][0]["content"]] == min(record["scores"])
    assert summary["score_gap_mean"] == sum(max(r["scores"]) - min(r["scores"]) for r in records) / 6
    dataset = open_or_preprocess(str(out), PreprocessOptions(str(model)), str(tmp_path / "cache"), progress=False)
    assert len(dataset) == 6
    # A second start finds the job finished; another job is kept from overwriting it.
    before = out.read_bytes()
    assert build(parse_arguments(arguments(model, prompts, out))) == summary
    with pytest.raises(UserError, match=r"exists, made with seed 0, this run has 1"):
        build(parse_arguments(arguments(model, prompts, out, seed=1)))
    assert out.read_bytes() == before


def test_a_killed_run_continues_to_the_same_result(model: Path, prompts: Path, tmp_path: Path) -> None:
    score = "tests.unit.commands.scores:even_words_killed_once"
    whole, resumed = tmp_path / "whole.jsonl", tmp_path / "resumed.jsonl"
    build(parse_arguments(arguments(model, prompts, whole, score=score)))
    command = [sys.executable, "-m", "tgdpo.build_preferences", *arguments(model, prompts, resumed, score=score)]
    (tmp_path / "KILL").touch()
    killed = subprocess.run(
        command, cwd=tmp_path, env=environment(), capture_output=True, timeout=PATIENCE, check=False
    )
    assert killed.returncode == -signal.SIGKILL
    assert not resumed.exists()
    journal = resumed.with_name("resumed.jsonl.unfinished")
    assert journal.read_bytes().count(b"\n") == 1 + 2  # settings, and two batches of two prompts
    with open(journal, "ab") as file:
        file.write(b'[{"samples": ["w3')  # what a kill in the midst of writing leaves
    build(parse_arguments(arguments(model, prompts, resumed, score=score)))
    assert resumed.read_bytes() == whole.read_bytes()
    summaries = [path.with_name(path.name + ".summary.json").read_bytes() for path in (whole, resumed)]
    assert summaries[0] == summaries[1]
    assert not journal.exists()


@pytest.mark.parametrize(
    ("samples", "scores", "expected"),
    [
        (["a", "b", "c"], [1.0, 3.0, 2.0], (1, 0)),
        (["a", "b", "c", "d"], [3.0, 1.0, 3.0, 1.0], (0, 1)),
        (["a", " ", "b"], [2.0, 9.0, 1.0], (0, 2)),
    ],
)
def test_pick_pair(samples: list[str], scores: list[float], expected: tuple[int, int]) -> None:
    assert pick_pair(samples, scores) == expected


@pytest.mark.parametrize(
    ("samples", "scores", "reason"),
    [
        (["a", "b"], [2.0, 2.0], "ties"),
        (["a", "a", "a"], [1.0, 2.0, 3.0], "too_few_answers"),
        (["a", "", " "], [2.0, 9.0, 1.0], "too_few_answers"),
    ],
)
def test_answers_that_make_no_pair(samples: list[str], scores: list[float], reason: str) -> None:
    with pytest.raises(NoPairError) as raised:
        pick_pair(samples, scores)
    assert raised.value.reason == reason


def test_reward_model_scores_the_whole_templated_conversation(tmp_path: Path) -> None:
    directory = make_reward_model(tmp_path / "padded", pad_token_id=130)
    unpadded = make_reward_model(tmp_path / "unpadded", pad_token_id=None)
    tokenizer = AutoTokenizer.from_pretrained(directory)
    answers = ["w7 w8 w9 w10", "w7", "w20 w21"]
    model = AutoModelForSequenceClassification.from_pretrained(directory).eval()
    expected = []
    for answer in answers:
        talk = [{"role": "user", "content": "w5 w6"}, {"role": "assistant", "content": answer}]
        ids = tokenizer(tokenizer.apply_chat_template(talk, tokenize=False), add_special_tokens=False)["input_ids"]
        with torch.no_grad():
            expected.append(model(torch.tensor([ids])).logits.item())
    for path in (directory, unpadded):
        scorer = RewardModelScorer(path, torch.float32, torch.device("cpu"))
        assert scorer.score((Message("user", "w5 w6"),), answers, "here") == pytest.approx(expected, rel=1e-5)
    with pytest.raises(UserError, match="a reward model has 1 output, this one has 2"):
        RewardModelScorer(make_reward_model(tmp_path / "two", num_labels=2), torch.float32, torch.device("cpu"))


TOOLS = [{"type": "function", "function": {"name": "add"}}]


def test_tools_of_a_prompt_reach_the_reward_model(tmp_path: Path) -> None:
    directory = make_reward_model(tmp_path / "reward")
    talk, answers = (Message("user", "w5 w6"),), ["w7 w8"]
    bare = RewardModelScorer(directory, torch.float32, torch.device("cpu"))
    with pytest.raises(UserError, match=r"^f:3: the chat template of .*reward does not read 'tools'"):
        bare.score(talk, answers, "f:3", {"tools": TOOLS})
    calling = Message("assistant", "w9", {"tool_calls": [{"function": {"name": "add", "arguments": {}}}]})
    with pytest.raises(UserError, match=r"^f:4: .* does not read 'tool_calls' of a message of assistant"):
        bare.score((*talk, calling, Message("user", "w5")), answers, "f:4")
    tokenizer = AutoTokenizer.from_pretrained(directory)
    template = "{% for tool in tools or [] %}w11 {{ tool.function.name }} {% endfor %}" + tokenizer.chat_template
    (directory / "chat_template.jinja").write_text(template)
    scorer = RewardModelScorer(directory, torch.float32, torch.device("cpu"))
    given, without = (scorer.score(talk, answers, "f:5", variables) for variables in ({"tools": TOOLS}, {}))
    assert given != pytest.approx(without)
    whole = [{"role": "user", "content": "w5 w6"}, {"role": "assistant", "content": "w7 w8"}]
    text = AutoTokenizer.from_pretrained(directory).apply_chat_template(whole, tools=TOOLS, tokenize=False)
    ids = tokenizer(text, add_special_tokens=False, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        expected = AutoModelForSequenceClassification.from_pretrained(directory).eval()(ids).logits.item()
    assert given == pytest.approx([expected], rel=1e-5)


def test_tools_of_a_prompt_reach_the_scoring_function(tmp_path: Path, model: Path) -> None:
    reads_tools = tmp_path / "model"
    shutil.copytree(model, reads_tools)
    template = AutoTokenizer.from_pretrained(model).chat_template
    (reads_tools / "chat_template.jinja").write_text("{% if tools %}w11 {% endif %}" + template)
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text(json.dumps({"instruction": "w5", "tools": TOOLS}) + "\n")
    score = "tests.unit.commands.scores:even_words_and_tools"
    summary = build(parse_arguments(arguments(reads_tools, prompts, tmp_path / "a.jsonl", score=score)))
    assert summary["pairs"] == 1
    (record,) = read(tmp_path / "a.jsonl")
    assert record["scores"] == [1 + found for found in even_words(record["prompt"], record["samples"])]
    with pytest.raises(UserError, match=r"prompts\.jsonl:1: .*even_words raised TypeError: .*'tools'"):
        build(parse_arguments(arguments(reads_tools, prompts, tmp_path / "b.jsonl")))


def make_reward_model(path: Path, **options: Any) -> Path:
    config = AutoConfig.for_model(
        "llama", vocab_size=131, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, **{"num_labels": 1, "pad_token_id": None, **options},
    )  # fmt: skip
    torch.manual_seed(0)
    AutoModelForSequenceClassification.from_config(config).save_pretrained(path)
    make_tokenizer(131).save_pretrained(path)
    return path


@pytest.mark.parametrize(
    ("function", "message"),
    [
        ("infinite", r"prompts.jsonl:1: .*:infinite returned a score that is not finite"),
        ("too_few", r"prompts.jsonl:1: .*:too_few returned 1 scores for 4 answers"),
        ("broken", r"prompts.jsonl:1: .*:broken raised RuntimeError: out of order"),
        ("absent", r"--score .*:absent: cannot be imported"),
    ],
)
def test_bad_scores(model: Path, prompts: Path, tmp_path: Path, function: str, message: str) -> None:
    score = f"tests.unit.commands.scores:{function}"
    with pytest.raises(UserError, match=message):
        build(parse_arguments(arguments(model, prompts, tmp_path / "out.jsonl", score=score)))


def test_bad_input_is_one_line(model: Path, prompts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bare = tmp_path / "bare"
    shutil.copytree(model, bare, ignore=shutil.ignore_patterns("tokenizer*", "chat_template*"))
    wrong = tmp_path / "wrong.jsonl"
    wrong.write_text('{"instruction": "w5"}\n{"query": "w6"}\n')
    only_w9 = tmp_path / "w9.jsonl"
    only_w9.write_text('{"instruction": "w9"}\n')
    (tmp_path / "file").touch()
    cases = [
        (arguments(bare, prompts, tmp_path / "a"), "cannot open the tokenizer in"),
        (arguments(model, wrong, tmp_path / "b"), f"{wrong}:2: no prompt (keys: query)"),
        (arguments(model, prompts, tmp_path / "file" / "c"), "c.unfinished: cannot be written"),
        (arguments(tmp_path / "nothing", prompts, tmp_path / "d"), "nothing: no such directory"),
        (arguments(tmp_path, prompts, tmp_path / "j"), "neither an HF directory"),
        (arguments(model, prompts, tmp_path / "e", temperature=-1), "--temperature is -1.0"),
        (arguments(model, prompts, tmp_path / "f", top_p=0), "--top-p is 0.0"),
        (arguments(model, prompts, tmp_path / "g", max_prompt_length=2), "all 7 prompts are longer"),
        (arguments(model, prompts, tmp_path / "h", backend="vllm"), "vLLM cannot be imported"),
        (arguments(model, only_w9, tmp_path / "i"), "of 1 prompts 1 had answers of one score"),
    ]
    for given, message in cases:
        assert main(given) == 1, message
        output = capsys.readouterr()
        line = output.err.strip().splitlines()[-1]
        assert line.startswith("error: "), output.err
        assert message in line
    assert not [path for path in tmp_path.iterdir() if len(path.name) == 1]
