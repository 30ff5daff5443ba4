"""Runs the next step's frozen passes in the bubbles of this step, where ``planning/prefetch.py`` says.

The frozen models' weights never change, so when a pass runs changes no value. What was prefetched is no part of a
checkpoint: a run that continues begins as a fresh one does.
"""

import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence

import torch
import torch.distributed as dist
from megatron.core.process_groups_config import ProcessGroupCollection
from transformers import PretrainedConfig

from megatron_tgdpo.batching.collate import PreferenceBatch
from megatron_tgdpo.config.schema import Config
from megatron_tgdpo.distributed.layout import ParallelLayout
from megatron_tgdpo.frozen.models import FrozenModel, FrozenModels
from megatron_tgdpo.frozen.prefetch_communicator import FrozenChannel
from megatron_tgdpo.frozen.queue import FrozenQueue
from megatron_tgdpo.planning.activations import Pack
from megatron_tgdpo.planning.cluster import Cluster
from megatron_tgdpo.planning.job import Batch, Job
from megatron_tgdpo.planning.pipeline_schedule import StageCosts
from megatron_tgdpo.planning.prefetch import plan_prefetch, stage_hooks
from megatron_tgdpo.planning.step_time import stage_costs

logger = logging.getLogger(__name__)


class Prefetcher:
    """Hands out packs with the frozen models' log-probs; all methods are called by all stages alike.

    Args:
        models: The frozen models of this stage.
        channel: Between the stages.
        costs: Of every stage; they decide when passes run, nothing else.
        device: Of the models.
    """

    def __init__(
        self, models: FrozenModels, channel: FrozenChannel, costs: Sequence[StageCosts], device: torch.device
    ) -> None:
        self.models = models
        self._channel, self._device = channel, device
        self._costs = tuple(costs)
        self._queue = self._new_queue()
        self._start = 0
        # Passes that must be done by each exchange of the step under way; None between steps.
        self._due: Iterator[int] | None = None

    def _new_queue(self) -> FrozenQueue:
        return FrozenQueue(self.models, self._channel, self._device)

    def begin_step(
        self, packs: Sequence[PreferenceBatch], next_packs: Sequence[PreferenceBatch]
    ) -> Iterator[PreferenceBatch]:
        """The packs of a training step, to be drawn just before their forward passes.

        Args:
            packs: Of this step; their frozen passes are run here, at once, unless the step before has run them.
            next_packs: Of the next step; empty at the last.
        """
        queue = self._queue
        if queue.served == queue.added:
            queue.add(packs)
            queue.run_to(queue.added)
        self._start = queue.done
        queue.add(next_packs)
        plan = plan_prefetch(self._costs, len(packs), len(next_packs))
        during_exchanges, before_forward = stage_hooks(plan, self._channel.stage)
        self._due = iter(during_exchanges)

        def drawn() -> Iterator[PreferenceBatch]:
            for pack, due in zip(packs, before_forward, strict=True):
                queue.run_to(self._start + due)
                yield queue.with_logps(pack)

        return drawn()

    def during_exchange(self) -> None:
        """Runs what is due while an exchange of the policy is on its way; the communicator calls it once in each.

        Between :meth:`end_step` and :meth:`begin_step`, as in evaluation, nothing is.
        """
        if self._due is not None:
            due = next(self._due, None)
            assert due is not None, "the schedule exchanged more often than planned"
            self._queue.run_to(self._start + due)

    def end_step(self) -> None:
        """Waits until this stage's frozen hidden states have left."""
        assert self._due is not None, "no step is under way"
        assert next(self._due, None) is None, "the schedule exchanged less often than planned"
        assert self._queue.done == self._queue.added, "frozen passes are left over"
        self._due = None
        self._queue.flush()

    def alongside(self, packs: Iterable[PreferenceBatch]) -> Iterator[PreferenceBatch]:
        """Packs whose frozen passes run just before their forward passes, as in a co-located step; for evaluation."""
        queue = self._new_queue()
        for pack in packs:
            queue.add([pack])
            queue.run_to(queue.added)
            yield queue.with_logps(pack)
        queue.flush()


def build_prefetcher(
    config: Config,
    configs: Mapping[str, PretrainedConfig],
    frozen: Sequence[FrozenModel],
    layout: ParallelLayout,
    pg: ProcessGroupCollection,
    device: torch.device,
) -> Prefetcher:
    """What runs the frozen models ahead of the policy. Collective over all ranks.

    Args:
        config: The run.
        configs: HF configs by role.
        frozen: This rank's slices of the frozen models that the method uses.
        layout: The parallel layout, of more than one stage.
        pg: Its process groups.
        device: Of the models.
    """
    if dist.get_rank() == 0:
        logger.warning("guidance.prefetch is experimental: no run with real models has yet shown that it is faster")
    models, dtype = FrozenModels(frozen), frozen[0].model.config.params_dtype
    local = config.seq_length // layout.context // (layout.tensor if layout.sequence_parallel else 1)
    shape = (local, 1, sum(models.widths))
    channel = FrozenChannel(pg.pp, shape, dtype, device, config.parallel.timeout_minutes)
    # Lengths as the planner assumes them: only the order of passes depends on it.
    batch = Batch(config.batch.global_pairs, config.data.max_length, 0.5, config.shared_prompts)
    pack = Pack(config.seq_length, config.longest_sequence, dtype.itemsize)
    job = Job(configs["policy"], tuple(configs[role] for role in config.method.frozen), pack, batch)
    return Prefetcher(models, channel, stage_costs(job, Cluster(), layout, config.train.recomputation), device)
