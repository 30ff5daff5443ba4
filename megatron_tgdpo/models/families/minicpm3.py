"""MiniCPM3: latent attention, halves rotated together, and multipliers of embeddings, residual additions and logits."""

import math
from typing import Any

from transformers import PretrainedConfig

from megatron_tgdpo.models.families import dense, latent
from megatron_tgdpo.models.families.family import Family


def _config_kwargs(hf_config: PretrainedConfig) -> dict[str, Any]:
    return {
        **dense.config_kwargs(hf_config),
        **latent.attention_kwargs(hf_config, interleaved=False),
        "embedding_scale": float(hf_config.scale_emb),
        "residual_multiplier": hf_config.scale_depth / math.sqrt(hf_config.num_hidden_layers),
        "logit_scale": hf_config.dim_model_base / hf_config.hidden_size,
    }


FAMILY = Family(
    architecture="MiniCPM3ForCausalLM",
    config_keys=latent.CONFIG_KEYS | {"scale_emb", "scale_depth", "dim_model_base"},
    config_kwargs=_config_kwargs,
    weights=latent.with_latent_attention(dense.WEIGHTS),
)
