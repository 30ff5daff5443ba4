"""Mixtral: Mistral's decoder with experts in every layer, whose weights are normalised."""

from typing import Any

from transformers import PretrainedConfig

from megatron_tgdpo.models.families import dense, experts
from megatron_tgdpo.models.families.dense import LAYER
from megatron_tgdpo.models.families.family import Family

_MOE = LAYER + "block_sparse_moe."


def _config_kwargs(hf_config: PretrainedConfig) -> dict[str, Any]:
    return {
        **experts.config_kwargs(
            hf_config,
            experts=hf_config.num_local_experts,
            size=hf_config.intermediate_size,
            top_k=hf_config.num_experts_per_tok,
            normalised=True,
        ),
        **dense.window_kwargs(hf_config),
    }


FAMILY = Family(
    architecture="MixtralForCausalLM",
    config_keys=experts.CONFIG_KEYS | dense.WINDOW_KEYS | {"num_local_experts", "num_experts_per_tok"},
    config_kwargs=_config_kwargs,
    weights=experts.weights(
        _MOE + "gate.weight",
        _MOE + "experts.{expert}.w1.weight",
        _MOE + "experts.{expert}.w3.weight",
        _MOE + "experts.{expert}.w2.weight",
    ),
)
