"""The bubbles of the real pipeline schedules, beside the simulator's.

    python -m tools.benchmarks.pipeline [--stages 2 4] [--micro-batches 8] [--unit-ms 40]

megatron-core's schedules run with this project's communicator, prefetcher and gloo, in a process per stage; only the
models are stand-ins, whose passes sleep (policy forward 1 unit, backward 2, frozen forward 2 with a guide, 1 without).
So the order of passes and exchanges is measured, not how many of them a machine can compute at once. Steps are timed
between barriers, the slowest stage counts; of the repetitions the median is printed. ``real / simulated`` above 1 is
what the exchanges cost, and a busy machine.
"""

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import tee
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing
from megatron.core.enums import ModelType
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megatron_tgdpo.batching.collate import PreferenceBatch, collate
from megatron_tgdpo.batching.packed_sequence import PackFormat
from megatron_tgdpo.distributed.cpu_backend import enable_cpu_backend
from megatron_tgdpo.distributed.layout import init_model_parallel, make_layout
from megatron_tgdpo.frozen.communicator import ColocatedCommunicator, P2PBuffer
from megatron_tgdpo.frozen.models import FrozenModels
from megatron_tgdpo.frozen.prefetch import Prefetcher
from megatron_tgdpo.frozen.prefetch_communicator import FrozenChannel
from megatron_tgdpo.planning.pipeline_schedule import StageCosts, Timeline, interleaved, one_f_one_b, uniform
from megatron_tgdpo.planning.prefetch import plan_prefetch

_TOKENS, _HIDDEN = 16, 8
_CPU = torch.device("cpu")
_CHUNKS = 2
_SCHEDULES = ("policy alone", f"policy in {_CHUNKS} chunks", "co-located", "prefetch")


@dataclass(frozen=True)
class Case:
    """A schedule, its size and how often it is repeated; ``unit`` is in seconds, costs are in units."""

    schedule: str
    stages: int
    micro_batches: int
    frozen: float
    unit: float
    repetitions: int

    @property
    def costs(self) -> list[StageCosts]:
        return uniform(self.stages, 1.0, 2.0, self.frozen)

    def simulated(self) -> Timeline:
        """The step as the simulator sees it, in units."""
        if self.schedule == "prefetch":
            return plan_prefetch(tuple(self.costs), self.micro_batches, self.micro_batches).timeline
        if "chunks" in self.schedule:
            return interleaved(self.costs, self.micro_batches, _CHUNKS)
        return one_f_one_b(self.costs, self.micro_batches, colocated=self.schedule == "co-located")

    @property
    def ideal(self) -> float:
        """A step without bubbles, in units."""
        return self.micro_batches * (3.0 + (self.frozen if self.schedule in ("co-located", "prefetch") else 0.0))


class _Sleep(torch.autograd.Function):
    """Passes hidden states on, taking its time in both directions."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, forward: float, backward: float) -> Tensor:
        del weight
        ctx.backward_seconds = backward
        time.sleep(forward)
        return hidden.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, None, None]:
        time.sleep(ctx.backward_seconds)
        return gradients[0], torch.zeros(1), None, None


class StandInStage(MegatronModule):
    """A chunk of the policy, with the frozen models where they run along."""

    def __init__(
        self, config: TransformerConfig, case: Case, p2p_buffer: P2PBuffer, *, first: bool, last: bool
    ) -> None:
        super().__init__(config)
        parts = config.virtual_pipeline_model_parallel_size or 1
        frozen = case.frozen if p2p_buffer.width else 0.0
        self.seconds = ((1.0 / parts + frozen) * case.unit, 2.0 / parts * case.unit)
        self.p2p_buffer, self.first, self.last = p2p_buffer, first, last
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.input: Tensor | None = None
        self.model_type = ModelType.encoder_or_decoder

    def set_input_tensor(self, input_tensor: list[Tensor | None]) -> None:
        (self.input,) = input_tensor

    def forward(self, batch: PreferenceBatch) -> Tensor:
        del batch
        if self.p2p_buffer.width and not self.first:
            self.p2p_buffer.take_incoming()
        hidden = torch.zeros(_TOKENS, 1, _HIDDEN) if self.first else self.input
        output = _Sleep.apply(hidden, self.weight, *self.seconds)
        if self.p2p_buffer.width and not self.last:
            self.p2p_buffer.outgoing = torch.zeros(_TOKENS, 1, self.p2p_buffer.width)
        result: Tensor = output
        return result


class StandInFrozenModels(FrozenModels):
    """The frozen models of a stage, where they run apart."""

    def __init__(self, seconds: float, *, last: bool) -> None:
        super().__init__([])
        self.seconds, self.last = seconds, last

    def forward(self, batch: PreferenceBatch, incoming: Tensor | None) -> tuple[Tensor, ...]:
        del batch, incoming
        time.sleep(self.seconds)
        return (torch.zeros(0), torch.zeros(0)) if self.last else (torch.zeros(_TOKENS, 1, _HIDDEN),)


def _forward_step(batches: Iterator[PreferenceBatch], model: torch.nn.Module) -> tuple[Any, Any]:
    return model(next(batches)), lambda output: (output.sum(), torch.tensor(1, dtype=torch.int), {})


class Bench:
    """The parts of one case on this stage."""

    def __init__(self, case: Case, pg: ProcessGroupCollection) -> None:
        stage, last = pg.pp.rank(), pg.pp.size() - 1
        chunks = _CHUNKS if "chunks" in case.schedule else 1
        config = TransformerConfig(
            num_layers=case.stages * chunks,
            hidden_size=_HIDDEN,
            num_attention_heads=1,
            pipeline_model_parallel_size=case.stages,
            virtual_pipeline_model_parallel_size=chunks if chunks > 1 else None,
            pipeline_dtype=torch.float32,
            calculate_per_token_loss=True,
            use_cpu_initialization=True,
        )
        p2p_buffer = P2PBuffer(_HIDDEN if case.schedule == "co-located" else 0, torch.float32)
        self.case, self.pg = case, pg
        self.models = [
            StandInStage(
                config, case, p2p_buffer, first=stage == 0 and chunk == 0, last=stage == last and chunk == chunks - 1
            )
            for chunk in range(chunks)
        ]
        self.prefetcher = None
        if case.schedule == "prefetch":
            channel = FrozenChannel(pg.pp, (_TOKENS, 1, _HIDDEN), torch.float32, _CPU, timeout_minutes=5)
            frozen = StandInFrozenModels(case.frozen * case.unit, last=stage == last)
            self.prefetcher = Prefetcher(frozen, channel, case.costs, _CPU)
        meanwhile = None if self.prefetcher is None else self.prefetcher.during_exchange
        self.communicator = ColocatedCommunicator(pg.pp, config, p2p_buffer, _CPU, meanwhile)

    def step(self) -> None:
        """One step: all forwards and backwards."""
        packs = [collate([], PackFormat(_TOKENS))] * self.case.micro_batches
        if self.prefetcher is None:
            self._run(iter(packs))
            return
        batches = self.prefetcher.begin_step(packs, packs)
        self._run(batches)
        self.prefetcher.end_step()

    def _run(self, batches: Iterator[PreferenceBatch]) -> None:
        chunks = len(self.models)
        iterators = list(tee(batches, chunks))
        get_forward_backward_func(pp_size=self.case.stages, vp_size=chunks if chunks > 1 else None)(
            forward_step_func=_forward_step,
            data_iterator=iterators,
            model=self.models,
            num_microbatches=self.case.micro_batches,
            seq_length=_TOKENS,
            micro_batch_size=1,
            forward_only=False,
            pg_collection=self.pg,
            p2p_communicator=self.communicator,
        )


def _measure(rank: int, stages: int, cases: list[Case], directory: str) -> None:
    """One process: runs the cases and leaves the seconds of each in a file (the first rank's)."""
    enable_cpu_backend()
    torch.set_num_threads(1)
    store = dist.FileStore(str(Path(directory) / "store"), stages)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=stages)
    pg = init_model_parallel(make_layout(1, stages, 1, False, stages), 0, 5)
    results: list[list[float]] = []
    for case in cases:
        bench = Bench(case, pg)
        bench.step()  # connects the stages, and runs the first frozen passes
        seconds = []
        for _ in range(case.repetitions):
            dist.barrier()
            begin = time.perf_counter()
            bench.step()
            taken = torch.tensor(time.perf_counter() - begin, dtype=torch.float64)
            dist.all_reduce(taken, op=dist.ReduceOp.MAX)
            seconds.append(float(taken))
        results.append(seconds)
    if rank == 0:
        (Path(directory) / "results.json").write_text(json.dumps(results))
    dist.barrier()
    dist.destroy_process_group()


def main() -> None:
    """Measures every schedule and prints a table."""
    parser = argparse.ArgumentParser(prog="python -m tools.benchmarks.pipeline")
    parser.add_argument("--stages", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--micro-batches", type=int, default=8, help="a multiple of the stages; default %(default)s")
    parser.add_argument("--unit-ms", type=float, default=40.0, help="a policy forward; default %(default)s")
    parser.add_argument("--repetitions", type=int, default=5, help="default %(default)s")
    arguments = parser.parse_args()
    print(
        f"{'stages':>6} {'frozen':>6}  {'schedule':<18} {'real s':>7} {'simulated':>9} {'ideal':>7} "
        f"{'real bubble':>11} {'simulated':>9} {'real / simulated':>16}"
    )
    for stages in arguments.stages:
        cases = [
            Case(schedule, stages, arguments.micro_batches, frozen, arguments.unit_ms / 1000, arguments.repetitions)
            for frozen in (2.0, 1.0)
            for schedule in _SCHEDULES
            if frozen == 2.0 or not schedule.startswith("policy")
        ]
        with tempfile.TemporaryDirectory() as directory:
            multiprocessing.spawn(_measure, (stages, cases, directory), nprocs=stages)
            results = json.loads((Path(directory) / "results.json").read_text())
        for case, seconds in zip(cases, results, strict=True):
            print(_line(case, statistics.median(seconds)), flush=True)


def _line(case: Case, real: float) -> str:
    timeline = case.simulated()
    simulated, ideal = timeline.step_time * case.unit, case.ideal * case.unit
    frozen = "-" if case.schedule.startswith("policy") else f"{case.frozen:g}"
    return (
        f"{case.stages:>6} {frozen:>6}  {case.schedule:<18} {real:>7.3f} {simulated:>9.3f} {ideal:>7.3f} "
        f"{1 - ideal / real:>11.1%} {timeline.bubble:>9.1%} {real / simulated:>16.3f}"
    )


if __name__ == "__main__":
    main()
