"""Llama 2, 3, 3.1 and 3.2: the plain dense decoder, rotary positions default or llama3; CWM has windows besides."""

from megatron_tgdpo.models.families import dense
from megatron_tgdpo.models.families.family import Family
from megatron_tgdpo.models.families.mistral import windowed

FAMILY = Family(
    architecture="LlamaForCausalLM",
    config_keys=dense.CONFIG_KEYS,
    config_kwargs=dense.config_kwargs,
    weights=dense.WEIGHTS,
)
CWM = Family(
    architecture="CwmForCausalLM",
    config_keys=dense.CONFIG_KEYS | dense.WINDOW_KEYS,
    config_kwargs=windowed,
    weights=dense.WEIGHTS,
)
