"""Makes preference pairs from a model's own answers: n samples a prompt, scored, the best against the worst.

    tgdpo build-preferences --prompts prompts.jsonl --model MODEL --score REWARD_MODEL --out pairs.jsonl
    tgdpo build-preferences --prompts prompts.jsonl --model MODEL --score module:function --out pairs.jsonl

The prompts file has any layout of docs/data.md; responses in it are ignored. The output has that of TRL, with all
samples and scores beside each pair. Start the same command again to continue after an interruption: the result is the
same. See docs/evaluation.md.
"""

import argparse
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from tgdpo.command_line import (
    add_columns_argument,
    add_model_arguments,
    check_present,
    check_sampling,
    check_scratch,
    find_models,
    positive,
    run,
)


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Reads the command line; ``None`` means this process's."""
    parser = argparse.ArgumentParser(prog="tgdpo build-preferences", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--prompts", required=True, metavar="FILE", help="JSON, JSONL or Parquet file")
    parser.add_argument("--score", required=True, metavar="MODEL|MODULE:FUNCTION", help="reward model, or a function")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="JSONL file of pairs to write")
    parser.add_argument("--samples", type=positive, default=5, help="answers a prompt (default: %(default)s)")
    parser.add_argument("--max-prompt-length", type=positive, help="longer prompts are skipped (default: no limit)")
    add_columns_argument(parser)
    add_model_arguments(parser, temperature=0.8, max_new_tokens=1024)
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the tool; returns the exit status."""
    given = parse_arguments(arguments)
    return run(lambda: _build(given))


def _build(given: argparse.Namespace) -> None:
    check_present(given, "--prompts", "--chat-template")
    check_sampling(given)
    check_scratch(given)
    find_models(given, "--model")
    if ":" not in given.score:
        from megatron_tgdpo.checkpoints.find_model import find_model

        given.score = str(find_model(given.score, "--score"))
    # Only now: these imports take seconds, a wrong option should not.
    from tgdpo.generation.build_pairs import build
    from tgdpo.generation.journal import summary_path
    from tgdpo.generation.tables import summary_table

    print(summary_table({key: value for key, value in build(given).items() if key != "settings"}))
    print(f"{given.out}: written, with {summary_path(given.out).name}")
    print(f"train with them: tgdpo train CONFIG.yaml data.train={shlex.quote(str(given.out))}")


if __name__ == "__main__":
    sys.exit(main())
