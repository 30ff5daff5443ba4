"""When does TGDPO win? Runs what docs/reproduction.md asks next, in the order registered there.

    python -m tools.examples.paper_in_miniature.ablations --out DIR [--question a b d e f] [--report]
        [--results docs/results] [--images docs/images] [--short]

Start the same command again to continue after an interruption: every training of every seed is a file of its own in
DIR. ``--report`` trains no arm, and writes numbers and figures of the arms that are done on all their seeds. Everything
runs in one process and one thread. Question f asks of the runs of a. Needs the extra ``reproduction``.
"""

import argparse
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from tgdpo.command_line import run
from tools.examples.paper_in_miniature.ablations.arms import COMPARING, QUEUE, RATES, TUNING_SEED, Arm, Credits, Stage
from tools.examples.paper_in_miniature.ablations.laboratory import Laboratory
from tools.examples.paper_in_miniature.ablations.world import Size

QUESTIONS = ("a", "b", "d", "e", "f")
SHORT = Size(sft_examples=128, prompts=48, samples=3, judged=16, validation=16)


def conduct(laboratory: Laboratory, questions: Sequence[str], stages: Sequence[Stage] = QUEUE) -> None:
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


def _run_arm(laboratory: Laboratory, arm: Arm, stage: Stage) -> None:
    start, cpu = time.monotonic(), time.process_time()
    seeds = [TUNING_SEED, *stage.seeds] if isinstance(arm.guide, Credits) else stage.seeds
    missing = [seed for seed in seeds if not laboratory.is_there(seed, arm, stage.rate) and seed != TUNING_SEED]
    for seed in missing:
        laboratory.result(seed, arm, stage.rate)
    spent = f"{time.monotonic() - start:.0f} s, {time.process_time() - cpu:.0f} s of a core" if missing else "was there"
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
        from tools.examples.paper_in_miniature.ablations.answers import report

        torch.set_num_threads(1)
        laboratory = Laboratory(args.out, SHORT if args.short else Size(), RATES)
        laboratory.open()
        if not args.report:
            conduct(laboratory, args.question)
        report(laboratory, args.question, args.results or args.out, args.images or args.out)

    return run(action)


if __name__ == "__main__":
    raise SystemExit(main())
