"""OLMo-2 and OLMo-3: norms after attention and MLP only, norms over all query and all key heads; windows in OLMo-3."""

from typing import Any

from transformers import PretrainedConfig

from megatron_tgdpo.models.families import dense
from megatron_tgdpo.models.families.dense import ATTENTION
from megatron_tgdpo.models.families.family import Family, Weight

_BEFORE = ("input_layernorm.weight", "pre_mlp_layernorm.weight")
POST_NORMS = {
    **{name: weight for name, weight in dense.WEIGHTS.items() if name not in _BEFORE},
    "self_attention.linear_proj.post_layernorm.weight": dense.layer_norm("post_attention_layernorm"),
    "mlp.linear_fc2.post_layernorm.weight": dense.layer_norm("post_feedforward_layernorm"),
}
PROJECTION_NORMS = {
    "self_attention.query_norm.weight": Weight("column", ((ATTENTION + "q_norm.weight", ("query",)),)),
    "self_attention.key_norm.weight": Weight("column", ((ATTENTION + "k_norm.weight", ("kv",)),)),
}
_WEIGHTS = {**POST_NORMS, **PROJECTION_NORMS}


def _config_kwargs(hf_config: PretrainedConfig) -> dict[str, Any]:
    return {
        **dense.config_kwargs(hf_config),
        "pre_norms": False,
        "post_norms": True,
        "qk_projection_norm": True,
    }


def _config_kwargs_3(hf_config: PretrainedConfig) -> dict[str, Any]:
    dense.need_rotary_by_layer(hf_config)
    return {**_config_kwargs(hf_config), **dense.window_kwargs(hf_config)}


OLMO2 = Family(
    architecture="Olmo2ForCausalLM",
    config_keys=dense.CONFIG_KEYS,
    config_kwargs=_config_kwargs,
    weights=_WEIGHTS,
)
OLMO3 = Family(
    architecture="Olmo3ForCausalLM",
    config_keys=dense.CONFIG_KEYS | dense.WINDOW_KEYS,
    config_kwargs=_config_kwargs_3,
    weights=_WEIGHTS,
)
