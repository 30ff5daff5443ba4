"""Youtu-LLM: the dense decoder with latent attention in every layer."""

from typing import Any

from transformers import PretrainedConfig

from megatron_tgdpo.models.families import dense, latent
from megatron_tgdpo.models.families.family import Family


def _config_kwargs(hf_config: PretrainedConfig) -> dict[str, Any]:
    return {
        **dense.config_kwargs(hf_config),
        **latent.attention_kwargs(hf_config, interleaved=bool(hf_config.rope_interleave)),
    }


FAMILY = Family(
    architecture="YoutuForCausalLM",
    config_keys=latent.CONFIG_KEYS | {"rope_interleave", "embedding_initializer_range"},
    config_kwargs=_config_kwargs,
    weights=latent.with_latent_attention(dense.WEIGHTS),
)
