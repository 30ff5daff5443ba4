"""K-EXAONE: EXAONE-4's attention with a norm before each part of a layer, and DeepSeek-V3's experts in some layers.

Of the layer for the prediction of several tokens, which the published files have under ``mtp.``, nothing is read.
"""

from typing import Any

from transformers import PretrainedConfig

from megatron_tgdpo.models.families import dense, exaone4, experts
from megatron_tgdpo.models.families.dense import MLP
from megatron_tgdpo.models.families.family import Family, Weight


def _config_kwargs(hf_config: PretrainedConfig) -> dict[str, Any]:
    experts.check_others_keys(hf_config, scoring_func="sigmoid")
    return {
        **experts.deepseek_config_kwargs(
            hf_config,
            sigmoid=True,
            normalised=bool(hf_config.norm_topk_prob),
            layers=experts.typed_layers(hf_config),
            experts_key="num_experts",
            shared_key="num_shared_experts",
        ),
        **exaone4.attention_kwargs(hf_config),
    }


FAMILY = Family(
    architecture="ExaoneMoeForCausalLM",
    config_keys=experts.CONFIG_KEYS
    | experts.DEEPSEEK_KEYS
    | dense.WINDOW_KEYS
    | {"sliding_window_pattern", "num_experts", "num_shared_experts", "mlp_layer_types"},
    config_kwargs=_config_kwargs,
    weights={
        **experts.QWEN_WEIGHTS,
        **experts.shared_weights(MLP + "shared_experts."),
        **dense.HEAD_NORMS,
        "mlp.router.expert_bias": Weight("copy", ((MLP + "e_score_correction_bias", ("experts",)),), fp32=True),
    },
    later_layers="num_nextn_predict_layers",
)
