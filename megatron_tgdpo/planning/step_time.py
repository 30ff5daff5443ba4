"""An estimate of a step's time: products at an assumed part of peak, then traffic, nothing overlapped.

Left out: memory-bound operations, the optimizer's arithmetic, launch latencies, and that attention with softcaps or
windows runs far below the assumed efficiency. So it ranks layouts; it does not promise seconds.
"""

from dataclasses import dataclass

from transformers import PretrainedConfig

from megatron_tgdpo.config.constraints import recomputed_modules
from megatron_tgdpo.distributed.layout import ParallelLayout
from megatron_tgdpo.planning.activations import stage_layers
from megatron_tgdpo.planning.cluster import Cluster
from megatron_tgdpo.planning.job import Job
from megatron_tgdpo.planning.model_flops import linear_flops, mlp_flops, query_width, score_flops, shared_expert_flops
from megatron_tgdpo.planning.pipeline_schedule import StageCosts, one_f_one_b
from megatron_tgdpo.planning.traffic import data_bytes, expert_bytes, pipeline_bytes, tensor_bytes


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
    """

    compute: float
    tensor: float
    pipeline: float
    bubble: float
    data: float
    expert: float = 0.0

    @property
    def total(self) -> float:
        return self.compute + self.tensor + self.pipeline + self.bubble + self.data + self.expert


def layer_flops(hf_config: PretrainedConfig, sequence_tokens: float) -> float:
    """FLOP per token of one layer's forward: causal attention is to half the sequence on average."""
    return linear_flops(hf_config) + score_flops(hf_config) * sequence_tokens / 2


@dataclass(frozen=True)
class ModelFlops:
    """FLOP of one pack, of one model and over all tensor ranks.

    Attributes:
        layer_forward: Of a layer.
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


def model_flops(job: Job, number: int, recompute: str) -> ModelFlops:
    """FLOP of one pack.

    The policy's backward costs two forwards, one where its weights are frozen beside an adapter; recomputation one
    more, or attention's alone. Of the log-probs, backward makes the logits again.

    Args:
        job: The models, and what a pack is.
        number: Of the model: 0 is the policy.
        recompute: ``train.recompute``.
    """
    hf_config, tokens = job.models[number], job.pack.tokens
    layer = tokens * layer_flops(hf_config, job.batch.pair_tokens / 2)
    logits = 2 * tokens * job.batch.packed_response_share * hf_config.vocab_size * hf_config.hidden_size
    if number > 0:
        return ModelFlops(layer, 0.0, logits, 0.0)
    # A frozen weight has no gradient to be computed; what adapters compute is little.
    products = 2 if job.sources.trained is None else 1
    backward = products * layer
    modules = recomputed_modules(recompute)
    if recompute == "full":
        backward += layer
    if "core_attn" in modules:
        backward += tokens * query_width(hf_config) * job.batch.pair_tokens
    if modules & {"mlp", "moe"}:
        backward += tokens * mlp_flops(hf_config)
    if "shared_experts" in modules:
        backward += tokens * shared_expert_flops(hf_config)
    return ModelFlops(layer, backward, logits, (products + 1) * logits)


def pack_flops(job: Job, layout: ParallelLayout, recompute: str, stage: int) -> tuple[float, float, float]:
    """FLOP of one pack on one GPU of a stage: policy forward, policy backward, frozen forward.

    The last stage also computes log-probs.
    """
    last = stage == layout.pipeline - 1
    found = []
    for number, hf_config in enumerate(job.models):
        each, count = model_flops(job, number, recompute), len(stage_layers(hf_config, layout.of_model(number), stage))
        forward = count * each.layer_forward + (each.logits_forward if last else 0.0)
        found.append((forward, count * each.layer_backward + (each.logits_backward if last else 0.0)))
    (forward, backward), *frozen = found
    ranks = layout.tensor * layout.context
    return forward / ranks, backward / ranks, sum(each for each, _ in frozen) / ranks


def stage_costs(job: Job, cluster: Cluster, layout: ParallelLayout, recompute: str) -> list[StageCosts]:
    """Seconds of one pack on each stage, for the schedules of ``pipeline_schedule.py``.

    Transfers between stages hold both sides up, so they are part of the passes that send.
    """
    sent = pipeline_bytes(job, layout) / 2 / cluster.bandwidth(2 * layout.tensor * layout.data)
    costs = []
    for stage in range(layout.pipeline):
        flops, sizes = pack_flops(job, layout, recompute, stage), tensor_bytes(job, layout, recompute, stage)
        seconds = [
            flop / cluster.flops
            + size / cluster.bandwidth(layout.tensor)
            + exchanged / cluster.bandwidth(_span(layout))
            for flop, size, exchanged in zip(flops, sizes, expert_bytes(job, layout, recompute, stage), strict=True)
        ]
        costs.append(StageCosts(seconds[0] + sent, seconds[1] + sent, seconds[2]))
    return costs


def _span(layout: ParallelLayout) -> int:
    """Ranks, one after another, among which tokens travel for experts."""
    return layout.expert * layout.expert_shards


def step_time(job: Job, cluster: Cluster, layout: ParallelLayout, recompute: str) -> StepTime:
    """Of one optimizer step; the bubble is that of the simulated co-located 1F1B schedule.

    megatron-core numbers ranks tensor first, then data, then pipeline: tensor groups lie inside a node where they can,
    stages lie tensor x data ranks apart.
    """
    packs, model = job.micro_batches(layout), layout.tensor * layout.data
    compute, tensor, expert = max(
        (
            (
                sum(pack_flops(job, layout, recompute, stage)) / cluster.flops,
                sum(tensor_bytes(job, layout, recompute, stage)) / cluster.bandwidth(layout.tensor),
                sum(expert_bytes(job, layout, recompute, stage)) / cluster.bandwidth(_span(layout)),
            )
            for stage in range(layout.pipeline)
        ),
        key=sum,
    )
    pipeline = pipeline_bytes(job, layout) / cluster.bandwidth(2 * model)
    timeline = one_f_one_b(stage_costs(job, cluster, layout, recompute), packs, colocated=True)
    return StepTime(
        compute=packs * compute,
        tensor=packs * tensor,
        pipeline=packs * pipeline,
        bubble=max(0.0, timeline.step_time - packs * (compute + tensor + pipeline + expert)),
        data=data_bytes(job, layout) / cluster.bandwidth(model),
        expert=packs * expert,
    )
