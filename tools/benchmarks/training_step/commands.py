"""The sub-commands of ``tools.benchmarks.training_step``."""

import argparse
import json
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from megatron_tgdpo.errors import UserError
from megatron_tgdpo.models.hf_config import read_hf_config
from megatron_tgdpo.planning.memory import GIB
from megatron_tgdpo.storage.atomic_file import write_atomically
from tools.benchmarks.training_step import report
from tools.benchmarks.training_step.lengths import spread_pairs
from tools.benchmarks.training_step.measure import Job, check_losses, loss_differences, measure
from tools.benchmarks.training_step.planned import CASES
from tools.benchmarks.training_step.planned import compare as compare_with_plan
from tools.benchmarks.training_step.preference_pairs import find_source, tokenise
from tools.benchmarks.training_step.preprocessing import fast_tokenizer, preprocess_once, write_records
from tools.benchmarks.training_step.profiling import OperatorTime, ProfilingRecorder, group_seconds, step_operators
from tools.benchmarks.training_step.ranks import RankResult
from tools.benchmarks.training_step.roofline import variant_flops
from tools.benchmarks.training_step.settings import Settings, describe_model, fill_cache, make_problem, write_models
from tools.benchmarks.training_step.table import Spread, aligned
from tools.benchmarks.training_step.variants import CACHED, REFERENCE, choose_variants, usable_cores

_SHAPES_WIDTH = 60


def compare(given: argparse.Namespace, scratch: Path) -> None:
    """Runs all variants on the same problem."""
    settings = Settings.from_arguments(given)
    variants, left_out = choose_variants(given.variants)
    source = find_source(scratch, given.pairs, given.pairs_from, given.tokenizer)
    pairs = tokenise(scratch, source, given.max_length)
    problem = make_problem(scratch, scratch, pairs, settings)
    for line in left_out:
        _progress(line)
    parameters = write_models(scratch, settings, given.max_length)
    facts: dict[str, Any] = {
        "model": describe_model(settings, parameters),
        "pairs": pairs.describe(),
        "left_out": left_out,
    }
    if any(variant.name in CACHED for variant in variants):
        begun = time.perf_counter()
        fill_cache(problem)
        facts["cache_seconds"] = time.perf_counter() - begun
        _progress(f"guidance cache filled in {facts['cache_seconds']:.1f} s, start-up included")
    jobs = [Job(variant.name, variant.name, problem) for variant in variants]
    results = measure(jobs, given.rounds, _progress)
    differences = loss_differences(jobs, results)
    check_losses(jobs, differences)
    shape, lengths = read_hf_config(Path(problem.policy)), pairs.dataset.lengths
    flops = {
        one.name: variant_flops(
            shape, lengths, frozen=one.frozen, adapter="lora" in one.objective, shared_prompts=one.shared_prompts
        )
        for one in variants
    }
    table = report.metrics(problem, pairs.sequence_tokens(), flops, results)
    print(facts["model"], facts["pairs"], sep="\n")
    steps = f"{problem.steps - 1} steps of {problem.global_pairs} pairs"
    print(f"{given.rounds} rounds of {steps}; median (lowest-highest); ratios to {REFERENCE}, round by round\n")
    print(report.compare_table(table, differences))
    rates = [result.product_flops / 1e9 for rounds in results.values() for result in rounds]
    print(f"\nof products: model FLOP/s by those of matrix products alone, here {Spread.of(rates).text(0)} GFLOP/s")
    for line in report.yardstick_lines(results):
        print(f"\n{line}")
    if given.json:
        metrics = report.as_json(problem, jobs, results, table, differences, facts)
        write_atomically(given.json, json.dumps(metrics, indent=2) + "\n")


def profile(given: argparse.Namespace, scratch: Path) -> None:
    """Prints where the time of one step goes, and writes a Chrome trace of it."""
    settings = Settings.from_arguments(given)
    (variant,), _ = choose_variants([given.variant])
    source = find_source(scratch, given.global_pairs, given.pairs_from, given.tokenizer)
    pairs = tokenise(scratch, source, given.max_length)
    problem = make_problem(scratch, scratch, pairs, settings)
    parameters = write_models(scratch, settings, given.max_length)
    if variant.name in CACHED:
        fill_cache(problem)
    torch.set_num_threads(settings.threads)
    device = torch.device(settings.device)
    run, recorder = variant.load(), ProfilingRecorder(device)
    run(problem, recorder)
    recorder.profiler.export_chrome_trace(str(given.trace))
    operators = step_operators(recorder.profiler.events(), device)
    print(describe_model(settings, parameters), pairs.describe(), sep="\n")
    print(f"one step of {variant.name}, {problem.global_pairs} pairs\n")
    _print_profile(operators, given.top)
    print(f"\nChrome trace (for chrome://tracing or ui.perfetto.dev): {given.trace}")


def _print_profile(operators: list[OperatorTime], top: int) -> None:
    total = sum(operator.seconds for operator in operators)
    groups = [[group, f"{s:.3f}", f"{s / total:.1%}"] for group, s in group_seconds(operators).items()]
    print(aligned(["where", "s", "share"], [*groups, ["all", f"{total:.3f}", "100.0%"]]), end="\n\n")
    rows = [
        [op.group, op.name, op.shapes[:_SHAPES_WIDTH], str(op.calls), f"{op.seconds:.3f}", f"{op.seconds / total:.1%}"]
        for op in operators[:top]
    ]
    print(aligned(["where", "operator", "shapes", "calls", "s", "share"], rows, text_columns=3))


def lengths(given: argparse.Namespace, scratch: Path) -> None:
    """Compares steps over as many tokens, in sequences whose lengths spread twice as widely."""
    settings = Settings.from_arguments(given)
    variants, _ = choose_variants(given.variants)
    spreads = (given.spread, 2 * given.spread)
    problems = {}
    for spread in spreads:
        directory = scratch / f"spread-{spread:g}"
        directory.mkdir()
        pairs = spread_pairs(directory, given.pairs, given.mean, spread)
        problems[spread] = make_problem(directory, scratch, pairs, settings)
    parameters = write_models(scratch, settings, problems[spreads[-1]].max_length)
    if any(variant.name in CACHED for variant in variants):
        for problem in problems.values():
            fill_cache(problem)
    jobs = [
        Job(f"{variant.name}, spread {spread:g}", variant.name, problem)
        for spread, problem in problems.items()
        for variant in variants
    ]
    results = measure(jobs, given.rounds, _progress)
    check_losses(jobs, loss_differences(jobs, results))
    print(describe_model(settings, parameters))
    print(
        f"{given.pairs} pairs; lengths evenly from {given.mean} x (1 - spread) to {given.mean} x (1 + spread) tokens\n"
    )
    rows = []
    for variant in variants:
        narrow, wide = (
            [sum(result.seconds) for result in results[job.label]] for job in jobs if job.variant == variant.name
        )
        ratio = Spread.of([after / before for before, after in zip(narrow, wide, strict=True)])
        rows.append([variant.name, Spread.of(narrow).text(2), Spread.of(wide).text(2), ratio.text(3)])
    print(aligned(["variant", *(f"s at spread {spread:g}" for spread in spreads), "ratio"], rows))


def preprocess(given: argparse.Namespace, scratch: Path) -> None:
    """Measures preprocessing of a file and of a larger one: the difference is speed without start-up."""
    source = find_source(scratch, given.pairs, given.pairs_from, given.tokenizer)
    tokenizer = fast_tokenizer(source, scratch)
    rows, passes = [], []
    for copies in (given.copies, given.copies * given.factor):
        path = scratch / f"{copies}.jsonl"
        write_records(path, source.records, copies)
        done = preprocess_once(path, tokenizer, scratch / "out", given.workers)
        path.unlink()
        passes.append(done)
        rate = done.tokens / done.seconds / given.workers
        rows.append([f"{done.tokens:,}", f"{done.seconds:.2f}", f"{rate:,.0f}", f"{done.peak_bytes / GIB:.3f}"])
    few, many = passes
    print(f"{len(source.records)} {source.kind} pairs, repeated; fast tokenizer; {given.workers} workers\n")
    print(aligned(["tokens", "s", "tokens/s per core", "peak GiB"], rows, text_columns=0))
    rate = (many.tokens - few.tokens) / (many.seconds - few.seconds) / given.workers
    growth = (many.peak_bytes - few.peak_bytes) / 2**20
    print(
        f"\nwithout start-up {rate:,.0f} tokens/s per core; memory for {given.factor} times the file {growth:+.1f} MiB"
    )


def _progress(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def planned(given: argparse.Namespace, scratch: Path) -> None:
    """Compares the planner's step time with the real one, on several layouts of this machine's CPU."""
    names = given.layouts or list(CASES)
    if unknown := [name for name in names if name not in CASES]:
        raise UserError(f"--layouts {', '.join(unknown)}: there are {', '.join(CASES)}")
    settings = replace(Settings.from_arguments(given), threads=1)
    if settings.device != "cpu":
        raise UserError("planned describes a CPU to the planner: set --device cpu")
    pairs = spread_pairs(scratch, given.pairs, given.mean, 0.0)
    problem = make_problem(scratch, scratch, pairs, settings)
    parameters = write_models(scratch, settings, problem.max_length)
    if any(CASES[name].mode == "cached" for name in names):
        fill_cache(problem)
    # A prompt and its two responses, so that packs are full, as the planner takes them to be.
    pack_tokens, rows = given.pack_pairs * 3 * given.mean, []
    rates: list[RankResult] = []
    for name in names:
        found = compare_with_plan(problem, name, pack_tokens, usable_cores())
        rates += found.results
        time = found.time
        rows.append(
            [
                name,
                *(f"{seconds:.2f}" for seconds in (found.predicted, found.measured)),
                f"{found.predicted / found.measured - 1:+.0%}",
                *(f"{seconds:.2f}" for seconds in (found.predicted_cpu, found.measured_cpu)),
                f"{found.predicted_cpu / found.measured_cpu - 1:+.0%}",
                *(f"{part / time.total:.0%}" for part in (time.compute, time.memory + time.optimizer, time.bubble)),
            ]
        )
        _progress(" ".join(rows[-1]))
    print(describe_model(settings, parameters))
    print(f"{given.global_pairs} pairs a step of 3 x {given.mean} tokens, {given.pack_pairs} a pack", end="; ")
    print(f"{usable_cores()} cores\n")
    cpu = ["CPU s: planned", "busiest rank", "error"]
    print(aligned(["layout", "s: planned", "measured", "error", *cpu, "products", "memory", "bubble"], rows))
    print("\na rank's")
    for what, name in (
        ("large products, GFLOP/s", "peak_flops"), ("a layer's products, GFLOP/s", "product_flops"),
        ("memory, GB/s", "memory_bytes"), ("links, GB/s", "link_bytes"),
    ):  # fmt: skip
        # One rank alone has no links.
        if there := [getattr(each, name) / 1e9 for each in rates if getattr(each, name)]:
            print(f"  {what}: {Spread.of(there).text(1)}")
