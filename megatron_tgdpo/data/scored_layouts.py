"""Layouts whose records hold several answers with scores, ranks or a preference: the best is chosen over the worst."""

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import groupby
from typing import Any

from megatron_tgdpo.data.example import Example, chat_prompt, has_no_pair, template_variables
from megatron_tgdpo.data.fields import RawRecord, kind_of, need, text_of
from megatron_tgdpo.errors import UserError

_ANSWERS = ("responses", "completions", "answers", "generations")
_SCORES = ("scores", "rewards", "ratings")
_TEXT_OF_ANSWER = ("response", "answer", "text", "content", "completion", "output")
_SCORE_OF_ANSWER = ("score", "overall_score", "reward", "rating")
# Two answers, and a number below zero where the first is better.
_TWO = (("response_1", "response_2"), ("response1", "response2"))
_PREFERENCES = ("preference_strength", "overall_preference")
# A file with one answer a record, and this score; those to a prompt are neighbours.
_ROW_SCORE = "helpfulness"
ANSWER_KEYS = (*_ANSWERS, *_SCORES, "response", _ROW_SCORE)
PREFERENCE_KEYS = (*(key for keys in _TWO for key in keys), *_PREFERENCES)


def is_scored(record: Mapping[str, Any]) -> bool:
    """Whether a record has answers with scores."""
    answers = _answers_of(record)
    if answers and isinstance(answers[0], Mapping):
        return "rank" not in answers[0]
    return bool(answers) and any(isinstance(record.get(key), list) for key in _SCORES)


def is_ranked(record: Mapping[str, Any]) -> bool:
    """Whether a record has answers with ranks."""
    answers = _answers_of(record)
    return bool(answers) and isinstance(answers[0], Mapping) and "rank" in answers[0]


def is_preference(record: Mapping[str, Any]) -> bool:
    """Whether a record has two answers and says which is better."""
    return has_no_pair(record) and _preference_keys(record) is not None


def _answers_of(record: Mapping[str, Any]) -> list[Any]:
    """The answers of a record that is no pair, if they are a list."""
    lists = (record[key] for key in _ANSWERS if isinstance(record.get(key), list))
    found: list[Any] = next(lists, []) if has_no_pair(record) else []
    return found


def parse_scored(record: Mapping[str, Any], place: str) -> Example:
    """Answers with scores, higher being better."""
    key = next((key for key in _ANSWERS if record.get(key) is not None), _ANSWERS[0])
    answers = need(record, key, place)
    if not isinstance(answers, list) or not answers:
        raise UserError(f"{place}: '{key}' must be a list of answers, found {kind_of(answers)}")
    if isinstance(answers[0], Mapping):
        texts = [_from(answer, _TEXT_OF_ANSWER, key, place) for answer in answers]
        scores = [_from(answer, _SCORE_OF_ANSWER, key, place) for answer in answers]
    else:
        name = next((name for name in _SCORES if record.get(name) is not None), _SCORES[0])
        texts, scores = answers, need(record, name, place)
        if not isinstance(scores, list) or len(scores) != len(texts):
            raise UserError(f"{place}: '{name}' must be a list with a number for each of '{key}'")
    return _best_and_worst(record, texts, [_number(score, key, place) for score in scores], key, place)


def parse_ranked(record: Mapping[str, Any], place: str) -> Example:
    """Answers with ranks, lower being better."""
    key = next((key for key in _ANSWERS if record.get(key) is not None), _ANSWERS[0])
    answers = need(record, key, place)
    if not isinstance(answers, list) or not answers:
        raise UserError(f"{place}: '{key}' must be a list of answers, found {kind_of(answers)}")
    texts = [_from(answer, _TEXT_OF_ANSWER, key, place) for answer in answers]
    ranks = [_number(_from(answer, ("rank",), key, place), "rank", place) for answer in answers]
    return _best_and_worst(record, texts, [-rank for rank in ranks], key, place)


def parse_preference(record: Mapping[str, Any], place: str) -> Example:
    """Two answers and which is preferred."""
    keys = _preference_keys(record)
    if keys is None:
        raise UserError(f"{place}: no two responses with a preference (keys: {', '.join(map(str, record))})")
    first, second, preference = keys
    strength = _number(record[preference], preference, place)
    return _best_and_worst(record, [record[first], record[second]], [-strength, strength], first, place)


def _preference_keys(record: Mapping[str, Any]) -> tuple[str, str, str] | None:
    for first, second in _TWO:
        for preference in _PREFERENCES:
            if all(record.get(key) is not None for key in (first, second, preference)):
                return first, second, preference
    return None


def _best_and_worst(record: Mapping[str, Any], texts: list[Any], scores: list[float], key: str, place: str) -> Example:
    """The earlier of equals."""
    prompt = chat_prompt(record, place)
    best = max(range(len(scores)), key=scores.__getitem__)
    worst = min(range(len(scores)), key=scores.__getitem__)
    chosen, rejected = (text_of(texts[index], key, place) for index in (best, worst))
    return Example(prompt, chosen, rejected, template_variables(record, place), scores[best] == scores[worst])


def _from(answer: Any, keys: tuple[str, ...], key: str, place: str) -> Any:
    if not isinstance(answer, Mapping):
        raise UserError(f"{place}: '{key}' must hold objects, found {kind_of(answer)}")
    for name in keys:
        if answer.get(name) is not None:
            return answer[name]
    raise UserError(
        f"{place}: an answer in '{key}' has none of {', '.join(keys)} (keys: {', '.join(map(str, answer))})"
    )


def _number(value: Any, key: str, place: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or value != value:
        raise UserError(f"{place}: a score or rank in '{key}' is no number ({value!r}): remove that answer")
    return float(value)


def is_scored_row(record: Any) -> bool:
    """Whether a record is one of several with an answer and its score each."""
    return isinstance(record, Mapping) and all(
        record.get(key) is not None for key in ("prompt", "response", _ROW_SCORE)
    )


def join_scored_rows(
    records: Iterable[RawRecord], kind: str, decode: Callable[[RawRecord], Mapping[str, Any]]
) -> Iterator[RawRecord]:
    """Records with an answer each as one for all neighbours of the same prompt, in the layout ``scored``.

    Args:
        records: of one file; `is_scored_row` holds of the first.
        kind: its format, which says how payloads are kept.
        decode: the record of a payload, by the keys of its layout.

    Raises:
        UserError: one is malformed.
    """
    rows = ((raw, decode(raw)) for raw in records)
    for prompt, neighbours in groupby(
        rows, key=lambda row: row[1].get("prompt") if isinstance(row[1], Mapping) else None
    ):
        group = list(neighbours)
        first = group[0][0]
        payload = json.loads(first.payload) if kind == "jsonl" else first.payload
        if prompt is not None:
            answers, scores = ([row.get(key) for _, row in group] for key in ("response", _ROW_SCORE))
            payload = {**payload, "responses": answers, "scores": scores}
        joined = json.dumps(payload).encode() if kind == "jsonl" else payload
        yield RawRecord(first.number, joined, group[-1][0].bytes_read)
