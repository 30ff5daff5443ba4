"""DeepSeek-V2: latent attention, and after some dense layers experts, of which one is shared.

A token's experts are those with the highest softmax over all, not normalised. Files of transformers and DeepSeek have
several shared experts as one of their sizes together.
"""

from typing import Any

from transformers import PretrainedConfig

from megatron_tgdpo.errors import UserError
from megatron_tgdpo.models.families import experts, latent
from megatron_tgdpo.models.families.dense import MLP
from megatron_tgdpo.models.families.family import Family, Weight

_SHARED = MLP + "shared_experts."
_SHARED_EXPERT = {
    "mlp.shared_experts.linear_fc1.weight": Weight(
        "glu",
        (
            (_SHARED + "gate_proj.weight", ("shared_mlp", "hidden")),
            (_SHARED + "up_proj.weight", ("shared_mlp", "hidden")),
        ),
    ),
    "mlp.shared_experts.linear_fc2.weight": Weight("row", ((_SHARED + "down_proj.weight", ("hidden", "shared_mlp")),)),
}


def _v2(hf_config: PretrainedConfig) -> dict[str, Any]:
    if hf_config.topk_method != "greedy":
        raise UserError(
            f"config.json: topk_method is {hf_config.topk_method!r}, only 'greedy' is supported: megatron-core chooses "
            "among groups of experts by the sum of several scores, DeepSeek-V2 by the largest"
        )
    if not hf_config.n_shared_experts or hf_config.n_shared_experts < 1:
        raise UserError(f"config.json: n_shared_experts is {hf_config.n_shared_experts}: it must be positive")
    return {
        **experts.config_kwargs(
            hf_config,
            experts=hf_config.n_routed_experts,
            size=hf_config.moe_intermediate_size,
            top_k=hf_config.num_experts_per_tok,
            normalised=False,
            layers=experts.after_first_dense(hf_config),
        ),
        **latent.attention_kwargs(hf_config, interleaved=True),
        "moe_router_topk_scaling_factor": float(hf_config.routed_scaling_factor),
        "moe_shared_expert_intermediate_size": hf_config.n_shared_experts * hf_config.moe_intermediate_size,
    }


V2 = Family(
    architecture="DeepseekV2ForCausalLM",
    # norm_topk_prob is left out: transformers takes no notice of it.
    config_keys=experts.CONFIG_KEYS
    | latent.CONFIG_KEYS
    | {
        "first_k_dense_replace",
        "moe_intermediate_size",
        "n_group",
        "n_routed_experts",
        "n_shared_experts",
        "num_experts_per_tok",
        "routed_scaling_factor",
        "topk_group",
        "topk_method",
    },
    config_kwargs=_v2,
    weights={**latent.with_latent_attention(experts.QWEN_WEIGHTS), **_SHARED_EXPERT},
)
