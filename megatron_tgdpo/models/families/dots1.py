"""dots.llm1: Qwen3's attention, and after some dense layers DeepSeek-V3's experts, of which one is for all tokens."""

from typing import Any

from transformers import PretrainedConfig

from megatron_tgdpo.models.families import dense, experts
from megatron_tgdpo.models.families.dense import MLP
from megatron_tgdpo.models.families.family import Family


def _config_kwargs(hf_config: PretrainedConfig) -> dict[str, Any]:
    # The published files' name for sigmoids with a bias for the choice.
    experts.check_others_keys(hf_config, scoring_func="noaux_tc")
    return {
        **experts.deepseek_config_kwargs(hf_config, sigmoid=True, normalised=bool(hf_config.norm_topk_prob)),
        **dense.window_kwargs(hf_config),
        "qk_layernorm": True,
    }


FAMILY = Family(
    architecture="Dots1ForCausalLM",
    config_keys=experts.CONFIG_KEYS | experts.DEEPSEEK_KEYS | dense.WINDOW_KEYS,
    config_kwargs=_config_kwargs,
    weights={
        **experts.QWEN_WEIGHTS,
        **experts.SCORE_BIAS,
        **experts.shared_weights(MLP + "shared_experts."),
        **dense.HEAD_NORMS,
    },
)
