"""Bytes that a step's operators read and write beside its matrix products, where that is what they take time for."""

from transformers import PretrainedConfig

from megatron_tgdpo.distributed.layout import ParallelLayout
from megatron_tgdpo.models.hf_config import padded_vocab_size
from megatron_tgdpo.models.hf_weights.mapping import kinds_of_layers
from megatron_tgdpo.planning.activations import layer_activations, stage_layers
from megatron_tgdpo.planning.job import Job
from megatron_tgdpo.planning.memory import fullest_stages, trained_of_experts, trained_parameters

_FP32 = 4
# What a layer keeps is written once and read by the operator that follows; backward reads it, and reads and writes a
# gradient of each.
_FORWARD, _BACKWARD = 2, 4
# Of an fp32 logit: forward it is read for the maximum, and read, written and read for the sum of exponentials; backward
# read and written for the exponential, and again for its product with the gradient.
_LOGIT_FORWARD, _LOGIT_BACKWARD = 4, 4
# Of a parameter's fp32 gradient and step: zeroed, read for the norm, read and written by clipping; Adam reads gradient,
# weight and both moments and writes three of them.
_CLIPPING, _ADAM = 4, 7


def moved_bytes(job: Job, layout: ParallelLayout, recompute: str, stage: int) -> tuple[float, float, float]:
    """Bytes of one pack and one rank of a stage: policy forward, policy backward, frozen forward.

    Of layers, of the log-probs on the last stage, and of the gradients of weights, which each pack adds to.
    """
    pack = job.local_pack(layout)

    def layers(number: int, hf_config: PretrainedConfig, kept_with: str = "none") -> float:
        kinds = kinds_of_layers(hf_config, stage_layers(hf_config, layout.of_model(number), stage))
        return sum(
            count * layer_activations(hf_config, layout, pack, kept_with, layer) for layer, count in kinds.items()
        )

    def logits(hf_config: PretrainedConfig) -> float:
        if stage < layout.pipeline - 1:
            return 0.0
        rows = padded_vocab_size(hf_config, layout.tensor) // layout.tensor
        return pack.tokens * job.batch.packed_response_share * rows * _FP32

    each = [(layers(number, config), logits(config)) for number, config in enumerate(job.models)]
    (kept, logit), *frozen = each
    forward = _FORWARD * kept + _LOGIT_FORWARD * logit
    trained = trained_parameters(job.policy, layout, stage, job.sources.trained)
    # The product writes a gradient, which is read, and added to what is there.
    backward = _BACKWARD * kept + _LOGIT_BACKWARD * logit + trained * (2 * job.pack.dtype_bytes + 2 * _FP32)
    again = kept if recompute == "full" else kept - layers(0, job.policy, recompute)
    backward += _FORWARD * again
    return forward, backward, sum(_FORWARD * layer + _LOGIT_FORWARD * logit for layer, logit in frozen)


def optimizer_bytes(job: Job, layout: ParallelLayout) -> float:
    """Bytes of one step, on the stage with most parameters."""
    lora = job.sources.trained

    def of_stage(stage: int) -> float:
        trained = trained_parameters(job.policy, layout, stage, lora)
        experts = trained_of_experts(job.policy, layout, stage, lora)
        own = (trained - experts) / (layout.data * layout.context) + experts / layout.expert_data
        # Clipping is of each rank's part, too; the whole buffer is zeroed.
        return _FP32 * (trained + (_CLIPPING - 1 + _ADAM) * own)

    return max(map(of_stage, fullest_stages(layout)))
