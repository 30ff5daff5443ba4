"""An estimate of a step's time: products at an assumed part of peak, then traffic, nothing overlapped.

Left out: memory-bound operations, the optimizer's arithmetic, launch latencies, and that attention with softcaps or
windows runs far below the assumed efficiency. So it ranks layouts; it does not promise seconds.
"""

from dataclasses import dataclass

from transformers import PretrainedConfig

from megatron_tgdpo.distributed.layout import ParallelLayout
from megatron_tgdpo.models.hf_weights.mapping import Experts, Heads
from megatron_tgdpo.planning.cluster import Cluster
from megatron_tgdpo.planning.job import Job
from megatron_tgdpo.planning.pipeline_schedule import StageCosts, one_f_one_b
from megatron_tgdpo.planning.traffic import data_bytes, expert_bytes, pipeline_bytes, tensor_bytes


@dataclass(frozen=True)
class StepTime:
    """Seconds of a step.

    Attributes:
        compute: Of the slowest stage's products, over all its packs.
        tensor: Of tensor-parallel traffic.
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
    """FLOP per token of one layer's forward: two for each weight that it meets, and causal attention to half the
    sequence on average.

    Source: Narayanan et al. 2021 (arXiv 2104.04473, appendix), with grouped-query attention and a gated MLP.
    """
    heads, hidden = Heads.of(hf_config), hf_config.hidden_size
    query = heads.groups * heads.queries_per_group * heads.size
    experts = Experts.of(hf_config)
    mlp = 3 * hf_config.intermediate_size if experts is None else 3 * experts.top_k * experts.size + experts.count
    weights = hidden * (2 * query + 2 * heads.groups * heads.size + mlp)
    result: float = 2 * weights + 2 * query * sequence_tokens
    return result


def pack_flops(job: Job, layout: ParallelLayout, recompute: str, stage: int) -> tuple[float, float, float]:
    """FLOP of one pack on one GPU of a stage: policy forward, policy backward, frozen forward.

    The last stage also computes log-probs. The policy's backward costs two forwards, one where its weights are frozen
    beside an adapter; recomputation one more, or
    attention's alone. Of the log-probs, backward makes the logits again.
    """
    last = stage == layout.pipeline - 1
    # A frozen weight has no gradient to be computed; what adapters compute is little.
    products = 2 if job.sources.trained is None else 1

    def layers(hf_config: PretrainedConfig) -> float:
        count = hf_config.num_hidden_layers // layout.pipeline
        result: float = count * job.pack.tokens * layer_flops(hf_config, job.batch.pair_tokens / 2)
        return result

    def logits(hf_config: PretrainedConfig) -> float:
        if not last:
            return 0.0
        result: float = (
            2 * job.pack.tokens * job.batch.packed_response_share * hf_config.vocab_size * hf_config.hidden_size
        )
        return result

    backward = products * layers(job.policy) + (products + 1) * logits(job.policy)
    if recompute == "full":
        backward += layers(job.policy)
    elif recompute == "selective":
        heads = Heads.of(job.policy)
        query = heads.groups * heads.queries_per_group * heads.size
        count = job.policy.num_hidden_layers // layout.pipeline
        backward += count * job.pack.tokens * query * job.batch.pair_tokens
    forward = layers(job.policy) + logits(job.policy)
    frozen = sum(layers(config) + logits(config) for config in job.frozen)
    return forward / layout.tensor, backward / layout.tensor, frozen / layout.tensor


def stage_costs(job: Job, cluster: Cluster, layout: ParallelLayout, recompute: str) -> list[StageCosts]:
    """Seconds of one pack on each stage, for the schedules of ``pipeline_schedule.py``.

    Transfers between stages hold both sides up, so they are part of the passes that send.
    """
    within = tensor_bytes(job, layout, recompute)
    exchanged = [size / cluster.bandwidth(_span(layout)) for size in expert_bytes(job, layout, recompute)]
    sent = pipeline_bytes(job, layout) / 2 / cluster.bandwidth(2 * layout.tensor * layout.data)
    costs = []
    for stage in range(layout.pipeline):
        flops = pack_flops(job, layout, recompute, stage)
        seconds = [
            flop / cluster.flops + size / cluster.bandwidth(layout.tensor) + more
            for flop, size, more in zip(flops, within, exchanged, strict=True)
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
    compute = sum(pack_flops(job, layout, recompute, layout.pipeline - 1)) / cluster.flops
    tensor = sum(tensor_bytes(job, layout, recompute)) / cluster.bandwidth(layout.tensor)
    expert = sum(expert_bytes(job, layout, recompute)) / cluster.bandwidth(_span(layout))
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
