"""Qwen2-MoE and Qwen1.5-MoE: Qwen2's attention, experts, and one that every token goes to, by a gate.

Experts are in every layer, or in those that the config says.
"""

from typing import Any

from transformers import PretrainedConfig

from megatron_tgdpo.models.families import dense, experts
from megatron_tgdpo.models.families.dense import MLP
from megatron_tgdpo.models.families.family import Family, Weight

_SHARED = MLP + "shared_expert."


def _config_kwargs(hf_config: PretrainedConfig) -> dict[str, Any]:
    return {
        **experts.config_kwargs(
            hf_config,
            experts=hf_config.num_experts,
            size=hf_config.moe_intermediate_size,
            top_k=hf_config.num_experts_per_tok,
            normalised=hf_config.norm_topk_prob,
            layers=experts.qwen_layers(hf_config),
        ),
        **dense.window_kwargs(hf_config),
        "add_qkv_bias": True,
        "moe_shared_expert_intermediate_size": hf_config.shared_expert_intermediate_size,
        "moe_shared_expert_gate": True,
    }


FAMILY = Family(
    architecture="Qwen2MoeForCausalLM",
    config_keys=experts.CONFIG_KEYS
    | experts.QWEN_KEYS
    | experts.QWEN_LAYER_KEYS
    | dense.WINDOW_KEYS
    | {"norm_topk_prob", "shared_expert_intermediate_size"},
    config_kwargs=_config_kwargs,
    weights={
        **experts.QWEN_WEIGHTS,
        "self_attention.linear_qkv.bias": dense.QKV_BIAS,
        "mlp.shared_experts.linear_fc1.weight": Weight(
            "glu",
            (
                (_SHARED + "gate_proj.weight", ("shared_mlp", "hidden")),
                (_SHARED + "up_proj.weight", ("shared_mlp", "hidden")),
            ),
        ),
        "mlp.shared_experts.linear_fc2.weight": Weight(
            "row", ((_SHARED + "down_proj.weight", ("hidden", "shared_mlp")),)
        ),
        "mlp.shared_experts.gate_weight": Weight("copy", ((MLP + "shared_expert_gate.weight", ("one", "hidden")),)),
    },
)
