"""Parameters and memory per rank, computed from configs alone (for ``--dry-run``, without loading anything)."""

import math
from dataclasses import dataclass

from transformers import PretrainedConfig

from checkpoints_convert.mapping import EMBEDDING, global_parameters
from megatron_tgdpo.parallel import ParallelLayout

GIB = 2**30


@dataclass(frozen=True)
class RankMemory:
    """Of the fullest rank; bytes.

    Attributes:
        policy_parameters: Policy parameters on that rank.
        frozen_parameters: Reference and guide parameters on that rank.
        weights: Policy weights.
        gradients: fp32 gradient buffer.
        optimizer: Adam moments, and the fp32 main copy of bf16 weights, split over data ranks.
        frozen: Weights of reference and guide.
        carried: Hidden states of all models for one row at a stage's input, times the micro batches in flight.
    """

    policy_parameters: int
    frozen_parameters: int
    weights: int
    gradients: int
    optimizer: int
    frozen: int
    carried: int

    @property
    def total(self) -> int:
        return self.weights + self.gradients + self.optimizer + self.frozen + self.carried


def stage_parameters(hf_config: PretrainedConfig, layout: ParallelLayout, stage: int) -> int:
    """Parameters that one rank of a pipeline stage holds, vocabulary padding included."""
    layers = hf_config.num_hidden_layers // layout.pipeline
    first, last = stage == 0, stage == layout.pipeline - 1
    total = 0
    for parameter in global_parameters(hf_config, layout.tensor):
        size = math.prod(parameter.shape) // (1 if parameter.kind == "copy" else layout.tensor)
        if parameter.layer is not None:
            held = stage * layers <= parameter.layer < (stage + 1) * layers
        elif parameter.key == EMBEDDING:
            # The last stage has its own copy of tied embeddings.
            held = first or (last and bool(hf_config.tie_word_embeddings))
        else:
            held = last
        total += size if held else 0
    return total


def rank_memory(
    policy: PretrainedConfig, frozen: list[PretrainedConfig], layout: ParallelLayout, row_tokens: int, dtype_bytes: int
) -> RankMemory:
    """The fullest rank's memory, without activations inside layers and without the log-prob workspace.

    Args:
        policy: Config of the policy.
        frozen: Configs of reference and guide.
        layout: The rank grid.
        row_tokens: Tokens of a row.
        dtype_bytes: 2 for bf16, 4 for fp32.
    """

    def at(stage: int) -> RankMemory:
        trained = stage_parameters(policy, layout, stage)
        held = sum(stage_parameters(config, layout, stage) for config in frozen)
        state = (2 if dtype_bytes == 4 else 3) * 4 * trained // layout.data
        local_tokens = row_tokens // (layout.tensor if layout.sequence_parallel else 1)
        width = policy.hidden_size * (layout.pipeline - stage) + sum(config.hidden_size for config in frozen)
        carried = local_tokens * width * dtype_bytes
        return RankMemory(trained, held, trained * dtype_bytes, 4 * trained, state, held * dtype_bytes, carried)

    return max((at(stage) for stage in range(layout.pipeline)), key=lambda memory: memory.total)
