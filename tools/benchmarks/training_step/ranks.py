"""One rank of steps on a parallel layout, under torchrun; its arguments are PROBLEM.json CASE.json OUT.

Writes ``OUT/RANK.json``: seconds of wall clock and of this process's CPU of each step, and what the machine does, with
all ranks at work at once.
"""

import json
import logging
import sys
import time
import warnings
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from transformers.utils import logging as transformers_logging

from megatron_tgdpo.distributed.ranks import read_rank_environment
from megatron_tgdpo.models.hf_config import read_hf_config
from tools.benchmarks.training_step.our_step import OurStep, our_config
from tools.benchmarks.training_step.problem import Problem
from tools.benchmarks.training_step.roofline import memory_rate, product_rate

_MESSAGE_BYTES = 16 << 20
_MESSAGES = 5


@dataclass(frozen=True)
class RankResult:
    """What a rank measured.

    Attributes:
        seconds: Of each timed step, by the wall.
        cpu_seconds: The same, of this process.
        losses: Of all steps.
        peak_flops: FLOP/s of large products, by this process's CPU time.
        product_flops: Of the products of a layer's MLP, by the same.
        memory_bytes: Bytes/s of memory, by the same.
        link_bytes: Bytes/s that a rank sends in an all-reduce over all ranks, by the wall; 0 of one rank.
        link_cpu_bytes: The same, by CPU time.
    """

    seconds: list[float]
    cpu_seconds: list[float]
    losses: list[float]
    peak_flops: float
    product_flops: float
    memory_bytes: float
    link_bytes: float
    link_cpu_bytes: float


def _links(ranks: int) -> tuple[float, float]:
    """Bytes/s of an all-reduce as a ring, by the wall and by CPU time: the fastest of some."""
    if ranks == 1:
        return 0.0, 0.0
    message = torch.ones(_MESSAGE_BYTES // 4)
    sent = 2 * (ranks - 1) / ranks * message.nbytes
    found = []
    for _ in range(_MESSAGES):
        dist.barrier()
        begun = time.perf_counter(), time.process_time()
        dist.all_reduce(message)
        found.append((time.perf_counter() - begun[0], time.process_time() - begun[1]))
    return sent / min(wall for wall, _ in found), sent / min(cpu for _, cpu in found)


def measure(problem: Problem, case: dict[str, Any]) -> RankResult:
    """All steps of a case, and the machine's rates."""
    ranks = read_rank_environment()
    step = OurStep(our_config(problem, **case), ranks)
    seconds, cpu_seconds, losses = [], [], []
    for number in range(1, problem.steps + 1):
        dist.barrier()
        begun = time.perf_counter(), time.process_time()
        losses.append(step.step(number).metrics.values["loss"])
        seconds.append(time.perf_counter() - begun[0])
        cpu_seconds.append(time.process_time() - begun[1])
    cpu, shape = torch.device("cpu"), read_hf_config(Path(problem.policy))
    tokens = step.engine.pack_format.tokens // step.layout.context
    product = tokens, shape.hidden_size, 2 * shape.intermediate_size // step.layout.tensor
    dist.barrier()
    peak = product_rate(cpu, torch.float32, clock=time.process_time)
    rate = product_rate(cpu, torch.float32, product, time.process_time)
    memory = memory_rate(cpu, time.process_time)
    return RankResult(seconds[1:], cpu_seconds[1:], losses, peak, rate, memory, *_links(ranks.world_size))


def main(problem: str, case: str, out: str) -> None:
    """Writes the result."""
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    transformers_logging.disable_progress_bar()
    torch.set_num_threads(1)
    found = measure(Problem.read(Path(problem)), json.loads(Path(case).read_text(encoding="utf-8")))
    path = Path(out) / f"{read_rank_environment().rank}.json"
    path.write_text(json.dumps(asdict(found)), encoding="utf-8")
    dist.barrier()


if __name__ == "__main__":
    main(*sys.argv[1:])
