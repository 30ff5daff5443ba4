"""Granite 3, dense: multipliers of embeddings, of what layers add to the residual stream, of scores and of logits."""

from typing import Any

from transformers import PretrainedConfig

from megatron_tgdpo.models.families import dense
from megatron_tgdpo.models.families.family import Family


def _config_kwargs(hf_config: PretrainedConfig) -> dict[str, Any]:
    return {
        **dense.config_kwargs(hf_config),
        "embedding_scale": hf_config.embedding_multiplier,
        "embedding_scale_rounded": False,
        "residual_multiplier": hf_config.residual_multiplier,
        "softmax_scale": hf_config.attention_multiplier,
        "logit_scale": 1.0 / hf_config.logits_scaling,
    }


FAMILY = Family(
    architecture="GraniteForCausalLM",
    config_keys=dense.CONFIG_KEYS
    | {"embedding_multiplier", "residual_multiplier", "attention_multiplier", "logits_scaling"},
    config_kwargs=_config_kwargs,
    weights=dense.WEIGHTS,
)
