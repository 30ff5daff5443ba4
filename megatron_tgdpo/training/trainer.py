"""The training loop: plan, step, guard, log, evaluate, save. It knows neither losses nor models."""

import logging
import math
import resource
import time
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from megatron_tgdpo import signals
from megatron_tgdpo.batching.collate import PreferenceBatch, collate
from megatron_tgdpo.batching.packer import plan_packs
from megatron_tgdpo.checkpoints.adapter_directory import LORA
from megatron_tgdpo.checkpoints.best import Best
from megatron_tgdpo.checkpoints.model_directory import hf_directory
from megatron_tgdpo.config.loading import to_dict
from megatron_tgdpo.config.schema import Config
from megatron_tgdpo.console import progress, waiting
from megatron_tgdpo.data.dataset import PreferenceDataset
from megatron_tgdpo.distributed.layout import ParallelLayout
from megatron_tgdpo.distributed.ranks import raise_on_all_ranks
from megatron_tgdpo.errors import AgreedError
from megatron_tgdpo.gpu.energy import EnergyMeter
from megatron_tgdpo.guidance.cache import GuidanceCache
from megatron_tgdpo.guidance.monitor import GuideWatch
from megatron_tgdpo.output.metrics import StepMetrics, eval_group, shortened
from megatron_tgdpo.output.metrics_log import MetricsLog
from megatron_tgdpo.planning.memory import GIB
from megatron_tgdpo.setup.engine import Engine
from megatron_tgdpo.setup.model_sources import trained_lora
from megatron_tgdpo.signals import StoppedEarly
from megatron_tgdpo.storage.hub import local_path
from megatron_tgdpo.training.ahead import Ahead
from megatron_tgdpo.training.best import BestWatch, find_best
from megatron_tgdpo.training.checkpoint_saver import CheckpointSaver, save_due
from megatron_tgdpo.training.engine_state import load_checkpoint
from megatron_tgdpo.training.export import Exporter, export
from megatron_tgdpo.training.finish import finish
from megatron_tgdpo.training.performance import Performance, StepWork
from megatron_tgdpo.training.resume import StartPoint, last_step
from megatron_tgdpo.training.run_data import RunData
from megatron_tgdpo.training.samples import PolicySamples
from megatron_tgdpo.training.start_check import check_start
from megatron_tgdpo.training.step import StepResult, evaluate_packs, train_step
from megatron_tgdpo.training.timing import SampledTimes

if TYPE_CHECKING:
    from tqdm import tqdm

logger = logging.getLogger(__name__)

# Metric, its name in the progress line, its format; not all of them, so that a line with its clock fits 100 columns.
_PROGRESS = (
    ("train/loss", "loss", ".4f"), ("rewards/accuracies", "accuracy", ".3f"), ("rewards/margins", "margin", ".3f"),
    ("train/grad_norm", "grad", ".2f"),
)  # fmt: skip
_EVAL_PROGRESS = (
    ("loss", "loss", ".4f"), ("rewards/accuracies", "accuracy", ".3f"), ("rewards/margins", "margin", ".3f"),
)  # fmt: skip


# This data rank's packs of a step, and what is in those of all ranks.
StepPacks = tuple[list[PreferenceBatch], StepWork]


class Trainer:
    """Runs the steps of a configured run from where it goes on to its end.

    Args:
        config: The run.
        layout: The parallel layout.
        engine: Models and optimizer of this rank.
        data: Datasets and data order.
        start: Where it goes on.
        performance: Tells how fast its steps are.
        exporter: Writes HF directories, if ``export.hf`` asks for them.
        guide_of: As for ``training/finish.py: finish``.
    """

    def __init__(
        self,
        config: Config,
        layout: ParallelLayout,
        engine: Engine,
        data: RunData,
        start: StartPoint,
        performance: Performance,
        exporter: Exporter | None = None,
        guide_of: Sequence[str] | None = None,
    ) -> None:
        self.config = config
        self.layout = layout
        self.engine = engine
        self.data = data
        self.output_dir = Path(config.output_dir)
        self.start = start
        self.performance = performance
        self._gpu = torch.cuda.current_device() if engine.device.type == "cuda" else None
        self.lora = trained_lora(config)
        # This data rank's packs of each validation set, once it was evaluated.
        self._evaluated: dict[str, list[list[int]]] = {}
        self.exporter = exporter
        self.guide_of = guide_of
        self.last_step = last_step(config, data.order)
        self.saver = CheckpointSaver(
            engine,
            self.output_dir,
            hf_directory(local_path(config.model.policy)),
            config.checkpoint,
            config.parallel.timeout_minutes,
            find_best(config, start),
            self._export if exporter is not None and config.export.hf == "every_save" else None,
        )
        device = engine.device
        self.times = SampledTimes(config.log.timing_every_steps, device)
        self.meter = raise_on_all_ranks(lambda: EnergyMeter(device)) if config.log.energy else None
        self.best_watch = BestWatch(config, start.inputs)
        self.samples = PolicySamples(config, layout, engine, data) if config.eval.generate.prompts else None

    def train(self) -> None:
        """Trains to the last step, and leaves ``DONE`` if that is the schedule's last. Collective over all ranks.

        Raises:
            AgreedError: A loss or gradient is not finite, the start check fails, or, after all else, the export.
            AgreedStorageError: Checkpoints cannot be saved or read, or the metrics up to one cannot be written.
            StoppedEarly: Some rank was asked to stop; the step it was in is saved.
        """
        done = self._resume()
        if self._over_ranks(signals.requested())[0]:
            raise StoppedEarly(f"asked to stop before step {done + 1} of {self.data.order.steps}")
        try:
            with Ahead(self._step_packs) as ahead:
                done = self._train_from(done + 1, ahead)
        except BaseException:
            self.saver.leave()
            raise
        if done < self.last_step:
            raise StoppedEarly(f"asked to stop: saved after step {done} of {self.data.order.steps}")
        finish(self.config, self.exporter, done, self.data.order.steps, self.guide_of)

    def _train_from(self, first: int, ahead: Ahead[StepPacks]) -> int:
        """Trains from a step on to the last, or until some rank is asked to stop; returns the step that was reached."""
        log = raise_on_all_ranks(lambda: MetricsLog(self.config, first - 1) if dist.get_rank() == 0 else None)
        guide_watch, asked = GuideWatch(), self.config.eval
        started = saved = time.monotonic()
        # Prefetching needs the packs of the next step when this one begins.
        before = 1 if self.engine.prefetcher is None else 2
        ready: deque[StepPacks] = deque()
        for step in range(first, min(first + before, self.last_step + 1)):
            ahead.start(step)
            ready.append(ahead.take()[0])
        for step in range(first, self.last_step + 1):
            begin = time.monotonic()
            if self.meter is not None:
                self.meter.start()
            packs, work = ready.popleft()
            data_seconds, more = 0.0, step + before <= self.last_step
            if more:
                ahead.start(step + before)
            # The first may take minutes: kernels are compiled and connections made.
            waits = waiting(f"step {step}", shown=log is not None and step == first)
            with waits, self.times.around(step):
                result = train_step(self.engine, packs, ready[0][0] if ready else ())
            if more:
                coming, data_seconds = ahead.take()
                ready.append(coming)
            self._guard(step, result)
            if step == 1 and self.config.train.check_start and self.config.method.frozen:
                check_start(self.engine, packs, result.metrics)
            values = {"train/loss": result.metrics.values["loss"], "train/grad_norm": result.grad_norm}
            values |= {"train/lr": result.lr}
            values |= {name: value for name, value in result.metrics.values.items() if name != "loss"}
            seconds = time.monotonic() - begin
            peak, data_seconds, stop, failed, waited = self._over_ranks(
                _peak_memory_bytes(self.engine.device) / GIB,
                data_seconds,
                signals.requested(),
                self.saver.has_failed,
                time.monotonic() - saved,
            )
            values |= self.performance.metrics(seconds, work, data_seconds, peak) | self.saver.take_metrics()
            values |= self._metered(seconds, work.pairs)
            evaluations = self.evaluate() if self._due(step, self.config.eval.every_steps) else {}
            for group, evaluation in evaluations.items():
                values |= {f"{group}/{name}": value for name, value in evaluation.values.items()}
            # What is logged is what decides which step is best.
            values = shortened(values)
            samples = []
            if self.samples is not None and self._due(step, asked.generate.every_steps or asked.every_steps):
                samples = self.samples.make()
            best = self.best_watch.improvement(step, values, self.saver.best) if evaluations else None
            if log is not None:
                log.write(step, values, evaluations, samples)
                if step % self.config.log.every_steps == 0 or step == self.last_step:
                    logger.info(self._progress(step, values, (time.monotonic() - started) / (step - first + 1)))
                for group in evaluations:
                    logger.info("%s at step %d: %s", group, step, _shown(values, _EVAL_PROGRESS, f"{group}/"))
                if (warning := guide_watch.count(result.metrics.values, work.pairs)) is not None:
                    logger.warning(warning)
            last = bool(stop) or step == self.last_step
            due = best is not None or failed
            if last or due or save_due(step, self.data.order.steps, self.config.checkpoint.every_steps, waited):
                # The steps of a checkpoint are not made again, so their metrics must be there.
                raise_on_all_ranks(log.check if log is not None else lambda: None)
                self._save(step, last, best)
                saved = time.monotonic()
            if stop:
                break
        if log is not None:
            log.close()
        return step

    def evaluate(self) -> dict[str, StepMetrics]:
        """Metrics of every whole validation set, by the group that they are logged in. Collective over all ranks."""
        return {eval_group(name): self._evaluate(name) for name in self.data.validation}

    def _evaluate(self, name: str) -> StepMetrics:
        dataset = self.data.validation[name]
        if name not in self._evaluated:
            self._evaluated[name] = self._plan(dataset, list(range(len(dataset))))[self.engine.pg.dp.rank()]
        packs = self._evaluated[name]
        batches = self._collated(dataset, packs, self.data.validation_guidance.get(name))
        label, first = f"evaluating data.{'.'.join(filter(None, ('validation', name)))}", dist.get_rank() == 0
        with progress(label, len(packs), "pack", shown=first, leave=False) as bar:
            return evaluate_packs(self.engine, _counted(batches, bar), len(packs))

    def _resume(self) -> int:
        if self.start.checkpoint is None:
            return 0
        load_checkpoint(self.engine, self.start.checkpoint, self.start.step)
        if dist.get_rank() == 0:
            logger.info("continuing after step %d from %s", self.start.step, self.start.checkpoint)
        return self.start.step

    def _plan(self, dataset: PreferenceDataset, indices: list[int]) -> list[list[list[int]]]:
        pack_format, layout = self.engine.pack_format, self.layout
        tokens = pack_format.pair_tokens(dataset.lengths[indices]).tolist()
        multiple = layout.pipeline if layout.virtual > 1 else 1
        return plan_packs(indices, tokens, pack_format.tokens, layout.data, multiple)

    def _collated(
        self, dataset: PreferenceDataset, packs: list[list[int]], guidance: GuidanceCache | None
    ) -> Iterator[PreferenceBatch]:
        """Collates packs one by one, when the schedule takes them."""
        return (collate([dataset[i] for i in pack], self.engine.pack_format, guidance) for pack in packs)

    def _step_packs(self, step: int) -> StepPacks:
        """This data rank's packs of a step, and what is in those of all ranks."""
        train, pack_format = self.data.train, self.engine.pack_format
        indices = self.data.order.step_indices(step)
        plan = self._plan(train, indices)
        used = [
            int(pack_format.pair_tokens(train.lengths[pack]).sum()) if pack else 0 for packs in plan for pack in packs
        ]
        work = self.performance.work(train.lengths[indices], train.trained_lengths[indices], used)
        packs = self._collated(train, plan[self.engine.pg.dp.rank()], self.data.train_guidance)
        if self._gpu is None:
            return list(packs), work
        # Every thread begins on the first GPU, on which page-locked memory would give it a context.
        torch.cuda.set_device(self._gpu)
        return [pack.pinned() for pack in packs], work

    def _guard(self, step: int, result: StepResult) -> None:
        if result.updated:
            return
        train = self.data.train
        pair = result.metrics.bad_pair
        if pair is not None:
            raise AgreedError(
                f"step {step}: the loss of the pair {train.source(pair)} is not finite; no parameter was changed "
                "by this step: look at it, or lower optimizer.lr"
            )
        first, *others = map(train.source, self.data.order.step_indices(step))
        pairs = f"{first} and {len(others)} others" if others else first
        raise AgreedError(
            f"step {step}: the gradient norm is {result.grad_norm} with finite losses; no parameter was changed by "
            f"this step (its pairs: {pairs}): lower optimizer.lr, or check the weights"
        )

    def _due(self, step: int, every: int | None) -> bool:
        return step == self.last_step or (every is not None and step % every == 0)

    def _save(self, step: int, last: bool, best: Best | None) -> None:
        self.saver.save(
            step,
            {
                **self.start.record(),
                "consumed_pairs": self.data.order.consumed_pairs(step),
                "dtype": self.config.precision.dtype,
                "config": to_dict(self.config),
                **({} if self.lora is None else {LORA: asdict(self.lora)}),
            },
            last=last,
            best=best,
        )

    def _export(self, checkpoint: Path, group: dist.ProcessGroup) -> None:
        assert self.exporter is not None, "only given where there is one"
        # Its checksums were taken a moment ago.
        export(self.exporter, self.output_dir, checkpoint, group, verify=False, kind=self.config.export_kind)

    def _over_ranks(self, *mine: float) -> list[float]:
        """The largest of each number over all ranks, in one reduction.

        What ranks notice at different moments, even in different steps, such as a signal, becomes one decision: all of
        them see the same maximum, and act after the same step.
        """
        maxima = torch.tensor([float(number) for number in mine], device=self.engine.device)
        dist.all_reduce(maxima, op=dist.ReduceOp.MAX)
        return maxima.tolist()

    def _metered(self, seconds: float, pairs: int) -> dict[str, float]:
        """What meters that are on say of a step. Collective over all ranks, which have the same ones on."""
        times, joules = self.times.take(), None if self.meter is None else self.meter.joules()
        if times is None and joules is None:
            return {}
        sums = torch.tensor([*(times or (0.0, 0.0)), joules or 0.0], dtype=torch.float64, device=self.engine.device)
        dist.all_reduce(sums)
        collectives, exchanges, energy = sums.tolist()
        values: dict[str, float] = {}
        ranks = dist.get_world_size()
        if times is not None:
            values |= {"perf/collective_seconds": collectives / ranks, "perf/exchange_seconds": exchanges / ranks}
        if joules is not None:
            values |= {"perf/joules_per_pair": energy / pairs, "perf/watts_per_gpu": energy / seconds / ranks}
        return values

    def _progress(self, step: int, values: dict[str, float], seconds_per_step: float) -> str:
        eta = timedelta(seconds=math.ceil(seconds_per_step * (self.last_step - step)))
        return (
            f"step {step}/{self.data.order.steps} {_shown(values, _PROGRESS)} | "
            f"{values['perf/step_seconds']:.3g} s/step ETA {eta}"
        )


def _shown(values: Mapping[str, float], metrics: Sequence[tuple[str, str, str]], before: str = "") -> str:
    """Metrics as text, as far as they are there; ``before`` stands before their names."""
    there = [(values[before + name], text, form) for name, text, form in metrics if before + name in values]
    return " ".join(f"{text} {value:{form}}" for value, text, form in there)


def _counted(batches: Iterable[PreferenceBatch], bar: "tqdm[Any]") -> Iterator[PreferenceBatch]:
    """The same batches; the bar moves when one is taken."""
    for batch in batches:
        bar.update()
        yield batch


def _peak_memory_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
