"""EXAONE-4: norms after attention and MLP only, and of query and key heads; beside windows, layers without rotation."""

from typing import Any

from transformers import PretrainedConfig

from megatron_tgdpo.models.families import dense
from megatron_tgdpo.models.families.family import Family
from megatron_tgdpo.models.families.olmo2 import POST_NORMS


def attention_kwargs(hf_config: PretrainedConfig) -> dict[str, Any]:
    """Windows, layers without rotation, norms of heads; also K-EXAONE's."""
    windows = dense.window_kwargs(hf_config)
    if hf_config.sliding_window is not None:
        windows["no_rope_freq"] = [int(kind == "full_attention") for kind in hf_config.layer_types]
    return {**windows, "qk_layernorm": True}


def _config_kwargs(hf_config: PretrainedConfig) -> dict[str, Any]:
    return {
        **dense.config_kwargs(hf_config),
        **attention_kwargs(hf_config),
        "pre_norms": False,
        "post_norms": True,
    }


FAMILY = Family(
    architecture="Exaone4ForCausalLM",
    config_keys=dense.CONFIG_KEYS | dense.WINDOW_KEYS | {"sliding_window_pattern"},
    config_kwargs=_config_kwargs,
    weights={**POST_NORMS, **dense.HEAD_NORMS},
)
