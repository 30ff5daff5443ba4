"""When does TGDPO win? Runs what docs/reproduction.md asks next, in the order registered there.

    python -m tools.examples.paper_in_miniature.ablations --out DIR [--question a b c d e f] [--report]
        [--results docs/results] [--images docs/images] [--short]

Start the same command again to continue after an interruption: every training of every seed is a file of its own in
DIR. ``--report`` trains no arm, and writes numbers and figures of the arms that are done on all their seeds. Everything
runs in one process and one thread. Question f asks of the runs of a. Needs the extra ``reproduction``.
"""

import argparse
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from tgdpo.command_line import run
from tools.examples.paper_in_miniature.ablations.arms import (
    COMPARING,
    QUEUE,
    RATES,
    SEEDS,
    TUNING_SEED,
    WORDS,
    Arm,
    Credits,
    Stage,
    long_answers,
)

if TYPE_CHECKING:
    from tools.examples.paper_in_miniature.ablations.laboratory import Laboratory

QUESTIONS = ("a", "b", "c", "d", "e", "f")


def conduct(laboratory: "Laboratory", questions: Sequence[str], stages: Sequence[Stage] = QUEUE) -> None:
    """Runs what is missing, printing a line an arm."""
    from tools.examples.paper_in_miniature.ablations.answers import compared_cells

    asked = {"a" if question == "f" else question for question in questions}
    for stage in stages:
        if stage.question not in asked:
            continue
        for arm in stage.arms:
            _run_arm(laboratory, arm, stage)
        if stage.question == "e" and set(stage.seeds).isdisjoint(COMPARING):
            for arm in compared_cells(laboratory):
                _run_arm(laboratory, arm, Stage("e", (arm,), COMPARING, stage.rate))
    if "c" in asked:
        # A seed with all lengths before the next: so that what is done can be compared.
        for seed in SEEDS:
            for words in WORDS:
                _run_seed(laboratory.of_answers(words), long_answers(), seed, f"c: {words} words, seed {seed}")


def _run_seed(laboratory: "Laboratory", arms: Iterable[Arm], seed: int, title: str) -> None:
    start, cpu = time.monotonic(), time.process_time()
    missing = [arm for arm in arms if not laboratory.is_there(seed, arm)]
    for arm in missing:
        laboratory.result(seed, arm)
    print(f"{title}: {_spent(start, cpu) if missing else 'was there'}", flush=True)


def _spent(start: float, cpu: float) -> str:
    return f"{time.monotonic() - start:.0f} s, {time.process_time() - cpu:.0f} s of a core"


def _run_arm(laboratory: "Laboratory", arm: Arm, stage: Stage) -> None:
    start, cpu = time.monotonic(), time.process_time()
    seeds = [TUNING_SEED, *stage.seeds] if isinstance(arm.guide, Credits) else stage.seeds
    missing = [seed for seed in seeds if not laboratory.is_there(seed, arm, stage.rate) and seed != TUNING_SEED]
    for seed in missing:
        laboratory.result(seed, arm, stage.rate)
    spent = _spent(start, cpu) if missing else "was there"
    print(f"{stage.question}: {arm.name}: {len(stage.seeds)} seeds, {spent}", flush=True)


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; see the module."""
    parser = argparse.ArgumentParser(
        prog="python -m tools.examples.paper_in_miniature.ablations",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="new directory, or one to continue")
    parser.add_argument("--question", nargs="+", choices=QUESTIONS, default=QUESTIONS, help="default: all")
    parser.add_argument("--report", action="store_true", help="train no arm: numbers and figures of what is there")
    parser.add_argument("--results", type=Path, metavar="DIR", help="for the numbers (default: --out)")
    parser.add_argument("--images", type=Path, metavar="DIR", help="for the figures (default: --out)")
    parser.add_argument("--short", action="store_true", help="at toy size, to see that it works")
    args = parser.parse_args(arguments)

    def action() -> None:
        # Only now: libraries read what is to be shown of theirs when they are imported.
        import torch

        from tools.examples.paper_in_miniature.ablations.answers import report
        from tools.examples.paper_in_miniature.ablations.laboratory import Laboratory
        from tools.examples.paper_in_miniature.ablations.world import Size

        short = Size(sft_examples=128, prompts=48, samples=3, judged=16, validation=16)
        torch.set_num_threads(1)
        laboratory = Laboratory(args.out, short if args.short else Size(), RATES)
        laboratory.open()
        if not args.report:
            conduct(laboratory, args.question)
        report(laboratory, args.question, args.results or args.out, args.images or args.out)

    return run(action)


if __name__ == "__main__":
    raise SystemExit(main())
