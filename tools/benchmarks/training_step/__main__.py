"""Speed and memory of a training step, compared with what else one could run; where a step's time goes.

    python -m tools.benchmarks.training_step compare    --size 20m --vocabulary 128256 --json metrics.json
    python -m tools.benchmarks.training_step profile    --size 20m --variant colocated --trace trace.json
    python -m tools.benchmarks.training_step lengths    --size 20m --vocabulary 32000
    python -m tools.benchmarks.training_step preprocess
    python -m tools.benchmarks.training_step planned    --size 20m --vocabulary 32000 --global-pairs 8

compare runs every variant (--variants) on the same random-weight Llama and the same pairs, each in a process of its
own, in turns, and fails unless all of them compute the same losses. profile prints the time of one step by groups of
operators.
lengths compares steps over as many tokens in sequences of more and of less equal length. preprocess measures
tgdpo preprocess. planned runs steps on layouts of up to
four ranks beside what the planner says of them. docs/performance.md says what is measured and how.
"""

import argparse
import logging
import sys
import tempfile
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers.utils import logging as transformers_logging

from megatron_tgdpo.errors import UserError
from tgdpo.command_line import check_present
from tools.benchmarks.training_step.models import SHAPES
from tools.benchmarks.training_step.variants import REFERENCE, VARIANTS, usable_cores

_POSITIVE = (
    "vocabulary", "global_pairs", "threads", "pairs", "rounds", "max_length", "mean", "pack_pairs", "top", "copies",
    "workers",
)  # fmt: skip


def _older_name(parser: argparse.ArgumentParser, option: str, **options: Any) -> None:
    """Adds the name that an option had in 0.1: it works and is not listed."""
    parser.add_argument(option, default=argparse.SUPPRESS, help=argparse.SUPPRESS, **options)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m tools.benchmarks.training_step",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(required=True, dest="command", metavar="COMMAND")
    compare = commands.add_parser("compare", help="all variants on the same problem")
    profile = commands.add_parser("profile", help="where the time of one step goes")
    lengths = commands.add_parser("lengths", help="sequences of more and of less equal length")
    preprocess = commands.add_parser("preprocess", help="speed and memory of preprocessing")
    planned = commands.add_parser("planned", help="the planner's step time beside the real one, by layout, on a CPU")
    for command in (compare, profile, lengths, planned):
        _add_step_options(command)
    planned.add_argument("--pairs", type=int, default=16, help="default: %(default)s")
    planned.add_argument("--mean", type=int, default=64, help="tokens of prompts and responses (default: %(default)s)")
    planned.add_argument("--pack-pairs", type=int, default=2, help="of a pack (default: %(default)s)")
    planned.add_argument("--layouts", nargs="+", metavar="NAME", default=None, help="default: all that there are")
    for command in (compare, lengths):
        command.add_argument("--pairs", type=int, default=64, help="default: %(default)s")
        command.add_argument("--rounds", type=int, default=3, help="of all variants (default: %(default)s)")
        variants = f"of {', '.join(VARIANTS)}"
        default = None if command is compare else ["colocated", REFERENCE]
        command.add_argument(
            "--variants", nargs="+", metavar="VARIANT", default=default, help=f"{variants} (default: %(default)s)"
        )
        _older_name(command, "--sides", dest="variants", nargs="+")
    for command in (compare, profile):
        command.add_argument("--max-length", type=int, default=1024, help="tokens of a sequence (default: %(default)s)")
    compare.add_argument("--json", type=Path, metavar="FILE", help="write all metrics there")
    profile.add_argument("--variant", choices=VARIANTS, default="colocated", help="default: %(default)s")
    _older_name(profile, "--side", dest="variant", choices=VARIANTS)
    profile.add_argument("--trace", type=Path, default=Path("trace.json"), help="default: %(default)s")
    profile.add_argument("--top", type=int, default=25, help="operators to list (default: %(default)s)")
    lengths.add_argument("--mean", type=int, default=256, help="tokens of prompts and responses (default: %(default)s)")
    lengths.add_argument("--spread", type=float, default=0.25, help="of lengths around the mean; then twice that")
    preprocess.add_argument("--pairs", type=int, default=300, help="that the files repeat (default: %(default)s)")
    preprocess.add_argument("--copies", type=int, default=2, help="of them in the smaller file (default: %(default)s)")
    preprocess.add_argument("--factor", type=int, default=8, help="larger file over smaller (default: %(default)s)")
    preprocess.add_argument("--workers", type=int, default=1, help="processes (default: %(default)s)")
    for command in (compare, profile, preprocess):
        command.add_argument(
            "--pairs-from",
            type=Path,
            metavar="FILE",
            help="of preference pairs, as training reads it (default: pairs of the demonstration's language)",
        )
        command.add_argument("--tokenizer", type=Path, help="HF directory or SentencePiece model, of --pairs-from")
    for command in (compare, profile, lengths, preprocess, planned):
        command.add_argument("--directory", type=Path, help="for scratch files (default: the system's)")
    return parser


def _add_step_options(command: argparse.ArgumentParser) -> None:
    command.add_argument("--size", choices=SHAPES, default="20m", help="default: %(default)s")
    command.add_argument("--vocabulary", type=int, default=128256, help="default: %(default)s")
    command.add_argument("--tied", action="store_true", help="the output weight is the embedding")
    command.add_argument("--global-pairs", type=int, default=16, help="pairs of a step (default: %(default)s)")
    command.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    command.add_argument("--dtype", choices=("fp32", "bf16"), help="default: bf16 on a GPU, else fp32")
    command.add_argument("--threads", type=int, default=usable_cores(), help="of a process (default: %(default)s)")


def _check(given: argparse.Namespace) -> None:
    values = vars(given)
    for name in _POSITIVE:
        if values.get(name, 1) < 1:
            raise UserError(f"--{name.replace('_', '-')} is {values[name]}: it must be positive")
    if values.get("factor", 2) < 2:
        raise UserError(f"--factor is {given.factor}: it must be at least 2")
    if given.command in ("compare", "lengths", "planned") and given.pairs % given.global_pairs:
        raise UserError(f"--pairs {given.pairs} is not a multiple of --global-pairs {given.global_pairs}")
    if (values.get("pairs_from") is None) != (values.get("tokenizer") is None):
        raise UserError("--pairs-from and --tokenizer go together: give both, or neither")
    if values.get("pairs_from") is not None:
        check_present(given, "--pairs-from", "--tokenizer")
    for name in ("json", "trace"):
        path = values.get(name)
        if path is not None and not path.absolute().parent.is_dir():
            raise UserError(f"--{name} {path}: there is no directory {path.parent}")


def _run(given: argparse.Namespace) -> None:
    _check(given)
    # Only now: these imports take seconds, and megatron-core warns of missing GPU libraries.
    from tools.benchmarks.training_step import commands

    if given.directory:
        given.directory.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="benchmark-", dir=given.directory) as scratch:
        getattr(commands, given.command)(given, Path(scratch))


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; returns the exit status: 1 for bad input, or where variants do not compute the same losses."""
    given = _parser().parse_args(arguments)
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    transformers_logging.disable_progress_bar()
    try:
        _run(given)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
