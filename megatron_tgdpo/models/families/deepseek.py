"""DeepSeek-V2 and V3: latent attention, and after some dense layers experts, of which one is for all tokens.

V3's router has sigmoid scores and a bias for the choice, V2's a softmax; both may choose among groups of experts. V3's
published files have layers at their end for the prediction of several tokens, of which nothing is read.
"""

from typing import Any

from transformers import PretrainedConfig

from megatron_tgdpo.errors import UserError
from megatron_tgdpo.models.families import experts, latent
from megatron_tgdpo.models.families.dense import MLP
from megatron_tgdpo.models.families.family import Family

_KEYS = experts.CONFIG_KEYS | experts.DEEPSEEK_KEYS | latent.CONFIG_KEYS
_WEIGHTS = {
    **latent.with_latent_attention(experts.QWEN_WEIGHTS),
    **experts.shared_weights(MLP + "shared_experts."),
}


def _v2(hf_config: PretrainedConfig) -> dict[str, Any]:
    experts.check_others_keys(hf_config, scoring_func="softmax", moe_layer_freq=1)
    method = hf_config.topk_method
    if method not in ("greedy", "group_limited_greedy"):
        raise UserError(f"config.json: topk_method is {method!r}, only greedy and group_limited_greedy are supported")
    grouped = method == "group_limited_greedy"
    return {
        **experts.deepseek_config_kwargs(hf_config, sigmoid=False, normalised=False, grouped=grouped),
        **latent.attention_kwargs(hf_config, interleaved=True),
    }


def _v3(hf_config: PretrainedConfig) -> dict[str, Any]:
    experts.check_others_keys(hf_config, scoring_func="sigmoid", topk_method="noaux_tc", moe_layer_freq=1)
    return {
        **experts.deepseek_config_kwargs(hf_config, sigmoid=True, normalised=bool(hf_config.norm_topk_prob)),
        **latent.attention_kwargs(hf_config, interleaved=bool(hf_config.rope_interleave)),
    }


V2 = Family(
    architecture="DeepseekV2ForCausalLM",
    # transformers takes no notice of norm_topk_prob.
    config_keys=(_KEYS | {"topk_method"}) - {"norm_topk_prob"},
    config_kwargs=_v2,
    weights=_WEIGHTS,
)
V3 = Family(
    architecture="DeepseekV3ForCausalLM",
    config_keys=_KEYS | {"rope_interleave", "num_nextn_predict_layers", "num_mtp_layers"},
    config_kwargs=_v3,
    weights={**_WEIGHTS, **experts.SCORE_BIAS},
    later_layers="num_nextn_predict_layers",
)
