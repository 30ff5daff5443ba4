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
        if benchmark.key is not None and record.get(benchmark.key) is None:
            raise UserError(f"{place}: the question has no '{benchmark.key}'")
        key = str(number if benchmark.key is None else record[benchmark.key])
        if key in places:
            raise UserError(f"{place}: {benchmark.key} {key} was at {places[key]} already")
        places[key] = place
        questions.append(Question(place, key, turns, record))
    if not questions:
        raise UserError(f"{path}: holds no question")
    return questions
