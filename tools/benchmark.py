"""Speed and memory of a training step beside what else one could run; where a step's time goes.

    python -m tools.benchmark compare    --size 20m --vocabulary 128256 --json figures.json
    python -m tools.benchmark profile    --size 20m --vocabulary 128256 --side colocated --trace trace.json
    python -m tools.benchmark lengths    --size 20m --vocabulary 32000
    python -m tools.benchmark preprocess

``compare`` runs every side (``--sides``) on the same random-weight Llama and the same pairs, each in a process of its
own, in turns, and fails unless all of them compute the same losses. ``profile`` prints the time of one step by groups
of operators. ``lengths`` compares steps over as many tokens in sequences of more and of less equal length.
``preprocess`` measures tools.preprocess_preferences. docs/performance.md says what is measured and how.
"""

import argparse
import json
import logging
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path

from megatron_tgdpo.errors import UserError
from megatron_tgdpo.memory import GIB
from megatron_tgdpo.run_directory import write_atomically
from tools.benchmarking import report
from tools.benchmarking.lengths import spread_pairs
from tools.benchmarking.measure import Job, check_losses, loss_differences, measure
from tools.benchmarking.models import SHAPES
from tools.benchmarking.pairs import SHARED_DATA, find_source, tokenise
from tools.benchmarking.preprocessing import fast_tokenizer, preprocess_once, write_records
from tools.benchmarking.settings import (
    Settings,
    describe_model,
    fill_cache,
    make_problem,
    usable_cores,
    write_models,
)
from tools.benchmarking.sides import CACHED, REFERENCE, SIDES, choose_sides
from tools.benchmarking.table import Spread, aligned


def compare(given: argparse.Namespace, scratch: Path) -> None:
    """All sides on the same problem."""
    settings = Settings.from_arguments(given)
    sides, left_out = choose_sides(given.sides)
    pairs = tokenise(scratch, find_source(scratch, given.pairs, given.pairs_from), given.max_length)
    problem = make_problem(scratch, scratch, pairs, settings)
    _progress("\n".join(left_out))
    parameters = write_models(scratch, settings, given.max_length)
    facts = {"model": describe_model(settings, parameters), "pairs": pairs.describe()}
    if any(side.name in CACHED for side in sides):
        begun = time.perf_counter()
        fill_cache(problem)
        facts["cache_seconds"] = f"{time.perf_counter() - begun:.1f}"
    jobs = [Job(side.name, side.name, problem) for side in sides]
    results = measure(jobs, given.rounds, _progress)
    differences = loss_differences(jobs, results)
    check_losses(differences, settings.dtype)
    table = report.figures(problem, pairs.sequence_tokens(), results)
    print(facts["model"], facts["pairs"], sep="\n")
    print(
        f"{given.rounds} rounds of {problem.steps - 1} steps of {problem.global_pairs} pairs; median (lowest-highest)"
    )
    print(report.compare_table(table, differences))
    print("\n".join(report.yardstick_lines(results)))
    if given.json:
        figures = report.as_json(problem, jobs, results, table, differences, facts)
        write_atomically(given.json, json.dumps(figures, indent=2) + "\n")


def profile(given: argparse.Namespace, scratch: Path) -> None:
    """One step of a side, in this process."""
    # Only here: it needs torch's profiler and, through the side, all that a run needs.
    import torch

    from tools.benchmarking.profiling import ProfilingRecorder, group_seconds, step_operators

    settings = Settings.from_arguments(given)
    (side,), _ = choose_sides([given.side])
    pairs = tokenise(scratch, find_source(scratch, given.global_pairs, given.pairs_from), given.max_length)
    problem = make_problem(scratch, scratch, pairs, settings)
    parameters = write_models(scratch, settings, given.max_length)
    if side.name in CACHED:
        fill_cache(problem)
    torch.set_num_threads(settings.threads)
    run = side.load()
    recorder = ProfilingRecorder(torch.device(settings.device))
    run(problem, recorder)
    recorder.profiler.export_chrome_trace(str(given.trace))
    operators = step_operators(recorder.profiler.events(), torch.device(settings.device))
    total = sum(operator.seconds for operator in operators)
    print(describe_model(settings, parameters), pairs.describe(), sep="\n")
    print(f"one step of {side.name}, {problem.global_pairs} pairs: {total:.2f} s\n")
    groups = [[group, f"{s:.3f}", f"{s / total:.1%}"] for group, s in group_seconds(operators).items()]
    print(aligned(["where", "s", "share"], [*groups, ["all", f"{total:.3f}", f"{1:.1%}"]]), end="\n\n")
    top = [
        [op.group, op.name, op.shapes[:60], str(op.calls), f"{op.seconds:.3f}", f"{op.seconds / total:.1%}"]
        for op in operators[: given.top]
    ]
    print(aligned(["where", "operator", "shapes", "calls", "s", "share"], top, text_columns=3))
    print(f"\nChrome trace (chrome://tracing, ui.perfetto.dev): {given.trace}")


def lengths(given: argparse.Namespace, scratch: Path) -> None:
    """Steps over as many tokens, in sequences whose lengths spread twice as widely."""
    settings = Settings.from_arguments(given)
    sides, _ = choose_sides(given.sides)
    jobs = []
    for factor in (1, 2):
        directory = scratch / f"spread-{factor}"
        directory.mkdir()
        pairs = spread_pairs(directory, given.pairs, given.mean, factor * given.spread)
        problem = make_problem(directory, scratch, pairs, settings)
        if factor == 1:
            # Twice the mean and the spread is the longest sequence of the wider problem.
            parameters = write_models(scratch, settings, 4 * given.mean)
        if any(side.name in CACHED for side in sides):
            fill_cache(problem)
        jobs += [Job(f"{side.name}, spread {factor * given.spread:g}", side.name, problem) for side in sides]
    results = measure(jobs, given.rounds, _progress)
    check_losses(loss_differences(jobs, results), settings.dtype)
    print(describe_model(settings, parameters))
    print(
        f"{given.pairs} pairs, prompts and responses of {given.mean} tokens on average, evenly from mean x (1 - spread)"
    )
    rows = []
    for side in sides:
        labels = [job.label for job in jobs if job.side == side.name]
        seconds = [[sum(result.seconds) for result in results[label]] for label in labels]
        ratio = Spread.of([wide / narrow for narrow, wide in zip(*seconds, strict=True)])
        rows.append([side.name, *(Spread.of(times).text(2) for times in seconds), ratio.text(3)])
    spreads = [f"s at spread {factor * given.spread:g}" for factor in (1, 2)]
    print(aligned(["side", *spreads, "ratio"], rows))


def preprocess(given: argparse.Namespace, scratch: Path) -> None:
    """Two files, one several times the other: their difference is speed without start-up, and memory that grows."""
    source = find_source(scratch, given.pairs, given.pairs_from)
    tokenizer = fast_tokenizer(source, scratch)
    rows, passes = [], []
    for copies in (given.copies, given.copies * given.factor):
        path = scratch / f"{copies}.jsonl"
        write_records(path, source.records, copies)
        passes.append(preprocess_once(path, tokenizer, scratch / "out", given.workers))
        path.unlink()
        last = passes[-1]
        rate = last.tokens / last.seconds / given.workers
        rows.append([f"{last.tokens:,}", f"{last.seconds:.1f}", f"{rate:,.0f}", f"{last.peak_bytes / GIB:.3f}"])
    few, many = passes
    print(f"{len(source.records)} {source.kind} pairs, repeated; fast tokenizer; {given.workers} workers")
    print(aligned(["tokens", "s", "tokens/s per core", "peak GiB"], rows, text_columns=0))
    rate = (many.tokens - few.tokens) / (many.seconds - few.seconds) / given.workers
    growth = (many.peak_bytes - few.peak_bytes) / 2**20
    print(f"without start-up: {rate:,.0f} tokens/s per core; {given.factor} times the file: {growth:+.1f} MiB")


def _progress(line: str) -> None:
    if line:
        print(line, file=sys.stderr, flush=True)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m tools.benchmark", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def command(action: Callable[[argparse.Namespace, Path], None]) -> argparse.ArgumentParser:
        added = commands.add_parser(action.__name__, help=(action.__doc__ or "").splitlines()[0])
        added.set_defaults(action=action)
        added.add_argument("--directory", type=Path, help="for scratch files (default: the system's for temporaries)")
        return added

    for action in (compare, profile, lengths):
        added = command(action)
        added.add_argument("--size", choices=SHAPES, default="20m")
        added.add_argument("--vocabulary", type=int, default=128256)
        added.add_argument("--tied", action="store_true", help="the output weight is the embedding")
        added.add_argument("--global-pairs", type=int, default=16, help="pairs of a step (default: %(default)s)")
        added.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
        added.add_argument("--dtype", choices=("fp32", "bf16"), help="default: bf16 on cuda, fp32 on cpu")
        added.add_argument("--threads", type=int, default=usable_cores(), help="of a process (default: %(default)s)")
        if action is profile:
            added.add_argument("--side", choices=SIDES, default="colocated")
            added.add_argument("--trace", type=Path, default=Path("trace.json"), help="default: %(default)s")
            added.add_argument("--top", type=int, default=25, help="operators to list (default: %(default)s)")
        else:
            added.add_argument("--pairs", type=int, default=64, help="default: %(default)s")
            added.add_argument("--rounds", type=int, default=3, help="of all sides (default: %(default)s)")
            sides = None if action is compare else ["colocated", REFERENCE]
            added.add_argument("--sides", nargs="+", default=sides, metavar="SIDE", help=f"of {', '.join(SIDES)}")
        if action is lengths:
            added.add_argument("--mean", type=int, default=256, help="tokens of a prompt and of a response")
            added.add_argument("--spread", type=float, default=0.25, help="of the lengths, relative; then twice that")
        else:
            added.add_argument(
                "--max-length", type=int, default=1024, help="tokens of a sequence (default: %(default)s)"
            )
            added.add_argument("--pairs-from", type=Path, default=SHARED_DATA, help="directory of the real pairs")
        if action is compare:
            added.add_argument("--json", type=Path, metavar="FILE", help="write all figures")
    added = command(preprocess)
    added.add_argument("--pairs", type=int, default=300, help="that the files repeat (default: %(default)s)")
    added.add_argument("--pairs-from", type=Path, default=SHARED_DATA, help="directory of the real pairs")
    added.add_argument("--copies", type=int, default=2, help="of the pairs in the smaller file (default: %(default)s)")
    added.add_argument("--factor", type=int, default=8, help="larger file over smaller (default: %(default)s)")
    added.add_argument("--workers", type=int, default=1, help="default: %(default)s")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; returns the exit status."""
    given = _parser().parse_args(arguments)
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    try:
        if given.directory:
            given.directory.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix="benchmark-", dir=given.directory) as scratch:
            given.action(given, Path(scratch))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
