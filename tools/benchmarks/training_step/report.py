"""What ``compare`` prints and writes: metrics of all variants, their ratios to the reference, where they were taken."""

import os
import platform
import shlex
import sys
from dataclasses import asdict
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from megatron_tgdpo.planning.memory import GIB
from tools.benchmarks.training_step.measure import Job
from tools.benchmarks.training_step.problem import Problem
from tools.benchmarks.training_step.recorder import VariantResult
from tools.benchmarks.training_step.table import Spread, aligned
from tools.benchmarks.training_step.variants import POLICY_ONLY, REFERENCE, VARIANTS

_PACKAGES = ("torch", "megatron-core", "transformers", "trl")


def machine() -> dict[str, Any]:
    """What the metrics depend on besides the code."""
    cpu = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        names = [
            line.split(":", 1)[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")
        ]
        cpu = names[0] if names else cpu
    versions: dict[str, str | None] = {}
    for package in _PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = None
    return {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "command": shlex.join(["python", "-m", "tools.benchmarks.training_step", *sys.argv[1:]]),
        "cpu": cpu,
        "cores": os.cpu_count(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "versions": versions,
    }


def metrics(
    problem: Problem, sequence_tokens: int, flops: dict[str, int], results: dict[str, list[VariantResult]]
) -> dict[str, dict[str, Spread]]:
    """Every variant's metrics over the rounds.

    Args:
        problem: What was compared.
        sequence_tokens: Of all pairs' sequences, prompt plus response, without padding.
        flops: By variant, model FLOP of the timed steps.
        results: By variant, a result a round.
    """
    table = {}
    for variant, rounds in results.items():
        rates = [problem.pairs / sum(result.seconds) for result in rounds]
        columns: dict[str, list[float]] = {
            "pairs_per_second": rates,
            "tokens_per_second": [rate * sequence_tokens / problem.pairs for rate in rates],
            "product_share": [flops[variant] / sum(one.seconds) / one.product_flops for one in rounds],
            "peak_gib": [result.peak_bytes / GIB for result in rounds],
            "added_gib": [result.added_bytes / GIB for result in rounds],
        }
        baseline = results.get(REFERENCE)
        if baseline is not None:
            both = list(zip(rounds, baseline, strict=True))
            # Round by round: what slowed one variant in a round most likely slowed the other.
            columns["speed_ratio"] = [sum(theirs.seconds) / sum(ours.seconds) for ours, theirs in both]
            columns["peak_ratio"] = [ours.peak_bytes / theirs.peak_bytes for ours, theirs in both]
            columns["added_ratio"] = [ours.added_bytes / theirs.added_bytes for ours, theirs in both]
        table[variant] = {name: Spread.of(values) for name, values in columns.items()}
    return table


def step_ratio(results: dict[str, list[VariantResult]], variant: str, yardstick: str) -> Spread | None:
    """Time of a variant's steps over another's, round by round; None where one of them did not run."""
    if variant not in results or yardstick not in results:
        return None
    both = zip(results[variant], results[yardstick], strict=True)
    return Spread.of([sum(ours.seconds) / sum(theirs.seconds) for ours, theirs in both])


_COLUMNS = {
    "pairs_per_second": ("pairs/s", 3),
    "tokens_per_second": ("tokens/s", 0),
    "product_share": ("of products", 2),
    "peak_gib": ("peak GiB", 2),
    "added_gib": ("added GiB", 2),
    "speed_ratio": ("speed ratio", 2),
    "peak_ratio": ("peak ratio", 2),
    "added_ratio": ("added ratio", 2),
}


def compare_table(table: dict[str, dict[str, Spread]], differences: dict[str, float]) -> str:
    """Median (lowest-highest) of every figure of every variant, and the largest relative difference of its losses."""
    names = [name for name in _COLUMNS if all(name in row for row in table.values())]
    header = ["variant", "models", *(_COLUMNS[name][0] for name in names), "loss difference"]
    rows = [
        [
            variant,
            VARIANTS[variant].models,
            *(row[name].text(_COLUMNS[name][1]) for name in names),
            f"{differences[variant]:.1e}",
        ]
        for variant, row in table.items()
    ]
    return aligned(header, rows, text_columns=2)


def yardstick_lines(results: dict[str, list[VariantResult]]) -> list[str]:
    """Cached guidance beside training that has no frozen models at all."""
    ratio = step_ratio(results, "cached", POLICY_ONLY)
    return [] if ratio is None else [f"step of cached over policy-only DPO ({POLICY_ONLY}): {ratio.text(3)}"]


def as_json(
    problem: Problem, jobs: list[Job], results: dict[str, list[VariantResult]], table: dict[str, dict[str, Spread]],
    differences: dict[str, float], facts: dict[str, Any],
) -> dict[str, Any]:  # fmt: skip
    """Everything that was measured, for ``--json``."""
    return {
        **machine(),
        **facts,
        "problem": asdict(problem),
        "variants": {
            job.label: {
                "models": VARIANTS[job.variant].models,
                "metrics": {name: asdict(spread) for name, spread in table[job.label].items()},
                "loss_difference": differences[job.label],
                "rounds": [asdict(result) for result in results[job.label]],
            }
            for job in jobs
        },
    }
