"""The question and answer files of AlpacaEval 2, Arena-Hard and MT-Bench, as those projects read and write them.

Sources: tatsu-lab/alpaca_eval 0.6.6 at cd543a1 (``main.py``, ``pairwise_evaluator.py``,
``results/*/model_outputs.json``); lmarena/arena-hard-auto at 196f6b8 (``gen_answer.py``, ``gen_judgment.py``,
``show_result.py``, ``question.jsonl`` of v2.0 and v0.1), and its layout of 2024, with ``question_id``; lm-sys/FastChat
0.2.36 at 0e6d3e4 (``fastchat/llm_judge``: ``gen_model_answer.py``, ``gen_judgment.py``, ``common.py``).
"""

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from megatron_tgdpo.errors import UserError

_MT_BENCH_TEMPERATURES = {
    "writing": 0.7,
    "roleplay": 0.7,
    "extraction": 0.0,
    "math": 0.0,
    "coding": 0.0,
    "reasoning": 0.0,
    "stem": 0.1,
    "humanities": 0.1,
    "arena-hard-200": 0.0,
}
_MT_BENCH_OTHER = 0.7


@dataclass(frozen=True)
class Question:
    """One question: its place for errors, what names it, the user's turns, and the record it came from."""

    place: str
    key: str
    turns: tuple[str, ...]
    record: Mapping[str, Any]


@dataclass(frozen=True)
class AnswerSet:
    """One question's answers: a text and a number of tokens a turn; by whom, and when (seconds since 1970)."""

    texts: list[str]
    tokens: list[int]
    model_id: str
    created: float


@dataclass(frozen=True)
class Benchmark:
    """How a project's files look and how it samples.

    Attributes:
        turns: Takes (record, place) to the user's turns.
        keys: What must be unique in a record, by the first of these that it has; none for its position.
        render: Makes the record that the project reads.
        temperature: Takes a record to the project's own temperature.
        max_new_tokens: The project's own limit.
        named_by_file: Whether the project takes a model's name from its file's.
    """

    turns: Callable[[Mapping[str, Any], str], tuple[str, ...]]
    keys: tuple[str, ...]
    render: Callable[[Question, AnswerSet], dict[str, Any]]
    temperature: Callable[[Mapping[str, Any]], float]
    max_new_tokens: int
    named_by_file: bool


def _alpaca_turns(record: Mapping[str, Any], place: str) -> tuple[str, ...]:
    return (_text(record.get("instruction"), "instruction", place),)


def _mt_bench_turns(record: Mapping[str, Any], place: str) -> tuple[str, ...]:
    return tuple(_text(turn, "turns", place) for turn in _list(record, place))


def _arena_hard_turns(record: Mapping[str, Any], place: str) -> tuple[str, ...]:
    if "uid" in record:
        return (_text(record.get("prompt"), "prompt", place),)
    contents = [turn.get("content") if isinstance(turn, Mapping) else None for turn in _list(record, place)]
    return tuple(_text(content, "turns[].content", place) for content in contents)


def _list(record: Mapping[str, Any], place: str) -> list[Any]:
    turns = record.get("turns")
    if not isinstance(turns, list) or not turns:
        raise UserError(f"{place}: a question needs a list 'turns' (keys: {', '.join(map(str, record))})")
    return turns


def _text(value: Any, key: str, place: str) -> str:
    if not isinstance(value, str) or not value.strip():
        raise UserError(f"{place}: a question needs a text in '{key}', found {value!r}")
    return value


def _alpaca_answer(question: Question, answers: AnswerSet) -> dict[str, Any]:
    dataset = {"dataset": question.record["dataset"]} if "dataset" in question.record else {}
    return {
        **dataset,
        "instruction": question.turns[0],
        "output": answers.texts[0],
        "generator": answers.model_id,
    }


def _mt_bench_answer(question: Question, answers: AnswerSet) -> dict[str, Any]:
    return _model_answer(question, answers, list(answers.texts))


def _arena_hard_answer(question: Question, answers: AnswerSet) -> dict[str, Any]:
    if "uid" in question.record:
        return {
            "uid": question.record["uid"],
            "ans_id": _answer_id(question, answers),
            "model": answers.model_id,
            "messages": [
                {"role": "user", "content": question.turns[0]},
                {"role": "assistant", "content": {"answer": answers.texts[0]}},
            ],
            "tstamp": answers.created,
        }
    pairs = zip(answers.texts, answers.tokens, strict=True)
    return _model_answer(question, answers, [{"content": text, "token_len": tokens} for text, tokens in pairs])


def _model_answer(question: Question, answers: AnswerSet, turns: list[Any]) -> dict[str, Any]:
    return {
        "question_id": question.record["question_id"],
        "answer_id": _answer_id(question, answers),
        "model_id": answers.model_id,
        "choices": [{"index": 0, "turns": turns}],
        "tstamp": answers.created,
    }


def _answer_id(question: Question, answers: AnswerSet) -> str:
    name = f"{question.key}:{answers.model_id}:{answers.created}"
    return hashlib.sha256(name.encode()).hexdigest()[:22]


BENCHMARKS = {
    "alpaca_eval": Benchmark(_alpaca_turns, (), _alpaca_answer, lambda _: 0.7, 2048, named_by_file=False),
    "arena_hard": Benchmark(
        _arena_hard_turns, ("uid", "question_id"), _arena_hard_answer, lambda _: 0.0, 4096, named_by_file=True
    ),
    "mt_bench": Benchmark(
        _mt_bench_turns,
        ("question_id",),
        _mt_bench_answer,
        lambda record: _MT_BENCH_TEMPERATURES.get(str(record.get("category")), _MT_BENCH_OTHER),
        1024,
        named_by_file=True,
    ),
}
