"""Answer files in the layouts of the three benchmarks, their metrics, resumption, and errors that name the line."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from megatron_tgdpo.errors import UserError
from tests.tiny_models import make_llama
from tgdpo.generate import main, parse_arguments
from tgdpo.generation.answer_benchmarks import answer
from tgdpo.generation.journal import Journal
from tgdpo.generation.prompt_sets import BENCHMARKS
from tgdpo.generation.questions import read_questions
from tgdpo.generation.text_metrics import length_metrics, self_bleu

# As in the projects' own files, but for the texts.
QUESTIONS: dict[str, list[dict[str, Any]]] = {
    "alpaca_eval": [
        {"instruction": "w5 w6", "output": "w7", "generator": "text_davinci_003", "dataset": "helpful_base"},
        {"instruction": "w8", "output": "w9", "generator": "text_davinci_003", "dataset": "koala"},
        {"instruction": "w10 w11 w12", "output": "w9", "generator": "text_davinci_003", "dataset": "koala"},
    ],
    "arena_hard": [
        {"question_id": "328c149e", "category": "arena-hard-v0.1", "cluster": "ABC", "turns": [{"content": "w5 w6"}]},
        {"question_id": "0122ab60", "category": "arena-hard-v0.1", "cluster": "ABC", "turns": [{"content": "w8"}]},
    ],
    "arena_hard_today": [
        {"uid": "2edbb5f3", "category": "hard_prompt", "subcategory": "coding", "prompt": "w5 w6"},
        {"uid": "ec71c096", "category": "creative_writing", "subcategory": "creative_writing", "prompt": "w8"},
    ],
    "mt_bench": [
        {"question_id": 81, "category": "writing", "turns": ["w5 w6", "w7"]},
        {"question_id": 101, "category": "reasoning", "turns": ["w8 w9", "w10 w11"], "reference": ["w1", "w2"]},
        {"question_id": 141, "category": "stem", "turns": ["w12", "w13"]},
    ],
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_llama(tmp_path_factory.mktemp("answers") / "model", layers=2)


def write(path: Path, benchmark: str, records: list[dict[str, Any]]) -> Path:
    lines = [json.dumps(record) for record in records]
    path.write_text(json.dumps(records, indent=1) if benchmark == "alpaca_eval" else "\n".join(lines) + "\n")
    return path


def arguments(
    model: Path, folder: Path, benchmark: str, records: list[dict[str, Any]] | None = None, **options: object
) -> list[str]:
    questions = write(folder / f"{benchmark}.questions", benchmark, records or QUESTIONS[benchmark])
    chosen = {
        "benchmark": benchmark, "model": model, "questions": questions,
        "name": "tiny", "out": folder / ("tiny.json" if benchmark == "alpaca_eval" else "tiny.jsonl"),
        "max_new_tokens": 7, "batch": 2, **options,
    }  # fmt: skip
    return [part for key, value in chosen.items() for part in (f"--{key.replace('_', '-')}", str(value))]


def run(model: Path, folder: Path, benchmark: str, **options: Any) -> tuple[list[Any], dict[str, Any]]:
    given = parse_arguments(arguments(model, folder, benchmark, **options))
    summary = answer(given)
    text = given.out.read_text()
    return (json.loads(text) if benchmark == "alpaca_eval" else list(map(json.loads, text.splitlines()))), summary


def greedy(model: Path, messages: list[dict[str, str]], limit: int) -> tuple[str, int]:
    """By transformers alone: text and number of tokens."""
    tokenizer = AutoTokenizer.from_pretrained(model)
    network = AutoModelForCausalLM.from_pretrained(model).eval()
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    # The template has no generation prompt: the answer follows the header of the assistant's turn.
    text += "assistant"
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    made: list[int] = []
    while len(made) < limit and made[-1:] != [2]:
        with torch.no_grad():
            made.append(int(network(torch.tensor([ids + made])).logits[0, -1].argmax()))
    return tokenizer.decode(made, skip_special_tokens=True).strip(), len(made)


def test_alpaca_eval(model: Path, tmp_path: Path) -> None:
    records, summary = run(model, tmp_path, "alpaca_eval", temperature=0)
    for record, question in zip(records, QUESTIONS["alpaca_eval"], strict=True):
        text, _ = greedy(model, [{"role": "user", "content": question["instruction"]}], 7)
        assert record == {
            "dataset": question["dataset"],
            "instruction": question["instruction"],
            "output": text,
            "generator": "tiny",
        }
    assert summary["characters"]["max"] == max(len(record["output"]) for record in records)
    assert summary["self_bleu"] == self_bleu([record["output"] for record in records])


def test_arena_hard(model: Path, tmp_path: Path) -> None:
    records, summary = run(model, tmp_path, "arena_hard")  # greedy by itself, as the project's own config has it
    for record, question in zip(records, QUESTIONS["arena_hard"], strict=True):
        text, tokens = greedy(model, [{"role": "user", "content": question["turns"][0]["content"]}], 7)
        assert set(record) == {"question_id", "answer_id", "model_id", "choices", "tstamp"}
        assert record["question_id"] == question["question_id"]
        assert record["model_id"] == "tiny"
        assert record["choices"] == [{"index": 0, "turns": [{"content": text, "token_len": tokens}]}]
    assert len({record["answer_id"] for record in records}) == 2
    assert summary["tokens"]["mean"] == sum(r["choices"][0]["turns"][0]["token_len"] for r in records) / 2


def test_arena_hard_as_it_is_today(model: Path, tmp_path: Path) -> None:
    questions = QUESTIONS["arena_hard_today"]
    records, _ = run(model, tmp_path, "arena_hard", records=questions)
    for record, question in zip(records, questions, strict=True):
        talk = [{"role": "user", "content": question["prompt"]}]
        text, _ = greedy(model, talk, 7)
        assert set(record) == {"uid", "ans_id", "model", "messages", "tstamp"}
        # What gen_judgment.py reads.
        assert (record["uid"], record["model"]) == (question["uid"], "tiny")
        assert record["messages"] == [*talk, {"role": "assistant", "content": {"answer": text}}]
    assert len({record["ans_id"] for record in records}) == 2


def test_mt_bench_puts_the_first_answer_into_the_second_prompt(model: Path, tmp_path: Path) -> None:
    records, summary = run(model, tmp_path, "mt_bench")
    greedy_one = records[1]  # reasoning is greedy
    talk = [{"role": "user", "content": "w8 w9"}]
    first, _ = greedy(model, talk, 7)
    talk += [{"role": "assistant", "content": first}, {"role": "user", "content": "w10 w11"}]
    assert greedy_one["choices"] == [{"index": 0, "turns": [first, greedy(model, talk, 7)[0]]}]
    assert [record["question_id"] for record in records] == [81, 101, 141]
    assert summary["answers"] == 6
    # Writing is sampled at 0.7: another seed, another answer.
    (tmp_path / "other").mkdir()
    other, _ = run(model, tmp_path / "other", "mt_bench", seed=1)
    assert other[0]["choices"] != records[0]["choices"]
    assert other[1]["choices"] == records[1]["choices"]


def test_an_interrupted_run_continues_to_the_same_file(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    append = Journal.append

    def stop_at_the_second(self: Journal, part: Any) -> None:
        if self.done == 1:
            raise KeyboardInterrupt
        append(self, part)

    with monkeypatch.context() as patch:
        patch.setattr(Journal, "append", stop_at_the_second)
        assert main(arguments(model, tmp_path, "mt_bench")) == 130
    assert not (tmp_path / "tiny.jsonl").exists()
    resumed, summary = run(model, tmp_path, "mt_bench")
    (tmp_path / "whole").mkdir()
    whole, expected = run(model, tmp_path / "whole", "mt_bench")
    for record in (*resumed, *whole):
        del record["tstamp"], record["answer_id"]  # these tell when the run began
    assert resumed == whole
    assert summary == expected


@pytest.mark.parametrize(
    ("benchmark", "line", "message"),
    [
        ("alpaca_eval", '{"prompt": "w5"}', "2: a question needs a text in 'instruction', found None"),
        ("arena_hard", '{"question_id": "a", "turns": ["w5"]}', r"2: a question needs a text in 'turns\[\].content'"),
        ("arena_hard", '{"question_id": "a"}', "2: a question needs a list 'turns'"),
        ("arena_hard", '{"turns": [{"content": "w5"}]}', "2: the question has no 'uid' or 'question_id'"),
        ("arena_hard", '{"uid": "a", "turns": ["w5"]}', "2: a question needs a text in 'prompt'"),
        ("mt_bench", '{"question_id": 1, "turns": [{"content": "w5"}]}', "2: a question needs a text in 'turns'"),
        ("mt_bench", '{"question_id": 7, "turns": ["w5"]}', "2: question_id 7 was at .*:1 already"),
        ("mt_bench", '{"question_id": 1, "turns": ["w5"', "2: malformed JSON"),
    ],
)
def test_questions_in_a_wrong_layout(tmp_path: Path, benchmark: str, line: str, message: str) -> None:
    first = {"alpaca_eval": {"instruction": "w5"}, "arena_hard": {"question_id": 7, "turns": [{"content": "w5"}]}}
    good = first.get(benchmark, {"question_id": 7, "turns": ["w5"]})
    path = tmp_path / "questions.jsonl"
    path.write_text(json.dumps(good) + "\n" + line + "\n")
    with pytest.raises(UserError, match=f"questions.jsonl:{message}"):
        read_questions(str(path), BENCHMARKS[benchmark])


def test_a_file_that_the_project_would_take_for_another_model(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments(model, tmp_path, "mt_bench", out=tmp_path / "other.jsonl")) == 1
    assert "mt_bench takes names from files: call it tiny.jsonl\n" in capsys.readouterr().err


def test_lengths() -> None:
    metrics = length_metrics([*range(1, 20), 100])
    assert metrics == {"mean": 14.5, "median": 10.5, "p95": 19, "min": 1, "max": 100}
    assert length_metrics([4]) == {"mean": 4, "median": 4, "p95": 4, "min": 4, "max": 4}


def test_self_bleu() -> None:
    assert self_bleu(["a b c d e"] * 3) == pytest.approx(1.0)
    # "a b c d" against "a b c x": precisions 3/4, 2/3, 1/2 and 0 of 1, smoothed to 0.1; equal lengths, no penalty.
    assert self_bleu(["a b c d", "a b c x"]) == pytest.approx((3 / 4 * 2 / 3 * 1 / 2 * 0.1) ** 0.25)
    assert self_bleu(["a b c d", "e f g h"]) < 0.1
    assert self_bleu(["a b c d", " "]) is None
    many = [f"w{i} w{i + 1} w{i + 2} w{i + 3} same" for i in range(30)]
    assert self_bleu(many, limit=10) == self_bleu(many, limit=10)
