"""Bytes that one GPU sends, by kind of parallelism.

Collectives are counted as rings: over n ranks an all-gather or a reduce-scatter of a tensor sends (n - 1) / n of it
from each rank, an all-reduce both.
"""

from dataclasses import dataclass

from transformers import PretrainedConfig

from megatron_tgdpo.distributed.layout import ParallelLayout
from megatron_tgdpo.models.hf_weights.mapping import Experts
from megatron_tgdpo.planning.job import Job
from megatron_tgdpo.planning.memory import expert_parameters, trained_parameters


@dataclass(frozen=True)
class Traffic:
    """Bytes sent by a GPU of a middle stage in one optimizer step.

    Attributes:
        tensor: All-reduces, or under sequence parallelism all-gathers and reduce-scatters, within layers.
        pipeline: Hidden states of all models forwards, the policy's gradient backwards.
        data: Reduce-scatter of the fp32 gradients and all-gather of the new weights.
        expert: Tokens to their experts and back.
    """

    tensor: float
    pipeline: float
    data: float
    expert: float = 0.0


def ring(ranks: int) -> float:
    """The part of a tensor that each of ``ranks`` sends in an all-gather or a reduce-scatter."""
    return (ranks - 1) / ranks


def tensor_bytes(job: Job, layout: ParallelLayout, recompute: str) -> tuple[float, float, float]:
    """Bytes of one pack and one stage: policy forward, policy backward, frozen forward.

    A layer's forward takes four ring passes over the hidden states of the pack: an all-gather and a reduce-scatter for
    attention and for the MLP, or one all-reduce each; with experts two, and what :func:`expert_bytes` counts. So does
    its backward; under sequence parallelism two more, as the linears gather their inputs again for the gradients of
    their weights.
    """

    def forward(hf_config: PretrainedConfig) -> float:
        layers = hf_config.num_hidden_layers // layout.pipeline
        result: float = (
            (4 if Experts.of(hf_config) is None else 2)
            * layers
            * ring(layout.tensor)
            * job.pack.tokens
            * hf_config.hidden_size
            * job.pack.dtype_bytes
        )
        return result

    policy = forward(job.policy)
    backward = (1.5 if layout.sequence_parallel else 1.0) + (1.0 if recompute == "full" else 0.0)
    return policy, backward * policy, sum(forward(hf_config) for hf_config in job.frozen)


def expert_bytes(job: Job, layout: ParallelLayout, recompute: str) -> tuple[float, float, float]:
    """Bytes of one pack and one stage that a rank sends for experts: policy forward, policy backward, frozen forward.

    A layer's forward sends every token's hidden state to each of its experts, of which all ranks have as many, and gets
    them back; the ranks that share an expert gather each other's tokens, and scatter what they add up. So does its
    backward.
    """

    def forward(hf_config: PretrainedConfig) -> float:
        experts = Experts.of(hf_config)
        if experts is None:
            return 0.0
        layers = hf_config.num_hidden_layers // layout.pipeline
        local = job.pack.tokens / layout.tensor * experts.top_k * hf_config.hidden_size * job.pack.dtype_bytes
        gathered = (layout.expert_shards - 1) * local
        return 2 * layers * (ring(layout.expert) * local + gathered)

    policy = forward(job.policy)
    return policy, (2 if recompute == "full" else 1) * policy, sum(forward(hf_config) for hf_config in job.frozen)


def pipeline_bytes(job: Job, layout: ParallelLayout) -> float:
    """Bytes of one pack that a middle stage sends to both neighbours; nothing with one stage."""
    if layout.pipeline == 1:
        return 0.0
    local = job.pack.tokens / (layout.tensor if layout.sequence_parallel else 1)
    result: float = (
        local * job.pack.dtype_bytes * (sum(model.hidden_size for model in job.models) + job.policy.hidden_size)
    )
    return result


def data_bytes(job: Job, layout: ParallelLayout) -> float:
    """Bytes of one step, on the stage with most parameters."""
    lora = job.sources.trained
    stages, size = {0, layout.pipeline - 1}, 4 + job.pack.dtype_bytes

    def of_stage(stage: int) -> float:
        trained = trained_parameters(job.policy, layout, stage, lora)
        experts = expert_parameters(job.policy, layout, stage) if lora is None and layout.splits_experts else 0
        return ring(layout.data) * (trained - experts) * size + ring(layout.expert_data) * experts * size

    return max(map(of_stage, stages))


def traffic(job: Job, layout: ParallelLayout, recompute: str) -> Traffic:
    """All of one step."""
    packs = job.micro_batches(layout)
    return Traffic(
        tensor=packs * sum(tensor_bytes(job, layout, recompute)),
        pipeline=packs * pipeline_bytes(job, layout),
        data=data_bytes(job, layout),
        expert=packs * sum(expert_bytes(job, layout, recompute)),
    )
