"""Plans as text."""

from collections.abc import Sequence

from megatron_tgdpo.planning.cluster import Cluster
from megatron_tgdpo.planning.job import Job
from megatron_tgdpo.planning.layouts import Plan
from megatron_tgdpo.planning.memory import GIB, RankMemory


def memory_lines(memory: RankMemory) -> list[str]:
    """Parameters and memory of the fullest rank."""
    parts = {
        "policy weights": memory.weights,
        "gradients (fp32)": memory.gradients,
        "optimizer (fp32)": memory.optimizer,
        "frozen models": memory.frozen,
        "activations": memory.activations,
        "hidden states in flight": memory.carried,
        "workspace": memory.workspace,
        "total": memory.total,
    }
    return [
        f"fullest rank: stage {memory.stage}, parameters policy {memory.policy_parameters:,}, "
        f"frozen {memory.frozen_parameters:,}",
        *(f"  {name:<24} {size / GIB:9.3f} GiB" for name, size in parts.items()),
        f"a save takes {memory.save / GIB:.3f} GiB of host memory on a rank",
    ]


def plan_text(plan: Plan, job: Job, cluster: Cluster) -> str:
    """One plan in full."""
    usable = cluster.gpu_memory_gib - cluster.reserve_gib
    verdict = "fits" if plan.fits else "does NOT fit"
    time, sent = plan.time, plan.traffic
    tokens = job.batch.global_pairs * job.batch.pair_tokens
    on_node = plan.memory.save * min(cluster.gpus_per_node, cluster.gpus) / GIB
    lines = [
        f"{cluster.gpus} GPUs = {plan.layout}, recompute {plan.recompute}",
        *memory_lines(plan.memory),
        f"and at most {on_node:.1f} GiB on a node",
        f"{verdict} {usable:.1f} GiB ({cluster.gpu_memory_gib:g} less {cluster.reserve_gib:g} reserved)",
        f"{plan.micro_batches} packs of {job.pack.tokens} tokens per data rank and step",
        f"pipeline bubble {plan.bubble:.0%}",
        "sent per GPU and step:",
        *(f"  {kind:<24} {getattr(sent, kind) / 1e9:9.2f} GB" for kind in ("tensor", "pipeline", "data")),
        "estimated step:",
        *(
            f"  {part:<24} {getattr(time, part):9.2f} s"
            for part in ("compute", "tensor", "pipeline", "bubble", "data", "total")
        ),
        f"  {'tokens/s per GPU':<24} {tokens / time.total / cluster.gpus:9.0f}",
    ]
    return "\n".join(lines + ([f"warning: {plan.warning}"] if plan.warning else []))


def table(plans: Sequence[Plan]) -> str:
    """One line a plan."""
    lines = [f"{'layout':<30} {'recompute':<10} {'GiB':>7} {'step s':>8} {'packs':>5} {'bubble':>7}  note"]
    for plan in plans:
        note = "" if plan.fits else "does not fit; "
        lines.append(
            f"{plan.layout!s:<30} {plan.recompute:<10} {plan.memory.total / GIB:7.1f} {plan.time.total:8.2f} "
            f"{plan.micro_batches:5d} {plan.bubble:7.0%}  {note}{plan.warning}"
        )
    return "\n".join(lines)
