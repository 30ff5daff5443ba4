"""DPO, SimPO and TGDPO with either guide on a model and pairs of your own, over repeated splits.

    python -m tools.examples.real_pairs --model DIR_OR_HUB_ID --pairs FILE --out DIR [--splits 5] [--train 240]
        [--held-out 60] [--nproc N] [section.key=value ...]
    python -m tools.examples.real_pairs --model ... --pairs ... --out DIR --report [--results DIR] [--images DIR]

Each split draws other pairs. ``tgdpo pipeline`` trains a guide with DPO and TGDPO with it, and the same with SimPO, and
evaluates guides and policies on the held-out pairs: the guides are the arms DPO and SimPO. Of the first split there are
token reports of both guides and answers to three questions, before and after. Start the same command again to continue
after an interruption, or with more splits. Weights are removed when their split is done (--keep-weights keeps them).
Writes real_pairs.json, real_pairs.txt and real_pairs.svg. Needs the extra ``reproduction``.
"""

import argparse
import json
import resource
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from megatron_tgdpo.errors import UserError
from megatron_tgdpo.storage.atomic_file import write_atomically
from tgdpo.child_processes import Commands
from tgdpo.command_line import positive, run
from tools.examples.real_pairs.study import Settings, Step, Study, default_overrides


def conduct(study: Study, splits: int, keep_weights: bool) -> None:
    """Runs what is missing; each command's seconds are added to seconds.json."""
    with Commands() as commands:
        for split in range(1, splits + 1):
            study.prepare(split)
            for step in study.trainings(split):
                _run(study, commands, step)
            if split > 1 and not keep_weights:
                study.remove_weights(split)
        for step in study.illustrations():
            _run(study, commands, step)
        if not keep_weights:
            study.remove_weights(1)


def _run(study: Study, commands: Commands, step: Step) -> None:
    if step.result.exists():
        return
    print(f"##### {step.name}", flush=True)
    start, before = time.monotonic(), _child_seconds()
    status = commands.run(step.command)
    file = study.root / "seconds.json"
    spent = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    earlier = spent.get(step.name, {"wall": 0.0, "cpu": 0.0})
    spent[step.name] = {
        "wall": round(earlier["wall"] + time.monotonic() - start, 1),
        "cpu": round(earlier["cpu"] + _child_seconds() - before, 1),
    }
    write_atomically(file, json.dumps(spent, indent=1) + "\n")
    if commands.asked and status:
        print("asked to stop; start the same command again to continue", file=sys.stderr)
    if status:
        sys.exit(status)


def _child_seconds() -> float:
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def report(study: Study, results: Path, images: Path) -> None:
    """Writes and prints the numbers of the splits that are done.

    Raises:
        UserError: None is.
    """
    from tools.examples.real_pairs.results import collect, draw, finished_splits, sample_report, text_report

    splits = finished_splits(study)
    if not splits:
        raise UserError(f"{study.root}: no split is done yet: leave --report out")
    found, samples = collect(study, splits), sample_report(study)
    text = f"{text_report(found)}\n\n{samples}"
    results.mkdir(parents=True, exist_ok=True)
    write_atomically(results / "real_pairs.json", json.dumps(found, indent=1) + "\n")
    write_atomically(results / "real_pairs.txt", text + "\n")
    draw(found, images / "real_pairs.svg")
    print(text)


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; see the module."""
    parser = argparse.ArgumentParser(
        prog="python -m tools.examples.real_pairs",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="of preference.yaml, for all runs")
    parser.add_argument("--model", required=True, help="HF directory, or a model of the Hub")
    parser.add_argument("--pairs", type=Path, required=True, help="JSON, JSONL, Parquet or Arrow file of pairs")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="new directory, or one to continue")
    parser.add_argument("--splits", type=positive, default=5, help="default %(default)s")
    parser.add_argument("--train", type=positive, default=240, help="pairs to train on (default %(default)s)")
    parser.add_argument("--held-out", type=positive, default=60, help="pairs to evaluate on (default %(default)s)")
    parser.add_argument("--nproc", type=positive, metavar="N", help="ranks; default: as many as GPUs, or 1")
    parser.add_argument("--keep-weights", action="store_true", help="of splits that are done, too")
    parser.add_argument("--report", action="store_true", help="run nothing: table and figure of what is there")
    parser.add_argument("--results", type=Path, metavar="DIR", help="for the numbers (default: --out)")
    parser.add_argument("--images", type=Path, metavar="DIR", help="for the figure (default: --out)")
    args = parser.parse_intermixed_args(arguments)

    def action() -> None:
        model = str(Path(args.model).resolve()) if Path(args.model).is_dir() else args.model
        pairs = str(args.pairs.resolve())
        settings = Settings(model, pairs, args.train, args.held_out, default_overrides(args.overrides))
        study = Study(args.out.resolve(), settings, args.nproc)
        study.open()
        if not args.report:
            conduct(study, args.splits, args.keep_weights)
        report(study, args.results or study.root, args.images or study.root)

    return run(action)


if __name__ == "__main__":
    raise SystemExit(main())
