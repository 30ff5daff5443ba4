"""OLMoE: norms over all query and all key heads, and experts in every layer."""

from typing import Any

from transformers import PretrainedConfig

from megatron_tgdpo.models.families import experts
from megatron_tgdpo.models.families.family import Family
from megatron_tgdpo.models.families.olmo2 import PROJECTION_NORMS


def _config_kwargs(hf_config: PretrainedConfig) -> dict[str, Any]:
    return {
        **experts.config_kwargs(
            hf_config,
            experts=hf_config.num_experts,
            size=hf_config.intermediate_size,
            top_k=hf_config.num_experts_per_tok,
            normalised=hf_config.norm_topk_prob,
        ),
        "qk_projection_norm": True,
    }


FAMILY = Family(
    architecture="OlmoeForCausalLM",
    config_keys=experts.CONFIG_KEYS | experts.QWEN_KEYS | {"norm_topk_prob"},
    config_kwargs=_config_kwargs,
    weights={**experts.QWEN_WEIGHTS, **PROJECTION_NORMS},
)
