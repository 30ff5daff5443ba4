"""Plans: one layout with its memory, time and traffic, all that a cluster and a job allow, and the one to choose."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from transformers import PretrainedConfig

from megatron_tgdpo.config.constraints import RECOMPUTE_CHOICES
from megatron_tgdpo.config.schema import Config
from megatron_tgdpo.distributed.layout import ParallelLayout, make_layout
from megatron_tgdpo.errors import UserError
from megatron_tgdpo.models.hf_weights.mapping import Experts
from megatron_tgdpo.planning.activations import Pack
from megatron_tgdpo.planning.cluster import Cluster
from megatron_tgdpo.planning.job import Batch, Job
from megatron_tgdpo.planning.memory import GIB, NO_SAVINGS, RankMemory, Savings, Sources, rank_memory
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
        savings: Of memory, beside recomputation.
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
    savings: Savings = NO_SAVINGS

    @property
    def bubble(self) -> float:
        """The part of the pipeline's time in which the slowest stage waits, as simulated."""
        return self.time.bubble / (self.time.total - self.time.data - self.time.optimizer)


def make_plan(
    job: Job,
    cluster: Cluster,
    layout: ParallelLayout,
    recompute: str,
    given: Given | None = None,
    savings: Savings = NO_SAVINGS,
) -> Plan:
    """Computes one plan.

    Args:
        job: The training run.
        cluster: The machines.
        layout: The parallel layout.
        recompute: ``train.recompute``.
        given: ``parallel.pipeline_layers``, by role.
        savings: Of memory, beside recomputation.

    Raises:
        UserError: A model does not divide by the layout, or a pack of given size not by the tensor ranks.
    """
    layout = fit_layout(job, layout, recompute, given)
    job = job.under(layout)
    memory = _memory(job, layout, recompute, savings)
    return Plan(
        layout=layout,
        recompute=recompute,
        memory=memory,
        time=step_time(job, cluster, layout, recompute, offloaded=savings.offload_frozen),
        traffic=traffic(job, layout, recompute),
        pack_tokens=job.pack.tokens,
        micro_batches=job.micro_batches(layout),
        fits=_fits(memory, cluster),
        warning=layout_warning(job, cluster, layout),
        savings=savings,
    )


def _memory(job: Job, layout: ParallelLayout, recompute: str, savings: Savings) -> RankMemory:
    return rank_memory(
        job.policy,
        job.frozen,
        layout,
        job.local_pack(layout),
        recompute,
        sources=job.sources,
        state_bytes=savings.state_bytes(job.pack.dtype_bytes),
        offloaded=savings.offload_frozen,
    )


def _fits(memory: RankMemory, cluster: Cluster) -> bool:
    return memory.total <= (cluster.gpu_memory_gib - cluster.reserve_gib) * GIB


def layout_warning(job: Job, cluster: Cluster, layout: ParallelLayout) -> str:
    """What is odd about a layout for a job, or an empty string."""
    packs, per_rank = job.batch.packs(job.pack.tokens), job.micro_batches(layout)
    if packs < layout.data:
        return (
            f"{layout.data - packs} of {layout.data} data ranks have no pair: raise batch.global_pairs to "
            f"{_pairs(job, layout.data):,}, or TP, PP or CP"
        )
    each = -(-packs // layout.data)
    if each < layout.pipeline:
        return (
            f"packs per step ({each}) do not fill the stages ({layout.pipeline}): raise batch.global_pairs to "
            f"{_pairs(job, layout.data * layout.pipeline):,}"
        )
    if per_rank > each:
        return f"of {per_rank} packs of a rank some are empty, for chunks take {layout.pipeline} at a time"
    if layout.tensor > cluster.gpus_per_node:
        return "tensor groups span nodes"
    return ""


def _pairs(job: Job, packs: int) -> int:
    """Pairs that so many packs need."""
    return math.ceil(packs * job.pack.tokens / job.batch.packed_pair_tokens)


def all_plans(job: Job, cluster: Cluster, *, plain: bool = False) -> list[Plan]:
    """The valid layouts with tensor groups inside a node, each with the least recomputation that fits; fastest first.

    Layouts that do not fit come last, with full recomputation, of these the smallest first. Sequence parallelism goes
    with tensor parallelism.
    Stages are split into chunks where they wait for each other otherwise. Experts are split as the rest of the model,
    or whole over groups of ranks inside a node. If nothing fits, what does with :class:`Savings` comes first.

    Args:
        job: The training run.
        cluster: The machines.
        plain: Without context ranks, chunks and savings.
    """
    layouts = _layouts(job, cluster, (1,) if plain else _CONTEXTS)
    plans = [plan for layout in layouts for plan in _plans_of(job, cluster, layout, plain=plain)]
    if not plain and not any(plan.fits for plan in plans):
        plans = [_saved(job, cluster, plan) for plan in plans]

    def rank(plan: Plan) -> tuple[bool, float, int, int]:
        # Of equally fast ones the simplest.
        cost = plan.time.total if plan.fits else plan.memory.total
        return not plan.fits, cost, plan.layout.virtual, plan.layout.context

    return sorted(plans, key=rank)


def any_fits(job: Job, cluster: Cluster) -> bool:
    """Whether a layout without context ranks fits, with full recomputation: :func:`all_plans` in a small part of its
    time."""
    for layout in _layouts(job, cluster, (1,)):
        try:
            fitted = fit_layout(job, layout, "full")
            if _fits(_memory(job.under(fitted), fitted, "full", NO_SAVINGS), cluster):
                return True
        except UserError:
            continue
    return False


def _layouts(job: Job, cluster: Cluster, contexts: Sequence[int]) -> list[ParallelLayout]:
    """Those that a cluster has, whether or not the models divide."""
    return [
        make_layout(tensor, pipeline, context, True, cluster.gpus, 1, expert, None if expert == 1 else 1)
        for tensor in _divisors(cluster.gpus_per_node)
        for pipeline in range(1, job.policy.num_hidden_layers + 1)
        for context in contexts
        if cluster.gpus % (tensor * pipeline * context) == 0
        for expert in _expert_sizes(job, cluster, cluster.gpus // pipeline)
    ]


# Ranks that share each sequence, and chunks of a stage, that are tried.
_CONTEXTS = (1, 2, 4, 8)
_CHUNKS = (2, 4)
# Below so large a part of a step chunks are not tried, which send as often more as they are.
_SMALL_BUBBLE = 0.02
# What else is tried where nothing fits, from what costs least: offloading is exact, moments in fewer bits are not.
_SAVINGS = (
    Savings(offload_frozen=True),
    Savings("bf16"),
    Savings("bf16", offload_frozen=True),
    Savings("fp8", offload_frozen=True),
)


def _divisors(number: int) -> list[int]:
    return [size for size in range(1, number + 1) if number % size == 0]


def _plans_of(job: Job, cluster: Cluster, layout: ParallelLayout, *, plain: bool) -> list[Plan]:
    """A layout with the least recomputation that fits, or with full; and the same in chunks, if that is faster."""
    best = _least_recompute(job, cluster, layout)
    if best is None:
        return []
    found = [best]
    if not plain and layout.pipeline > 1 and best.bubble > _SMALL_BUBBLE:
        chunked = [_least_recompute(job, cluster, replace(layout, virtual=chunks)) for chunks in _CHUNKS]
        found += [each for each in chunked if each is not None and each.time.total < best.time.total]
    return found


def _least_recompute(job: Job, cluster: Cluster, layout: ParallelLayout) -> Plan | None:
    try:
        for recompute in RECOMPUTE_CHOICES:
            fitted = fit_layout(job, layout, recompute)
            under = job.under(fitted)
            if _fits(_memory(under, fitted, recompute, NO_SAVINGS), cluster) or recompute == RECOMPUTE_CHOICES[-1]:
                return make_plan(job, cluster, layout, recompute)
    except UserError:
        pass
    return None


def possible_savings(job: Job) -> list[Savings]:
    """Those that the models and their dtype allow: moments go with bf16 weights, offloading with a frozen model."""
    alone = len(job.frozen) > sum(source.shared for source in job.sources.frozen)
    return [
        each
        for each in _SAVINGS
        if (alone or not each.offload_frozen) and (each.moments == "fp32" or job.pack.dtype_bytes == 2)
    ]


def _saved(job: Job, cluster: Cluster, plan: Plan) -> Plan:
    """The plan with the least savings with which it fits, or as it is."""
    layout = replace(plan.layout, layers=())
    under = job.under(plan.layout)
    for each in possible_savings(job):
        if _fits(_memory(under, plan.layout, plan.recompute, each), cluster):
            return make_plan(job, cluster, layout, plan.recompute, savings=each)
    return plan


def _expert_sizes(job: Job, cluster: Cluster, ranks: int) -> list[int]:
    """Values of ``parallel.expert`` for stages of so many ranks, whole experts on each; 1 alone without experts."""
    if all(Experts.of(hf_config) is None for hf_config in job.models):
        return [1]
    return [size for size in range(1, cluster.gpus_per_node + 1) if cluster.gpus_per_node % size == ranks % size == 0]


def nearest(plans: Sequence[Plan], layout: ParallelLayout) -> Plan | None:
    """Of plans that fit the one whose sizes are the fewest doublings from a layout's."""
    fitting = [plan for plan in plans if plan.fits]

    def doublings(plan: Plan) -> float:
        ours, theirs = (
            (each.tensor, each.pipeline, each.expert, each.context, each.virtual) for each in (plan.layout, layout)
        )
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

    Without context ranks and chunks.

    Args:
        config: The run; its own layout is not looked at.
        models: HF configs of the policy and of the frozen models that run co-located.
        cluster: The machines.
        sources: What the models are made of (``setup/model_sources.py: planned_sources``); by default each is whole.

    Raises:
        UserError: None fits.
    """
    plans = all_plans(job_of(config, models, sources), cluster, plain=True)
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
