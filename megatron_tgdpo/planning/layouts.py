"""Plans: one layout with its memory, time and traffic, and all layouts that a cluster and a job allow."""

from dataclasses import dataclass

from megatron_tgdpo.config.constraints import RECOMPUTE_CHOICES
from megatron_tgdpo.distributed.layout import ParallelLayout, make_layout
from megatron_tgdpo.errors import UserError
from megatron_tgdpo.models.config import check_layout
from megatron_tgdpo.planning.cluster import Cluster
from megatron_tgdpo.planning.job import Job
from megatron_tgdpo.planning.memory import RankMemory, rank_memory
from megatron_tgdpo.planning.step_time import StepTime, step_time
from megatron_tgdpo.planning.traffic import Traffic, traffic


@dataclass(frozen=True)
class Plan:
    """A layout and what it costs.

    Attributes:
        layout: The rank grid.
        recompute: ``train.recompute``.
        memory: Of the fullest rank.
        time: Of a step.
        traffic: Of a step.
        micro_batches: Packs per data rank and step.
        fits: Whether the memory fits a GPU of the cluster, less the reserve.
        warning: What is odd about it, or an empty string.
    """

    layout: ParallelLayout
    recompute: str
    memory: RankMemory
    time: StepTime
    traffic: Traffic
    micro_batches: int
    fits: bool
    warning: str

    @property
    def bubble(self) -> float:
        """The part of the pipeline's time in which the slowest stage waits, as simulated."""
        return self.time.bubble / (self.time.total - self.time.data)


def make_plan(job: Job, cluster: Cluster, layout: ParallelLayout, recompute: str) -> Plan:
    """Computes one plan.

    Raises:
        UserError: A model does not divide by the layout, or a pack not by the tensor ranks.
    """
    check_layout(dict(zip(("policy", "reference", "guide"), job.models, strict=False)), layout)
    if layout.sequence_parallel and job.pack.tokens % layout.tensor:
        raise UserError(
            f"packs of {job.pack.tokens} tokens are not divisible by {layout.tensor} tensor ranks: "
            "change batch.tokens_per_micro_batch, or do without sequence parallelism"
        )
    memory = rank_memory(job.policy, job.frozen, layout, job.pack, recompute)
    return Plan(
        layout=layout,
        recompute=recompute,
        memory=memory,
        time=step_time(job, cluster, layout, recompute),
        traffic=traffic(job, layout, recompute),
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
    """
    plans = []
    for tensor in range(1, cluster.gpus_per_node + 1):
        for pipeline in range(1, job.policy.num_hidden_layers + 1):
            if cluster.gpus_per_node % tensor or cluster.gpus % (tensor * pipeline):
                continue
            layout = make_layout(tensor, pipeline, 1, True, cluster.gpus)
            try:
                candidates = [make_plan(job, cluster, layout, recompute) for recompute in RECOMPUTE_CHOICES]
            except UserError:
                continue
            plans.append(next((plan for plan in candidates if plan.fits), candidates[-1]))
    return sorted(plans, key=lambda plan: (not plan.fits, plan.time.total))
