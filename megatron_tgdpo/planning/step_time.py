"""An estimate of a step's time: products at an assumed part of peak, then traffic, nothing overlapped.

Memory-bound operations and the optimizer's arithmetic are part of the products' efficiency, or counted where the
cluster says how fast its memory is. Left out: launch latencies, and that attention with softcaps or windows runs far
below the assumed efficiency. So it ranks layouts; it does not promise seconds.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields

from transformers import PretrainedConfig

from megatron_tgdpo.config.constraints import recomputed_modules
from megatron_tgdpo.distributed.layout import ParallelLayout
from megatron_tgdpo.models.hf_weights.mapping import Experts, kinds_of_layers
from megatron_tgdpo.planning.activations import stage_layers
from megatron_tgdpo.planning.cluster import Cluster
from megatron_tgdpo.planning.job import Job
from megatron_tgdpo.planning.memory import resident_parameters, stage_parameters
from megatron_tgdpo.planning.model_flops import linear_flops, mlp_flops, query_width, score_flops, shared_expert_flops
from megatron_tgdpo.planning.moved_bytes import moved_bytes, optimizer_bytes
from megatron_tgdpo.planning.pipeline_schedule import StageCosts, step_seconds
from megatron_tgdpo.planning.traffic import context_bytes, data_bytes, expert_bytes, pipeline_bytes, tensor_bytes


@dataclass(frozen=True)
class StepTime:
    """Seconds of a step.

    Attributes:
        compute: Of the slowest stage's products, over all its packs.
        tensor: Of its tensor-parallel traffic.
        pipeline: Of traffic between stages.
        bubble: That a stage waits for the pipeline to fill and drain.
        data: Of reducing gradients and gathering weights.
        expert: Of exchanging tokens for experts.
        context: Of exchanging keys and values among the ranks that share a sequence.
        memory: Of what stands between products: norms, activations, log-probs. 0 where that is part of the products'
            efficiency.
        host: Of waiting for layers of frozen models that ``offload.frozen`` brings.
        optimizer: Of clipping, Adam and the gradients' zeroing, in the same way.
    """

    compute: float
    tensor: float
    pipeline: float
    bubble: float
    data: float
    expert: float = 0.0
    context: float = 0.0
    memory: float = 0.0
    host: float = 0.0
    optimizer: float = 0.0

    @property
    def total(self) -> float:
        result: float = sum(getattr(self, field.name) for field in fields(self))
        return result


def layer_flops(hf_config: PretrainedConfig, sequence_tokens: float, layer: int = 0) -> float:
    """FLOP per token of one layer's forward: causal attention is to half the sequence on average."""
    return linear_flops(hf_config, layer) + score_flops(hf_config) * sequence_tokens / 2


@dataclass(frozen=True)
class ModelFlops:
    """FLOP of one pack, of one model and over all tensor ranks.

    Attributes:
        layer_forward: Of a layer; where some have experts, of one with them or of one without.
        layer_backward: The same, backwards; 0 of a frozen model.
        logits_forward: Of the log-probs.
        logits_backward: The same, backwards.
    """

    layer_forward: float
    layer_backward: float
    logits_forward: float
    logits_backward: float

    @property
    def layer(self) -> float:
        return self.layer_forward + self.layer_backward

    @property
    def logits(self) -> float:
        return self.logits_forward + self.logits_backward


def model_flops(job: Job, number: int, recompute: str, layer: int = 0) -> ModelFlops:
    """FLOP of one pack.

    The policy's backward costs two forwards, one where its weights are frozen beside an adapter; recomputation one
    more, or attention's alone. Of the log-probs, backward makes the logits again.

    Args:
        job: The models, and what a pack is.
        number: Of the model: 0 is the policy.
        recompute: ``train.recompute``.
        layer: Counted from 0; layers may differ in having experts.
    """
    hf_config, tokens = job.models[number], job.pack.tokens
    forward = tokens * layer_flops(hf_config, job.batch.pair_tokens / 2, layer)
    logits = 2 * tokens * job.batch.packed_response_share * hf_config.vocab_size * hf_config.hidden_size
    if number > 0:
        return ModelFlops(forward, 0.0, logits, 0.0)
    # A frozen weight has no gradient to be computed; what adapters compute is little.
    products = 2 if job.sources.trained is None else 1
    backward = products * forward
    modules = recomputed_modules(recompute)
    if recompute == "full":
        backward += forward
    if "core_attn" in modules:
        backward += tokens * query_width(hf_config) * job.batch.pair_tokens
    if ("mlp" if Experts.of_layer(hf_config, layer) is None else "moe") in modules:
        backward += tokens * mlp_flops(hf_config, layer)
    if "shared_experts" in modules:
        backward += tokens * shared_expert_flops(hf_config, layer)
    return ModelFlops(forward, backward, logits, (products + 1) * logits)


def pack_flops(job: Job, layout: ParallelLayout, recompute: str, stage: int) -> tuple[float, float, float]:
    """FLOP of one pack on one GPU of a stage: policy forward, policy backward, frozen forward.

    The last stage also computes log-probs.
    """
    last = stage == layout.pipeline - 1
    found = []
    for number, hf_config in enumerate(job.models):
        counts = kinds_of_layers(hf_config, stage_layers(hf_config, layout.of_model(number), stage))
        kinds = [(model_flops(job, number, recompute, layer), count) for layer, count in counts.items()]
        ends, _ = kinds[0]
        forward = sum(count * each.layer_forward for each, count in kinds) + (ends.logits_forward if last else 0.0)
        backward = sum(count * each.layer_backward for each, count in kinds) + (ends.logits_backward if last else 0.0)
        found.append((forward, backward))
    (forward, backward), *frozen = found
    ranks = layout.tensor * layout.context
    return forward / ranks, backward / ranks, sum(each for each, _ in frozen) / ranks


def pass_seconds(
    job: Job, cluster: Cluster, layout: ParallelLayout, recompute: str, stage: int, *, offloaded: bool = False
) -> dict[str, tuple[float, float, float]]:
    """Of one pack on one GPU of a stage, by kind of work: policy forward, policy backward, frozen forward.

    A frozen layer that waits in host memory comes while the one before runs, and is waited for if it takes longer.
    """
    counted = {
        "tensor": (tensor_bytes, cluster.bandwidth(layout.tensor)),
        "context": (context_bytes, cluster.bandwidth(layout.tensor * layout.context)),
        "expert": (expert_bytes, cluster.bandwidth(layout.expert * layout.expert_shards)),
    }
    if cluster.memory_gbytes:
        counted["memory"] = moved_bytes, cluster.memory_bandwidth

    def seconds(amounts: tuple[float, float, float], rate: float) -> tuple[float, float, float]:
        forward, backward, frozen = amounts
        return forward / rate, backward / rate, frozen / rate

    found = {"compute": seconds(pack_flops(job, layout, recompute, stage), cluster.flops)}
    found |= {kind: seconds(count(job, layout, recompute, stage), rate) for kind, (count, rate) in counted.items()}
    copied = 0
    if offloaded:
        alone = [not source.shared for source in job.sources.frozen] or [True] * len(job.frozen)
        for number, config in enumerate(job.frozen, 1):
            own = layout.of_model(number)
            away = stage_parameters(config, own, stage) - resident_parameters(config, own, stage)
            copied += alone[number - 1] * away * job.pack.dtype_bytes
    late = copied / cluster.host_bandwidth - sum(frozen for _, _, frozen in found.values())
    return found | {"host": (0.0, 0.0, max(0.0, late))}


def stage_costs(
    job: Job, cluster: Cluster, layout: ParallelLayout, recompute: str, *, offloaded: bool = False
) -> list[StageCosts]:
    """Seconds of one pack on each stage, for the schedules of ``pipeline_schedule.py``.

    Transfers between stages hold both sides up, so they are part of the passes that send.
    """
    passes = [
        pass_seconds(job, cluster, layout, recompute, stage, offloaded=offloaded) for stage in range(layout.pipeline)
    ]
    return _costs(passes, pipeline_bytes(job, layout) / 2 / _between_stages(cluster, layout))


def _costs(passes: Sequence[dict[str, tuple[float, float, float]]], sent: float) -> list[StageCosts]:
    costs = []
    for kinds in passes:
        forward, backward, frozen = map(sum, zip(*kinds.values(), strict=True))
        costs.append(StageCosts(forward + sent, backward + sent, frozen))
    return costs


def _between_stages(cluster: Cluster, layout: ParallelLayout) -> float:
    """Bytes/s to a neighbour in the pipeline, all other ranks of a stage away."""
    return cluster.bandwidth(2 * layout.world_size // layout.pipeline)


def step_time(
    job: Job, cluster: Cluster, layout: ParallelLayout, recompute: str, *, offloaded: bool = False
) -> StepTime:
    """Of one optimizer step; the bubble is that of the simulated co-located 1F1B or interleaved schedule.

    megatron-core numbers ranks tensor first, then context, then data, then pipeline: tensor groups lie inside a node
    where they can, stages lie tensor x context x data ranks apart.
    """
    packs, sent = job.micro_batches(layout), pipeline_bytes(job, layout) / _between_stages(cluster, layout)
    passes = [
        pass_seconds(job, cluster, layout, recompute, stage, offloaded=offloaded) for stage in range(layout.pipeline)
    ]
    busy = [{kind: packs * sum(each) for kind, each in kinds.items()} for kinds in passes]
    kinds = max(busy, key=lambda each: sum(each.values()))
    whole = step_seconds(_costs(passes, sent / 2), packs, layout.virtual)
    return StepTime(
        **kinds,
        pipeline=packs * sent,
        bubble=max(0.0, whole - sum(kinds.values()) - packs * sent),
        data=data_bytes(job, layout) / cluster.bandwidth(layout.world_size // layout.pipeline),
        optimizer=optimizer_bytes(job, layout) / cluster.memory_bandwidth if cluster.memory_gbytes else 0.0,
    )
