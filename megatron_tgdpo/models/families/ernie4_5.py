"""ERNIE 4.5, dense, and Helium: the dense decoder with neighbours rotated together."""

from typing import Any

from transformers import PretrainedConfig

from megatron_tgdpo.models.families import dense
from megatron_tgdpo.models.families.family import Family


def _config_kwargs(hf_config: PretrainedConfig) -> dict[str, Any]:
    return {**dense.config_kwargs(hf_config), "rotary_interleaved": True}


FAMILY = Family(
    architecture="Ernie4_5ForCausalLM",
    config_keys=dense.CONFIG_KEYS,
    config_kwargs=_config_kwargs,
    weights=dense.WEIGHTS,
)
HELIUM = Family(
    architecture="HeliumForCausalLM",
    config_keys=dense.CONFIG_KEYS,
    config_kwargs=_config_kwargs,
    weights=dense.WEIGHTS,
)
