"""The pipeline schedules beside each other, as text."""

from megatron_tgdpo.distributed.layout import make_layout
from megatron_tgdpo.errors import UserError
from megatron_tgdpo.models.config import check_layout
from megatron_tgdpo.planning.cluster import Cluster
from megatron_tgdpo.planning.job import Job
from megatron_tgdpo.planning.prefetch import plan_prefetch
from megatron_tgdpo.planning.schedule import interleaved, one_f_one_b
from megatron_tgdpo.planning.step_time import stage_costs

_STAGES = (2, 4, 8)
_MICRO_BATCHES = (8, 16, 32, 64)
_CHUNKS = 2


def schedules_table(job: Job, cluster: Cluster, tensor: int, sequence_parallel: bool, recompute: str) -> str:
    """Simulated bubbles of every schedule, and what prefetch takes off a co-located step, for the job's own costs.

    Numbers of stages that do not divide the models are left out.

    Raises:
        UserError: No number of stages divides them.
    """
    lines = [
        f"{'':>11} | {'with frozen models':^34} | {'policy alone (cached)':^24}",
        f"{'stages packs':>11} | {'co-located':>10} {'prefetch':>8} {'shorter step':>14} | {'1F1B':>9} "
        f"{f'interleaved x{_CHUNKS}':>14}",
    ]
    for stages in _STAGES:
        layout = make_layout(tensor, stages, 1, sequence_parallel, tensor * stages)
        try:
            check_layout(dict(zip(("policy", "reference", "guide"), job.models, strict=False)), layout)
        except UserError:
            continue
        costs = tuple(stage_costs(job, cluster, layout, recompute))
        divides = job.policy.num_hidden_layers % (stages * _CHUNKS) == 0
        for packs in _MICRO_BATCHES:
            colocated = one_f_one_b(costs, packs, colocated=True)
            prefetch = plan_prefetch(costs, packs, packs).timeline
            alone = one_f_one_b(costs, packs)
            chunked = f"{interleaved(costs, packs, _CHUNKS).bubble:14.1%}" if divides else f"{'-':>14}"
            gain = 1 - prefetch.step_time / colocated.step_time
            lines.append(
                f"{stages:>6} {packs:>4} | {colocated.bubble:>10.1%} {prefetch.bubble:>8.1%} {gain:>14.1%} | "
                f"{alone.bubble:>9.1%} {chunked}"
            )
    if len(lines) == 2:
        raise UserError(f"none of {', '.join(map(str, _STAGES))} stages divides the models")
    return "\n".join(lines)
