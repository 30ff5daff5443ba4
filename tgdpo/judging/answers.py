"""Answer files of the benchmarks, and the questions they answer, in one form."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from megatron_tgdpo.errors import UserError
from tgdpo.generation.prompts import records_of


@dataclass(frozen=True)
class Dialogue:
    """One question with its answer.

    Attributes:
        place: The answer's record, for errors.
        turns: The user's texts.
        answers: As many texts of the model.
    """

    place: str
    turns: tuple[str, ...]
    answers: tuple[str, ...]

    @property
    def length(self) -> int:
        """Characters of the answers."""
        return sum(map(len, self.answers))


def read_answers(path: str, questions: str | None) -> tuple[str, dict[str, Dialogue]]:
    """The model's name, and what it answered by what identifies each question.

    Args:
        path: Answers to AlpacaEval, Arena-Hard or MT-Bench, in the layouts that ``tgdpo generate`` writes.
        questions: The benchmark's question file, for answers that do not repeat the question.

    Raises:
        UserError: A file cannot be read, is in no such layout, or lacks a question; names the line or record.
    """
    asked = _read_questions(questions) if questions is not None else {}
    found: dict[str, Dialogue] = {}
    names: set[str] = set()
    seen: Counter[str] = Counter()
    for place, _, record in records_of(path):
        try:
            key, name, turns, answers = _parse(record)
        except (KeyError, TypeError, IndexError, AttributeError) as error:
            raise UserError(
                f"{place}: no answer to AlpacaEval, Arena-Hard or MT-Bench (expected keys: instruction and output, uid "
                "and messages, or question_id and choices)"
            ) from error
        if not all(isinstance(text, str) for text in (key, name, *turns, *answers)):
            raise UserError(f"{place}: the question, the answer and the model's name must be texts")
        if not turns:
            if key not in asked:
                raise UserError(
                    f"{place}: the text of question {key} is not in the answers"
                    + (f", nor in {questions}" if questions else ": name the benchmark's file with --questions")
                )
            turns = asked[key]
        if not answers or len(turns) != len(answers):
            raise UserError(f"{place}: {len(answers)} answers to a question of {len(turns)} turns")
        names.add(name)
        seen[key] += 1
        if seen[key] > 1 and "instruction" not in record:
            raise UserError(f"{place}: question {key} was answered above already")
        # AlpacaEval has no ids, so that two questions may be alike: they are told apart by their order.
        found[key if seen[key] == 1 else f"{key} ({seen[key]})"] = Dialogue(place, turns, answers)
    if len(names) != 1:
        raise UserError(f"{path}: must hold the answers of one model, has {', '.join(sorted(names)) or 'none'}")
    return names.pop(), found


def check_same_questions(first: Mapping[str, Dialogue], second: Mapping[str, Dialogue], paths: tuple[str, str]) -> None:
    """Refuses answers to different questions.

    Raises:
        UserError: One question is answered in one file only, or differs.
    """
    for mine, theirs, path in ((first, second, paths[1]), (second, first, paths[0])):
        for key, dialogue in mine.items():
            if key not in theirs:
                raise UserError(f"{path}: has no answer to the question of {dialogue.place}")
            if theirs[key].turns != dialogue.turns:
                raise UserError(f"{dialogue.place}: its question is another one than that of {theirs[key].place}")


def _parse(record: Any) -> tuple[str, str, tuple[str, ...], tuple[str, ...]]:
    """Key, model, the user's turns (none where the record has not got them) and the answers."""
    if "instruction" in record:
        return record["instruction"], record["generator"], (record["instruction"],), (record["output"],)
    if "uid" in record:
        messages = record["messages"]
        turns = tuple(message["content"] for message in messages if message["role"] == "user")
        answers = tuple(message["content"]["answer"] for message in messages if message["role"] == "assistant")
        return str(record["uid"]), record["model"], turns, answers
    return str(record["question_id"]), record["model_id"], (), _texts(record["choices"][0]["turns"])


def _read_questions(path: str) -> dict[str, tuple[str, ...]]:
    questions = {}
    for place, _, record in records_of(path):
        try:
            key = str(record["question_id"])
            turns = _texts(record["turns"])
        except (KeyError, TypeError) as error:
            raise UserError(f"{place}: a question needs 'question_id' and 'turns'") from error
        questions[key] = turns
    return questions


def _texts(turns: Any) -> tuple[str, ...]:
    return tuple(turn if isinstance(turn, str) else turn["content"] for turn in turns)
