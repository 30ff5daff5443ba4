"""The planner's step time beside the real one, on a CPU that is described to it by its measured rates.

A rank has one thread. Rates of products and memory are taken with the CPU's clock, so that they hold on a busy machine,
and those of links with the wall's. Ranks that share cores are predicted as if each had its own, or, if that is more, as
long as all their work takes on the cores that there are: what one waits for, another uses.
"""

import json
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from megatron_tgdpo.models.hf_config import read_hf_config
from megatron_tgdpo.planning.cluster import Cluster
from megatron_tgdpo.planning.layouts import job_of
from megatron_tgdpo.planning.pipeline_layers import fit_layout
from megatron_tgdpo.planning.step_time import StepTime, step_time
from megatron_tgdpo.setup.layout import layout_of
from tools.benchmarks.training_step.measure import run_tool
from tools.benchmarks.training_step.our_step import our_config
from tools.benchmarks.training_step.problem import Problem
from tools.benchmarks.training_step.ranks import RankResult


@dataclass(frozen=True)
class Case:
    """A layout to be predicted and measured.

    Attributes:
        ranks: Processes.
        parallel: Values of the section ``parallel``.
        mode: ``guidance.mode``.
        train: Values of the section ``train``.
    """

    ranks: int
    parallel: dict[str, Any]
    mode: str = "colocated"
    train: dict[str, Any] | None = None


CASES = {
    "one rank": Case(1, {}),
    "one rank, cached": Case(1, {}, "cached"),
    "one rank, recompute full": Case(1, {}, train={"recompute": "full"}),
    "DP2": Case(2, {}),
    "TP2": Case(2, {"tensor": 2}),
    "TP2, cached": Case(2, {"tensor": 2}, "cached"),
    "PP2": Case(2, {"pipeline": 2}),
    "CP2": Case(2, {"context": 2}),
    "TP2 + SP, DP2": Case(4, {"tensor": 2, "sequence_parallel": True}),
    "PP2, DP2": Case(4, {"pipeline": 2}),
    "PP4": Case(4, {"pipeline": 4}),
}


@dataclass(frozen=True)
class Compared:
    """A case, predicted and measured.

    Attributes:
        time: Predicted, if each rank has a core.
        predicted: Seconds of a step, on the cores that there are.
        measured: The same.
        predicted_cpu: Seconds for which the busiest rank computes.
        measured_cpu: The same.
        results: Of the ranks.
    """

    time: StepTime
    predicted: float
    measured: float
    predicted_cpu: float
    measured_cpu: float
    results: Sequence[RankResult]


def compare(problem: Problem, name: str, pack_tokens: int, cores: int) -> Compared:
    """Runs a case of :data:`CASES` under torchrun, and predicts it from the rates that its ranks measured."""
    case, directory = CASES[name], Path(problem.directory)
    values = {
        "guided": True, "mode": case.mode, "parallel": case.parallel, "train": case.train, "pack_tokens": pack_tokens,
    }  # fmt: skip
    out = directory / f"ranks-{name.replace(' ', '-')}"
    out.mkdir()
    problem.write(directory / "problem.json")
    (directory / "case.json").write_text(json.dumps(values), encoding="utf-8")
    arguments = [str(directory / "problem.json"), str(directory / "case.json"), str(out)]
    launch = ["--standalone", "--nproc-per-node", str(case.ranks), "-m", "tools.benchmarks.training_step.ranks"]
    run_tool("torch.distributed.run", [*launch, *arguments], problem)
    files = [out / f"{rank}.json" for rank in range(case.ranks)]
    results = [RankResult(**json.loads(file.read_text(encoding="utf-8"))) for file in files]
    return predict(problem, name, pack_tokens, cores, results)


def described(results: Sequence[RankResult], link: float) -> Cluster:
    """The machine as the planner takes it: a node, with a "GPU" for each rank."""
    peak = statistics.median(each.peak_flops for each in results)
    return Cluster(
        nodes=1,
        gpus_per_node=len(results),
        peak_tflops=peak / 1e12,
        efficiency=statistics.median(each.product_flops for each in results) / peak,
        nvlink_gbytes=link / 1e9 or 1.0,
        link_efficiency=1.0,
        memory_gbytes=statistics.median(each.memory_bytes for each in results) / 1e9,
    )


def predict(problem: Problem, name: str, pack_tokens: int, cores: int, results: Sequence[RankResult]) -> Compared:
    """From what the ranks measured."""
    case, shape = CASES[name], read_hf_config(Path(problem.policy))
    config = our_config(
        problem, guided=True, mode=case.mode, parallel=case.parallel, train=case.train, pack_tokens=pack_tokens
    )
    job = job_of(config, [shape] * (3 if case.mode == "colocated" else 1))
    # Of two sequences, each of the most tokens there are.
    job = replace(job, batch=replace(job.batch, pair_tokens=2 * problem.max_length))
    layout = fit_layout(job, layout_of(config.parallel, case.ranks), config.train.recomputation)
    walls, cpus = (
        step_time(job, described(results, statistics.median(links)), layout, config.train.recomputation)
        for links in ([each.link_bytes for each in results], [each.link_cpu_bytes for each in results])
    )
    busy = cpus.total - cpus.bubble
    return Compared(
        time=walls,
        predicted=max(walls.total, busy * case.ranks / cores),
        measured=statistics.median(max(step) for step in zip(*(each.seconds for each in results), strict=True)),
        predicted_cpu=busy,
        measured_cpu=statistics.median(max(step) for step in zip(*(each.cpu_seconds for each in results), strict=True)),
        results=results,
    )
