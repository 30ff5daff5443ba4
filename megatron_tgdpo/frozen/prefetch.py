"""Runs the next step's frozen passes in the bubbles of this step, where ``planning/prefetch.py`` says.

The frozen models' weights never change, so when a pass runs changes no value. What was prefetched is no part of a
checkpoint: a run that continues begins as a fresh one does.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from transformers import PretrainedConfig

from megatron_tgdpo.batching.collate import PreferenceBatch
from megatron_tgdpo.config.schema import Config
from megatron_tgdpo.distributed.layout import ParallelLayout
from megatron_tgdpo.frozen.models import FrozenModels
from megatron_tgdpo.frozen.queue import FrozenChannel, FrozenQueue
from megatron_tgdpo.models.language_model import LanguageModel
from megatron_tgdpo.planning.activations import Pack
from megatron_tgdpo.planning.cluster import Cluster
from megatron_tgdpo.planning.job import Batch, Job
from megatron_tgdpo.planning.prefetch import plan_prefetch, stage_hooks
from megatron_tgdpo.planning.schedule import StageCosts
from megatron_tgdpo.planning.step_time import stage_costs


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
        self._stream = self._new_stream()
        self._start = 0
        self._during_call: tuple[int, ...] = ()
        self._calls = 0

    def _new_stream(self) -> FrozenQueue:
        return FrozenQueue(self.models, self._channel, self._device)

    def begin_step(
        self, packs: Sequence[PreferenceBatch], next_packs: Sequence[PreferenceBatch]
    ) -> Iterator[PreferenceBatch]:
        """The packs of a training step, to be drawn just before their forward passes.

        Args:
            packs: Of this step; their frozen passes are run here, at once, unless the step before has run them.
            next_packs: Of the next step; empty at the last.
        """
        stream = self._stream
        if stream.taken == stream.added:
            stream.add(packs)
            stream.run_to(stream.added)
        self._start = stream.done
        stream.add(next_packs)
        plan = plan_prefetch(self._costs, len(packs), len(next_packs))
        self._during_call, before_forward = stage_hooks(plan, self._channel.stage)
        self._calls = 0

        def drawn() -> Iterator[PreferenceBatch]:
            for pack, due in zip(packs, before_forward, strict=True):
                stream.run_to(self._start + due)
                yield stream.take(pack)

        return drawn()

    def during_exchange(self) -> None:
        """Runs what is due while an exchange of the policy is on its way; called once in each."""
        self._stream.run_to(self._start + self._during_call[self._calls])
        self._calls += 1

    def end_step(self) -> None:
        """Waits until this stage's frozen hidden states have left."""
        assert self._calls == len(self._during_call), "the schedule exchanged otherwise than planned"
        assert self._stream.done == self._stream.added, "frozen passes are left over"
        self._stream.flush()

    def alongside(self, packs: Iterable[PreferenceBatch]) -> Iterator[PreferenceBatch]:
        """Packs whose frozen passes run just before their forward passes, as in a co-located step; for evaluation."""
        stream = self._new_stream()
        for pack in packs:
            stream.add([pack])
            stream.run_to(stream.added)
            yield stream.take(pack)
        stream.flush()


def build_prefetcher(
    config: Config,
    configs: Mapping[str, PretrainedConfig],
    frozen: Sequence[LanguageModel],
    layout: ParallelLayout,
    pg: ProcessGroupCollection,
    device: torch.device,
) -> Prefetcher:
    """What runs the frozen models beside the policy. Collective over all ranks.

    Args:
        config: The run.
        configs: HF configs by role.
        frozen: This rank's slices of the frozen models that the method uses.
        layout: The rank grid, of more than one stage.
        pg: Its process groups.
        device: Of the models.
    """
    models, dtype = FrozenModels(frozen), frozen[0].config.params_dtype
    tokens = config.seq_length // layout.context
    local = tokens // (layout.tensor if layout.sequence_parallel else 1)
    shape = (local, 1, sum(models.widths))
    channel = FrozenChannel(pg.pp, shape, dtype, device, config.parallel.timeout_minutes)
    # Lengths as the planner assumes them: only the order of passes depends on it.
    batch = Batch(config.batch.global_pairs, config.data.max_length, 0.5, config.shared_prompts)
    pack = Pack(tokens, config.longest_sequence, dtype.itemsize)
    job = Job(configs["policy"], tuple(configs[role] for role in config.method.frozen), pack, batch)
    return Prefetcher(models, channel, stage_costs(job, Cluster(), layout, config.train.recompute), device)
