"""Runs variants in processes of their own, in turns, and checks that they computed the same losses."""

import json
import math
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_tgdpo.errors import UserError
from tgdpo.child_processes import run_captured
from tools.benchmarks.training_step.problem import Problem
from tools.benchmarks.training_step.recorder import VariantResult
from tools.benchmarks.training_step.variants import VARIANTS

ROOT = Path(__file__).resolve().parents[3]
_ERROR_LINES = 20


@dataclass(frozen=True)
class Job:
    """A variant's name and the problem that it solves; ``label`` names both together."""

    label: str
    variant: str
    problem: Problem

    @property
    def group(self) -> tuple[str, str]:
        """Jobs of the same group must compute the same losses."""
        return self.problem.data, VARIANTS[self.variant].objective


def run_tool(module: str, arguments: Sequence[str], problem: Problem) -> str:
    """Runs ``python -m module`` with the problem's threads; returns its standard output.

    Raises:
        UserError: It refused its input.
        RuntimeError: It failed in another way; the message ends with what it printed last.
    """
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": str(problem.threads),
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "PYTHONPATH": os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH")))),
    }
    if problem.device == "cpu":
        environment["CUDA_VISIBLE_DEVICES"] = ""
    done = run_captured([sys.executable, "-m", module, *arguments], env=environment)
    if done.returncode == 0:
        return done.stdout
    last = done.stderr.strip().splitlines()[-_ERROR_LINES:]
    if done.returncode == 1 and last and last[-1].startswith("error: "):
        raise UserError(f"{module}: {last[-1].removeprefix('error: ')}")
    raise RuntimeError("\n".join([f"{module} {' '.join(arguments)} ended with status {done.returncode}:", *last]))


def run_job(job: Job) -> VariantResult:
    """One variant in a fresh process."""
    directory = Path(job.problem.directory)
    path, out = directory / "problem.json", directory / "result.json"
    job.problem.write(path)
    out.unlink(missing_ok=True)
    run_tool("tools.benchmarks.training_step.worker", [str(path), job.variant, str(out)], job.problem)
    return VariantResult(**json.loads(out.read_text(encoding="utf-8")))


def measure(jobs: Sequence[Job], rounds: int, progress: Callable[[str], None]) -> dict[str, list[VariantResult]]:
    """Runs all jobs one after another, ``rounds`` times over, so that a slow spell of the machine meets all of them.

    Returns:
        By label, a result a round.
    """
    results: dict[str, list[VariantResult]] = {job.label: [] for job in jobs}
    for number in range(1, rounds + 1):
        for job in jobs:
            result = run_job(job)
            results[job.label].append(result)
            progress(f"round {number}/{rounds} {job.label}: {sum(result.seconds):.2f} s")
    return results


def loss_differences(jobs: Sequence[Job], results: dict[str, list[VariantResult]]) -> dict[str, float]:
    """Each job's largest relative difference from the first job of its group, over all steps and rounds."""
    first: dict[tuple[str, str], list[float]] = {}
    differences = {}
    for job in jobs:
        wanted = first.setdefault(job.group, results[job.label][0].losses)
        pairs = [pair for result in results[job.label] for pair in zip(result.losses, wanted, strict=True)]
        finite = all(math.isfinite(loss) for pair in pairs for loss in pair)
        differences[job.label] = max(abs(a - b) / abs(b) for a, b in pairs) if finite else math.inf
    return differences


def check_losses(jobs: Sequence[Job], differences: dict[str, float]) -> None:
    """Fails the benchmark where variants did not compute the same; in bf16 they differ by their rounding.

    Raises:
        UserError: A job's losses differ by more than its variant's tolerance in fp32.
    """
    for job in jobs:
        difference, limit = differences[job.label], VARIANTS[job.variant].loss_tolerance
        if job.problem.dtype == "fp32" and difference > limit:
            raise UserError(
                f"{job.label}: its losses differ by {difference:.2g} (relative) from those of the other variants, "
                f"{limit:g} is allowed: they do not compute the same, so their times mean nothing"
            )
