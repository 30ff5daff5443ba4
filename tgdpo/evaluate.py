"""Compares models on held-out preference pairs and on answers of their own, in one table; writes the metrics as JSON.

    tgdpo evaluate --reference MODEL --model dpo=MODEL --model tgdpo=MODEL --guide MODEL --pairs heldout.jsonl \
        --out results.json

A model is an HF directory, a model of the Hub (OWNER/NAME), a Megatron checkpoint, or a run's output directory. What
each metric is, and which interval is given for it: docs/evaluation.md.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from tgdpo.command_line import (
    add_columns_argument,
    add_length_arguments,
    add_precision_arguments,
    add_processes_argument,
    add_template_arguments,
    check_present,
    check_scratch,
    check_temperature,
    find_whole_model,
    not_negative,
    positive,
    positive_number,
    preprocess_options,
    run,
)
from tgdpo.generation.roles import GUIDE, REFERENCE, named_models


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Reads the command line; ``None`` means this process's."""
    parser = argparse.ArgumentParser(prog="tgdpo evaluate", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--reference", type=Path, required=True, metavar="MODEL", help="what rewards are relative to")
    parser.add_argument(
        "--model", type=_named_directory, action="append", default=[], metavar="NAME=MODEL", help="a model to compare"
    )
    parser.add_argument("--guide", type=Path, metavar="MODEL", help="a guide, compared too; a swapped one is reported")
    parser.add_argument("--pairs", required=True, metavar="FILE", help="held-out pairs, raw or preprocessed")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="JSON file to write")
    parser.add_argument("--limit", type=positive, help="pairs to score (default: all)")
    parser.add_argument(
        "--beta", type=positive_number, default=0.1, help="scale of the implicit reward (default: %(default)s)"
    )
    parser.add_argument(
        "--prompts", type=not_negative, default=200, help="prompts to answer; 0 leaves it out (default: %(default)s)"
    )
    parser.add_argument("--max-new-tokens", type=positive, default=512, help="limit of an answer (%(default)s)")
    parser.add_argument("--temperature", type=float, default=1.0, help="of the answers (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the answers (default: %(default)s)")
    parser.add_argument("--batch", type=positive, default=16, help="answers made together (default: %(default)s)")
    add_template_arguments(parser)
    add_columns_argument(parser)
    add_length_arguments(parser)
    add_precision_arguments(parser)
    add_processes_argument(parser)
    return parser.parse_args(arguments)


def _named_directory(text: str) -> tuple[str, Path]:
    name, _, directory = text.partition("=")
    if not name or not directory or name in (REFERENCE, GUIDE):
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=MODEL, with a name other than {REFERENCE} and {GUIDE}")
    return name, Path(directory)


def _option(name: str) -> str:
    """The option that named a model."""
    return f"--{name}" if name in (REFERENCE, GUIDE) else f"--model {name}"


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the tool; returns the exit status."""
    given = parse_arguments(arguments)
    return run(lambda: _evaluate(given))


def _evaluate(given: argparse.Namespace) -> None:
    models = named_models(given.reference, given.model, given.guide)
    check_temperature(given)
    check_present(given, "--chat-template")
    check_scratch(given)
    models = {name: find_whole_model(path, _option(name)) for name, path in models.items()}
    given.reference = models[REFERENCE]
    # The tokenizer is the reference's, wherever that keeps it.
    options = preprocess_options(given, str(given.reference))
    # Only now: these imports take seconds, a wrong option should not.
    from tgdpo.generation.compare_models import report

    report(given, models, options)


if __name__ == "__main__":
    sys.exit(main())
