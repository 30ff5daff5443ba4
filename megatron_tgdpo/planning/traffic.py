"""Bytes that one GPU sends, by kind of parallelism.

Collectives are counted as rings: over n ranks an all-gather or a reduce-scatter of a tensor sends (n - 1) / n of it
from each rank, an all-reduce both.
"""

from dataclasses import dataclass

from transformers import PretrainedConfig

from megatron_tgdpo.config.constraints import recomputed_modules
from megatron_tgdpo.distributed.layout import ParallelLayout
from megatron_tgdpo.models.families import settings_of
from megatron_tgdpo.models.families.latent import LatentSizes
from megatron_tgdpo.models.hf_weights.adapter_layout import Lora, adapted_parts, fused_linears
from megatron_tgdpo.models.hf_weights.mapping import Experts, kinds_of_layers
from megatron_tgdpo.planning.activations import LayerWidths, stage_layers
from megatron_tgdpo.planning.job import Job
from megatron_tgdpo.planning.memory import fullest_stages, trained_of_experts, trained_parameters


@dataclass(frozen=True)
class Traffic:
    """Bytes sent by a GPU in one optimizer step, of the stage that sends most of the kind.

    Attributes:
        tensor: All-reduces, or under sequence parallelism all-gathers and reduce-scatters, within layers.
        pipeline: Hidden states of all models forwards, the policy's gradient backwards.
        data: Reduce-scatter of the fp32 gradients and all-gather of the new weights.
        expert: Tokens to their experts and back.
        context: Keys and values of a sequence to the ranks that share it, and their gradients back.
    """

    tensor: float
    pipeline: float
    data: float
    expert: float = 0.0
    context: float = 0.0


def ring(ranks: int) -> float:
    """The part of a tensor that each of ``ranks`` sends in an all-gather or a reduce-scatter."""
    return (ranks - 1) / ranks


def local_tokens(job: Job, layout: ParallelLayout) -> float:
    """Tokens of a pack on one of its context ranks."""
    return job.pack.tokens / layout.context


def context_bytes(job: Job, layout: ParallelLayout, recompute: str, stage: int) -> tuple[float, float, float]:
    """Bytes of one pack and one stage: policy forward, policy backward, frozen forward.

    A layer's forward gathers the keys and values of the whole pack, its backward scatters what their gradients add up
    to; with recomputation, of attention too, it gathers them again (``models/attention/base.py``).
    """

    def forward(number: int, hf_config: PretrainedConfig) -> float:
        layers = len(stage_layers(hf_config, layout.of_model(number), stage))
        width = LayerWidths.of(hf_config, layout)
        keys = width.key + width.value
        return layers * ring(layout.context) * job.pack.tokens * keys * job.pack.dtype_bytes

    policy, *frozen = (forward(number, hf_config) for number, hf_config in enumerate(job.models))
    again = recompute == "full" or "core_attn" in recomputed_modules(recompute)
    return policy, (2 if again else 1) * policy, sum(frozen)


def tensor_bytes(job: Job, layout: ParallelLayout, recompute: str, stage: int) -> tuple[float, float, float]:
    """Bytes of one pack and one stage: policy forward, policy backward, frozen forward.

    A layer's forward takes four ring passes over the hidden states of the pack: an all-gather and a reduce-scatter for
    attention and for the MLP, or one all-reduce each; with experts two, and what :func:`expert_bytes` counts. So does
    its backward; under sequence parallelism two more, as the linears gather their inputs again for the gradients of
    their weights, if these train. An adapter adds a pass over what each of its As made, forward and backward, or both
    in one of them.
    """
    sequence_parallel = layout.sequence_parallel

    def forward(number: int, hf_config: PretrainedConfig) -> tuple[float, float]:
        """Of all layers, and of their MLPs alone."""
        kinds = kinds_of_layers(hf_config, stage_layers(hf_config, layout.of_model(number), stage))
        layers = sum(kinds.values())
        dense = sum(count for layer, count in kinds.items() if Experts.of_layer(hf_config, layer) is None)
        each = ring(layout.tensor) * local_tokens(job, layout) * job.pack.dtype_bytes
        hidden = hf_config.hidden_size
        latent: LatentSizes | None = settings_of(hf_config).get("latent")
        # Of latent attention the all-gather is of the small vectors; of hidden states, too, where queries come of them.
        first = hidden if latent is None else (latent.query_rank or hidden) + latent.rank + latent.rotated
        return (layers * (first + hidden) + dense * 2 * hidden) * each, dense * 2 * hidden * each

    def adapter(number: int, hf_config: PretrainedConfig, lora: Lora | None) -> tuple[float, float]:
        """Of forward and of backward."""
        if lora is None:
            return 0.0, 0.0
        kinds = kinds_of_layers(hf_config, stage_layers(hf_config, layout.of_model(number), stage))
        # What those of experts made is not exchanged.
        adapted = [
            (fused, count)
            for layer, count in kinds.items()
            for fused in fused_linears(hf_config, layer)
            if not (fused.experts or fused.replicated) and any(adapted_parts(fused, lora))
        ]
        sizes = [
            sum(count * len(fused.parts) for fused, count in adapted if fused.row_parallel == row)
            for row in (False, True)
        ]
        columns, rows = (
            ring(layout.tensor) * local_tokens(job, layout) * size * lora.rank * job.pack.dtype_bytes for size in sizes
        )
        return (columns + rows, columns + rows) if sequence_parallel else (2 * rows, 2 * columns)

    trained = job.sources.trained
    policy, policy_mlp = forward(0, job.policy)
    frozen = [forward(number, hf_config)[0] for number, hf_config in enumerate(job.frozen, 1)]
    backward = (1.5 if sequence_parallel and trained is None else 1.0) * policy
    added, added_backwards = adapter(0, job.policy, trained)
    if recompute == "full":
        backward += policy + added
    elif "mlp" in recomputed_modules(recompute):
        backward += policy_mlp
    frozen += [
        adapter(number, hf_config, source.adapter)[0]
        for number, (hf_config, source) in enumerate(zip(job.frozen, job.sources.frozen, strict=False), 1)
    ]
    return policy + added, backward + added_backwards, sum(frozen)


def expert_bytes(job: Job, layout: ParallelLayout, recompute: str, stage: int) -> tuple[float, float, float]:
    """Bytes of one pack and one stage that a rank sends for experts: policy forward, policy backward, frozen forward.

    A layer's forward sends every token's hidden state to each of its experts, of which all ranks have as many, and gets
    them back; the ranks that share an expert gather each other's tokens, and scatter what they add up. So does its
    backward.
    """

    def forward(number: int, hf_config: PretrainedConfig) -> float:
        experts = Experts.of(hf_config)
        if experts is None:
            return 0.0
        kinds = kinds_of_layers(hf_config, stage_layers(hf_config, layout.of_model(number), stage))
        layers = sum(count for layer, count in kinds.items() if Experts.of_layer(hf_config, layer) is not None)
        local = local_tokens(job, layout) / layout.tensor * experts.top_k * hf_config.hidden_size * job.pack.dtype_bytes
        gathered = (layout.expert_shards - 1) * local
        sent: float = 2 * layers * (ring(layout.expert) * local + gathered)
        return sent

    policy, *frozen = (forward(number, hf_config) for number, hf_config in enumerate(job.models))
    again = recompute == "full" or "moe" in recomputed_modules(recompute)
    return policy, (2 if again else 1) * policy, sum(frozen)


def pipeline_bytes(job: Job, layout: ParallelLayout) -> float:
    """Bytes of one pack that a middle stage sends to both neighbours, each chunk its own; nothing with one stage."""
    if layout.pipeline == 1:
        return 0.0
    local = local_tokens(job, layout) / (layout.tensor if layout.sequence_parallel else 1)
    result: float = (
        local
        * layout.virtual
        * job.pack.dtype_bytes
        * (sum(model.hidden_size for model in job.models) + job.policy.hidden_size)
    )
    return result


def data_bytes(job: Job, layout: ParallelLayout) -> float:
    """Bytes of one step, on the stage with most parameters; context ranks share gradients and weights, too."""
    lora = job.sources.trained
    size = 4 + job.pack.dtype_bytes

    def of_stage(stage: int) -> float:
        trained = trained_parameters(job.policy, layout, stage, lora)
        experts = trained_of_experts(job.policy, layout, stage, lora) if layout.splits_experts else 0
        dense = ring(layout.data * layout.context) * (trained - experts)
        return size * (dense + ring(layout.expert_data) * experts)

    return max(map(of_stage, fullest_stages(layout)))


def traffic(job: Job, layout: ParallelLayout, recompute: str) -> Traffic:
    """All of one step."""
    packs = job.micro_batches(layout)
    return Traffic(
        tensor=packs * max(sum(tensor_bytes(job, layout, recompute, stage)) for stage in range(layout.pipeline)),
        pipeline=packs * pipeline_bytes(job, layout),
        data=data_bytes(job, layout),
        expert=packs * max(sum(expert_bytes(job, layout, recompute, stage)) for stage in range(layout.pipeline)),
        context=packs * max(sum(context_bytes(job, layout, recompute, stage)) for stage in range(layout.pipeline)),
    )
