"""Answers the questions of AlpacaEval 2, Arena-Hard or MT-Bench, in the files that those projects read.

    tgdpo generate --benchmark alpaca_eval --questions alpaca_eval.json --model MODEL --name NAME \
        --out NAME.json
    tgdpo generate --benchmark arena_hard --questions question.jsonl --model MODEL --name NAME \
        --out NAME.jsonl
    tgdpo generate --benchmark mt_bench --questions question.jsonl --model MODEL --name NAME \
        --out NAME.jsonl

Question files are the projects' own. Start the same command again to continue after an interruption: the result is the
same. Prints the lengths of the answers and their self-BLEU. See docs/evaluation.md.
"""

import argparse
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from megatron_tgdpo.errors import UserError
from tgdpo.command_line import (
    add_model_arguments,
    check_present,
    check_sampling,
    check_scratch,
    find_models,
    run,
)
from tgdpo.generation.prompt_sets import BENCHMARKS


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Reads the command line; ``None`` means this process's."""
    parser = argparse.ArgumentParser(prog="tgdpo generate", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--benchmark", choices=tuple(BENCHMARKS), required=True, help="whose files")
    parser.add_argument("--questions", required=True, metavar="FILE", help="the benchmark's own file")
    parser.add_argument("--name", required=True, help="the model's name in the answers")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="file of answers to write")
    add_model_arguments(parser, temperature=None, max_new_tokens=None)
    given = parser.parse_args(arguments)
    if given.max_new_tokens is None:
        given.max_new_tokens = BENCHMARKS[given.benchmark].max_new_tokens
    return given


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the tool; returns the exit status."""
    given = parse_arguments(arguments)
    return run(lambda: _answer(given))


def _answer(given: argparse.Namespace) -> None:
    if BENCHMARKS[given.benchmark].named_by_file and given.out.name != f"{given.name}.jsonl":
        raise UserError(f"--out {given.out}: {given.benchmark} takes names from files: call it {given.name}.jsonl")
    check_present(given, "--questions", "--chat-template")
    check_sampling(given)
    check_scratch(given)
    find_models(given, "--model")
    # Only now: these imports take seconds, a wrong option should not.
    from tgdpo.generation.answer_benchmarks import answer
    from tgdpo.generation.journal import summary_path
    from tgdpo.generation.tables import summary_table

    print(summary_table({key: value for key, value in answer(given).items() if key != "settings"}))
    print(f"{given.out}: written, with {summary_path(given.out).name}")
    # Which other answers do not repeat their questions, `tgdpo judge` says.
    questions = ["--questions", given.questions] if given.benchmark == "mt_bench" else []
    words = ["--answers", str(given.out), "--against", "OTHERS", *questions, "--judge", "MODEL", "--out", "judged"]
    print(f"compare them with another model's: tgdpo judge {shlex.join(words)}")


if __name__ == "__main__":
    sys.exit(main())
