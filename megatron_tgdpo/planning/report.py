"""Plans, and the pipeline schedules compared, as text."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from megatron_tgdpo.distributed.layout import make_layout
from megatron_tgdpo.errors import UserError
from megatron_tgdpo.models.hf_weights.mapping import Experts, active_parameter_count, parameter_count
from megatron_tgdpo.planning.cluster import Cluster
from megatron_tgdpo.planning.job import Job
from megatron_tgdpo.planning.layouts import Plan, make_plan, possible_savings
from megatron_tgdpo.planning.memory import GIB, RankMemory
from megatron_tgdpo.planning.model_flops import step_flops, step_models
from megatron_tgdpo.planning.pipeline_layers import fit_layout
from megatron_tgdpo.planning.pipeline_schedule import interleaved, one_f_one_b
from megatron_tgdpo.planning.prefetch import plan_prefetch
from megatron_tgdpo.planning.step_time import stage_costs

_STAGES = (2, 4, 8)
_MICRO_BATCHES = (8, 16, 32, 64)
_CHUNKS = 2
# From what part of the memory on it is said what could be saved.
_CLOSE = 0.93


def memory_lines(memory: RankMemory) -> list[str]:
    """Parameters and memory of the fullest rank."""
    parts = {
        "policy weights": memory.weights,
        "gradients (fp32)": memory.gradients,
        "optimizer": memory.optimizer,
        "frozen models": memory.frozen,
        "activations": memory.activations,
        "hidden states in flight": memory.carried,
        "workspace": memory.workspace,
        "total": memory.total,
    }
    lora = memory.trained_parameters != memory.policy_parameters
    trained = f" (of which {memory.trained_parameters:,} train)" if lora else ""
    return [
        f"fullest rank: stage {memory.stage}, parameters policy {memory.policy_parameters:,}{trained}, "
        f"frozen {memory.frozen_parameters:,}",
        *(f"  {name:<24} {size / GIB:9.3f} GiB" for name, size in parts.items()),
        f"a save takes {memory.save / GIB:.3f} GiB of host memory on a rank",
    ]


def plan_text(plan: Plan, job: Job, cluster: Cluster) -> str:
    """One plan in full."""
    usable = cluster.gpu_memory_gib - cluster.reserve_gib
    verdict = "fits" if plan.fits else "does NOT fit"
    time, sent = plan.time, plan.traffic
    tokens = job.batch.global_pairs * job.batch.packed_pair_tokens
    tflops = model_tflop(job) / time.total / cluster.gpus
    rounded = ""
    if plan.pack_tokens != job.pack.tokens:
        rounded = f" (not {job.pack.tokens}, the default: tensor and context ranks must divide them)"
    on_node = plan.memory.save * min(cluster.gpus_per_node, cluster.gpus) / GIB
    exchanged = tuple(kind for kind in ("expert", "context") if getattr(sent, kind))
    others = tuple(kind for kind in ("memory", "host", "optimizer") if getattr(time, kind))
    saved = f", {plan.savings}" if plan.savings.keys else ""
    lines = [
        f"{cluster.gpus} GPUs = {plan.layout}, recompute {plan.recompute}{saved}",
        *_active(job),
        *([f"stages: {plan.layout.describe_layers()}"] if plan.layout.layers else []),
        *memory_lines(plan.memory),
        f"and at most {on_node:.1f} GiB on a node",
        f"{verdict} {usable:.1f} GiB ({cluster.gpu_memory_gib:g} less {cluster.reserve_gib:g} reserved)",
        *_close(plan, job, cluster),
        f"{plan.micro_batches} packs of {plan.pack_tokens} tokens per data rank and step{rounded}",
        f"pipeline bubble {plan.bubble:.0%}",
        "sent per GPU and step:",
        *(f"  {kind:<24} {getattr(sent, kind) / 1e9:9.2f} GB" for kind in ("tensor", *exchanged, "pipeline", "data")),
        "estimated step:",
        *(
            f"  {part:<24} {getattr(time, part):9.2f} s"
            for part in ("compute", "tensor", *exchanged, *others, "pipeline", "bubble", "data", "total")
        ),
        f"  {'tokens/s per GPU':<24} {tokens / time.total / cluster.gpus:9.0f}",
        f"  {'pairs/s per GPU':<24} {job.batch.global_pairs / time.total / cluster.gpus:9.3g}",
        f"  {'model TFLOP/s per GPU':<24} {tflops:9.0f} (MFU {tflops / cluster.peak_tflops:.2f})",
    ]
    return "\n".join(lines + ([f"warning: {plan.warning}"] if plan.warning else []))


def model_tflop(job: Job) -> float:
    """Model TFLOP of a step, as ``perf/tflops_per_gpu`` counts them, of pairs that are all of the mean length."""
    batch = job.batch
    response = round(batch.pair_tokens * batch.response_share / 2)
    lengths = np.array([[round(batch.pair_tokens / 2) - response, response, response]])
    models = step_models(job.policy, job.frozen, adapter=job.sources.trained is not None)
    of_pair = step_flops(models, lengths, 2 * response, shared_prompts=batch.shared_prompts, chosen_only=False)
    return batch.global_pairs * of_pair / 1e12


def _close(plan: Plan, job: Job, cluster: Cluster) -> list[str]:
    """What could be saved where little room is left, or none."""
    usable = (cluster.gpu_memory_gib - cluster.reserve_gib) * GIB
    if plan.memory.total < _CLOSE * usable:
        return []
    less = [
        (each, make_plan(job, cluster, replace(plan.layout, layers=()), plan.recompute, savings=each).memory.total)
        for each in possible_savings(job)
        if each != plan.savings
    ]
    helping = [f"{each} ({total / GIB:.1f} GiB)" for each, total in less if total < plan.memory.total]
    where = "" if plan.memory.total > usable else "little room is left; "
    return [f"{where}with less: {'; '.join(helping)}"] if helping else []


def _active(job: Job) -> list[str]:
    """How much of a policy with experts a token meets."""
    if Experts.of(job.policy) is None:
        return []
    return [
        f"policy: {parameter_count(job.policy):,} parameters, of which a token meets "
        f"{active_parameter_count(job.policy):,}; experts are taken to get as many tokens each"
    ]


def table(plans: Sequence[Plan]) -> str:
    """One line a plan."""
    width = max([30, *(len(str(plan.layout)) for plan in plans)])
    lines = [f"{'layout':<{width}} {'recompute':<10} {'GiB':>7} {'step s':>8} {'packs':>5} {'bubble':>7}  note"]
    for plan in plans:
        note = "; ".join(filter(None, ("" if plan.fits else "does not fit", str(plan.savings), plan.warning)))
        lines.append(
            f"{plan.layout!s:<{width}} {plan.recompute:<10} {plan.memory.total / GIB:7.1f} {plan.time.total:8.2f} "
            f"{plan.micro_batches:5d} {plan.bubble:7.0%}  {note}".rstrip()
        )
    return "\n".join(lines)


def schedules_table(job: Job, cluster: Cluster, tensor: int, sequence_parallel: bool, recompute: str) -> str:
    """Simulated bubbles of every schedule, and what prefetch takes off a co-located step, for the job's own costs.

    Numbers of stages beyond the layers of a model are left out.

    Raises:
        UserError: All of them are.
    """
    chunks = f"interleaved x{_CHUNKS}"
    lines = [
        f"{'':>11} | {'with frozen models':^49} | {'policy alone (cached)':^24}",
        f"{'stages packs':>11} | {'co-located':>10} {chunks:>14} {'prefetch':>8} {'shorter step':>14} | {'1F1B':>9} "
        f"{chunks:>14}",
    ]
    for stages in _STAGES:
        layout = make_layout(tensor, stages, 1, sequence_parallel, tensor * stages)
        try:
            layout = fit_layout(job, layout, recompute)
        except UserError:
            continue
        costs = tuple(stage_costs(job, cluster, layout, recompute))
        divide = [model.num_hidden_layers >= stages * _CHUNKS for model in job.models]
        for packs in _MICRO_BATCHES:
            colocated = one_f_one_b(costs, packs, colocated=True)
            prefetch = plan_prefetch(costs, packs, packs).timeline
            alone = one_f_one_b(costs, packs)
            whole, policy = (
                f"{interleaved(costs, packs, _CHUNKS, colocated=colocated).bubble:14.1%}" if enough else f"{'-':>14}"
                for colocated, enough in ((True, all(divide)), (False, divide[0]))
            )
            gain = 1 - prefetch.step_time / colocated.step_time
            lines.append(
                f"{stages:>6} {packs:>4} | {colocated.bubble:>10.1%} {whole} {prefetch.bubble:>8.1%} {gain:>14.1%} | "
                f"{alone.bubble:>9.1%} {policy}"
            )
    if len(lines) == 2:
        raise UserError(f"a model has not the layers for any of {', '.join(map(str, _STAGES))} stages")
    return "\n".join(lines)
