"""Plans: one layout with its memory, time and traffic, all that a cluster and a job allow, and the one to choose."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from transformers import PretrainedConfig

from megatron_tgdpo.config.constraints import RECOMPUTE_CHOICES
from megatron_tgdpo.config.schema import Config
from megatron_tgdpo.distributed.layout import ParallelLayout, make_layout
from megatron_tgdpo.errors import UserError
from megatron_tgdpo.models.hf_weights.mapping import Experts
from megatron_tgdpo.planning.activations import Pack
from megatron_tgdpo.planning.cluster import Cluster
from megatron_tgdpo.planning.job import Batch, Job
from megatron_tgdpo.planning.memory import GIB, RankMemory, Sources, rank_memory
from megatron_tgdpo.planning.pipeline_layers import Given, fit_layout
from megatron_tgdpo.planning.step_time import StepTime, step_time
from megatron_tgdpo.planning.traffic import Traffic, traffic


@dataclass(frozen=True)
class Plan:
    """A layout and what it costs.

    Attributes:
        layout: The parallel layout, with the layers of its stages.
        recompute: ``train.recompute``.
        memory: Of the fullest rank.
        time: Of a step.
        traffic: Of a step.
        pack_tokens: Of a pack.
        micro_batches: Packs per data rank and step.
        fits: Whether the memory fits a GPU of the cluster, less the reserve.
        warning: What is odd about it, or an empty string.
    """

    layout: ParallelLayout
    recompute: str
    memory: RankMemory
    time: StepTime
    traffic: Traffic
    pack_tokens: int
    micro_batches: int
    fits: bool
    warning: str

    @property
    def bubble(self) -> float:
        """The part of the pipeline's time in which the slowest stage waits, as simulated."""
        return self.time.bubble / (self.time.total - self.time.data)


def make_plan(job: Job, cluster: Cluster, layout: ParallelLayout, recompute: str, given: Given | None = None) -> Plan:
    """Computes one plan.

    Args:
        job: The training run.
        cluster: The machines.
        layout: The parallel layout.
        recompute: ``train.recompute``.
        given: ``parallel.pipeline_layers``, by role.

    Raises:
        UserError: A model does not divide by the layout, or a pack of given size not by the tensor ranks.
    """
    layout = fit_layout(job, layout, recompute, given)
    job = job.under(layout)
    memory = rank_memory(job.policy, job.frozen, layout, job.pack, recompute, sources=job.sources)
    return Plan(
        layout=layout,
        recompute=recompute,
        memory=memory,
        time=step_time(job, cluster, layout, recompute),
        traffic=traffic(job, layout, recompute),
        pack_tokens=job.pack.tokens,
        micro_batches=job.micro_batches(layout),
        fits=memory.total <= (cluster.gpu_memory_gib - cluster.reserve_gib) * 2**30,
        warning=_warning(job, cluster, layout),
    )


def _warning(job: Job, cluster: Cluster, layout: ParallelLayout) -> str:
    packs, per_rank = job.batch.packs(job.pack.tokens), job.micro_batches(layout)
    if packs < layout.data:
        return f"{layout.data - packs} of {layout.data} data ranks have no pair: raise batch.global_pairs, or TP or PP"
    if per_rank < layout.pipeline:
        return f"packs per step ({per_rank}) do not fill the stages ({layout.pipeline}): raise batch.global_pairs"
    if layout.tensor > cluster.gpus_per_node:
        return "tensor groups span nodes"
    return ""


def all_plans(job: Job, cluster: Cluster) -> list[Plan]:
    """The valid layouts with tensor groups inside a node, each with the least recomputation that fits; fastest first.

    Layouts that do not fit come last, with full recomputation. Sequence parallelism goes with tensor parallelism.
    Experts are split as the rest of the model, or whole over groups of ranks inside a node.
    """
    plans = []
    for tensor in range(1, cluster.gpus_per_node + 1):
        for pipeline in range(1, job.policy.num_hidden_layers + 1):
            if cluster.gpus_per_node % tensor or cluster.gpus % (tensor * pipeline):
                continue
            for expert in _expert_sizes(job, cluster, cluster.gpus // pipeline):
                whole = None if expert == 1 else 1
                layout = make_layout(tensor, pipeline, 1, True, cluster.gpus, expert=expert, expert_tensor=whole)
                try:
                    candidates = [make_plan(job, cluster, layout, recompute) for recompute in RECOMPUTE_CHOICES]
                except UserError:
                    continue
                plans.append(next((plan for plan in candidates if plan.fits), candidates[-1]))
    return sorted(plans, key=lambda plan: (not plan.fits, plan.time.total))


def _expert_sizes(job: Job, cluster: Cluster, ranks: int) -> list[int]:
    """Values of ``parallel.expert`` for stages of so many ranks, whole experts on each; 1 alone without experts."""
    if all(Experts.of(hf_config) is None for hf_config in job.models):
        return [1]
    return [size for size in range(1, cluster.gpus_per_node + 1) if cluster.gpus_per_node % size == ranks % size == 0]


def nearest(plans: Sequence[Plan], layout: ParallelLayout) -> Plan | None:
    """Of plans that fit the one whose tensor, pipeline and expert sizes are the fewest doublings from a layout's."""
    fitting = [plan for plan in plans if plan.fits]

    def doublings(plan: Plan) -> float:
        ours, theirs = ((each.tensor, each.pipeline, each.expert) for each in (plan.layout, layout))
        return sum(abs(math.log2(one / other)) for one, other in zip(ours, theirs, strict=True))

    return min(fitting, key=doublings, default=None)


def job_of(config: Config, models: Sequence[PretrainedConfig], sources: Sources | None = None) -> Job:
    """A run with pairs of ``data.max_length`` tokens, half of them response; the arguments are choose_layout's."""
    batch = Batch(config.batch.global_pairs, config.data.max_length, 0.5, config.shared_prompts)
    keep = config.train.keep_logits_mib * 2**20
    pack = Pack(config.seq_length, config.longest_sequence, config.precision.parameter_bytes, batch.gathered_keys, keep)
    return Job(
        models[0], tuple(models[1:]), pack, batch, config.batch.tokens_per_micro_batch is not None, sources or Sources()
    )


def choose_layout(
    config: Config, models: Sequence[PretrainedConfig], cluster: Cluster, sources: Sources | None = None
) -> Plan:
    """The fastest layout that fits, by estimate, for pairs of ``data.max_length`` tokens, half of them response.

    Args:
        config: The run; its own layout is not looked at.
        models: HF configs of the policy and of the frozen models that run co-located.
        cluster: The machines.
        sources: What the models are made of (``setup/model_sources.py: planned_sources``); by default each is whole.

    Raises:
        UserError: None fits.
    """
    plans = all_plans(job_of(config, models, sources), cluster)
    fitting = [plan for plan in plans if plan.fits]
    if fitting:
        return fitting[0]
    usable = f"{cluster.gpu_memory_gib - cluster.reserve_gib:g} of {cluster.gpu_memory_gib:g} GiB"
    least = min((plan.memory.total for plan in plans), default=None)
    if least is None:
        raise UserError(f"no layout of {cluster.gpus} GPUs divides the model")
    raise UserError(
        f"no layout of {cluster.gpus} GPUs fits: the smallest takes {least / GIB:.0f} GiB a GPU, with {usable} usable; "
        "take more GPUs, or look for another way with tgdpo plan (shorter packs, guidance.mode cached)"
    )
