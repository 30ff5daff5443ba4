"""Question files of the benchmarks."""

from collections.abc import Mapping

from megatron_tgdpo.errors import UserError
from tgdpo.generation.prompt_sets import Benchmark, Question
from tgdpo.generation.prompts import records_of


def read_questions(path: str, benchmark: Benchmark) -> list[Question]:
    """Reads a benchmark's question file.

    Raises:
        UserError: It cannot be read, or is not in the benchmark's layout; names the line or record.
    """
    questions: list[Question] = []
    places: dict[str, str] = {}
    for place, number, record in records_of(path):
        if not isinstance(record, Mapping):
            raise UserError(f"{place}: a question must be a JSON object")
        turns = benchmark.turns(record, place)
        name = next((name for name in benchmark.keys if record.get(name) is not None), None)
        if benchmark.keys and name is None:
            raise UserError(f"{place}: the question has no {' or '.join(map(repr, benchmark.keys))}")
        key = str(number if name is None else record[name])
        if key in places:
            raise UserError(f"{place}: {name} {key} was at {places[key]} already")
        places[key] = place
        questions.append(Question(place, key, turns, record))
    if not questions:
        raise UserError(f"{path}: holds no question")
    return questions
