"""Draws what runs logged: loss, accuracy, margin and token weights, in training and evaluation.

    tgdpo plot RUN
    tgdpo plot RUN RUN ... --out compared.png

RUN is an output directory of a training, finished or not. Without ``--out`` one run's picture is RUN/metrics.png.
"""

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from megatron_tgdpo.errors import UserError
from tgdpo.command_line import run


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Reads the command line; ``None`` means this process's."""
    parser = argparse.ArgumentParser(prog="tgdpo plot", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="output directory of a training")
    parser.add_argument("--out", type=Path, metavar="FILE", help=".png, .svg or .pdf; default for one: RUN/metrics.png")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the tool; returns the exit status."""
    given = parse_arguments(arguments)
    return run(lambda: _plot(given))


def _plot(given: argparse.Namespace) -> None:
    if given.out is None and len(given.runs) > 1:
        raise UserError("--out is needed for several runs: name the picture to write, such as compared.png")
    for directory in given.runs:
        if not directory.is_dir():
            raise UserError(f"{directory}: no such directory: name the output directory of a training")
    out = given.out or given.runs[0] / "metrics.png"
    if not out.parent.is_dir() or out.is_dir():
        raise UserError(f"--out {out}: cannot be written: name a file in a directory that exists")
    # Only now: these imports take seconds, a wrong option should not.
    from megatron_tgdpo.output.figure import FORMATS, draw, read_records

    if out.suffix.lower() not in FORMATS:
        raise UserError(f"--out {out}: the name must end in one of {', '.join(FORMATS)}")
    names = run_names(given.runs)
    draw({names[directory]: read_records(directory) for directory in names}, out)
    print(f"{out}: written")


def run_names(directories: Sequence[Path]) -> dict[Path, str]:
    """What to call each of some runs: the ends of their paths, as short as tells them apart."""
    whole = {directory: Path(os.path.abspath(directory)).parts for directory in directories}
    length = 1
    while True:
        names = {directory: "/".join(parts[-length:]) for directory, parts in whole.items()}
        if len(set(names.values())) == len(set(whole.values())) or length > max(map(len, whole.values())):
            return names
        length += 1


if __name__ == "__main__":
    sys.exit(main())
