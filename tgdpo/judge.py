"""Has a model or a server judge two files of answers to the same questions, or score one.

    tgdpo judge --answers NAME.json --against BASE.json --judge MODEL --out judged
    tgdpo judge --answers NAME.json --judge http://127.0.0.1:8000/v1 --judge-model NAME --out judged

Files are those of `tgdpo generate`. Writes judgments.jsonl, results.json and judge.png. Start the same command again to
continue after an interruption. What each metric is: docs/evaluation.md.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_tgdpo.errors import UserError
from megatron_tgdpo.intervals import Estimate
from tgdpo.command_line import (
    MODEL_HELP,
    add_precision_arguments,
    add_processes_argument,
    check_present,
    check_scratch,
    find_whole_model,
    positive,
    positive_number,
    run,
)

# The share of replies without a verdict above which people are warned.
_UNPARSABLE = 0.1


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Reads the command line; ``None`` means this process's."""
    parser = argparse.ArgumentParser(prog="tgdpo judge", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--answers", required=True, metavar="FILE", help="answers to judge")
    parser.add_argument("--against", metavar="FILE", help="another model's; without it each answer is scored, 1 to 10")
    parser.add_argument("--questions", metavar="FILE", help="the benchmark's file, where answers do not repeat them")
    parser.add_argument("--judge", required=True, metavar="MODEL|URL", help=f"{MODEL_HELP}; or a server's URL to /v1")
    parser.add_argument("--judge-model", metavar="NAME", help="what the server calls its model")
    parser.add_argument("--remote", action="store_true", help="let the URL be another machine's")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="directory to write")
    parser.add_argument("--max-new-tokens", type=positive, default=1024, help="limit of a reply (default: %(default)s)")
    parser.add_argument("--batch", type=positive, default=8, help="questions judged together (default: %(default)s)")
    parser.add_argument(
        "--timeout", type=positive_number, default=300.0, help="seconds a server has for a reply (default: %(default)s)"
    )
    parser.add_argument("--chat-template", metavar="FILE", help="Jinja file replacing the judge's own template")
    add_precision_arguments(parser)
    add_processes_argument(parser)
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the tool; returns the exit status."""
    given = parse_arguments(arguments)
    return run(lambda: _judge(given))


def _judge(given: argparse.Namespace) -> None:
    from tgdpo.judging.judges import check_url, is_url

    check_present(given, "--answers", "--against", "--questions", "--chat-template")
    if given.out.exists() and not given.out.is_dir():
        raise UserError(f"--out {given.out}: is a file: name a directory")
    check_scratch(given)
    if is_url(given.judge):
        check_url(given.judge, given.remote)
        if given.judge_model is None:
            raise UserError("--judge-model is missing: what the server calls its model")
        if given.nproc is not None:
            raise UserError("--nproc is for a model as judge: a server gets the questions of a --batch at once")
    else:
        given.judge_directory = find_whole_model(given.judge, "--judge")
    # Only now: these imports take seconds, a wrong option should not.
    from tgdpo.judging.run import judge_answers

    print(table(judge_answers(given), given.out))


def table(results: dict[str, Any], out: Path) -> str:
    """The results for people."""
    from tgdpo.generation.tables import align, with_interval

    percent, number = "{:.1%}", "{:.2f}"
    forms = {
        "win_rate": percent, "length_controlled_win_rate": percent, "tie_rate": percent, "score": number,
        "order_dependent": percent, "first_place_rate": percent, "unparsable": percent,
        "mean_length": "{:.0f}", "mean_length_against": "{:.0f}",
    }  # fmt: skip
    against = f" against {results['against']}" if "against" in results else ""
    rows = [[f"{results['model']}{against}", f"{results['questions']} questions"]]
    for name, form in forms.items():
        if name in results:
            value = results[name]
            estimate = Estimate(**value) if isinstance(value, dict) else value and Estimate(value, None, None)
            rows.append([name, form.format(0) if value == 0 else with_interval(estimate, form)])
    lines = [align(rows), f"{out}: written, judgments.jsonl, results.json and judge.png"]
    if results["unparsable"] > _UNPARSABLE:
        lines.insert(
            1,
            f"WARNING: {results['unparsable']:.1%} of the replies have no verdict that can be read (judgments.jsonl "
            "has them): take a stronger judge, or a larger --max-new-tokens",
        )
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
