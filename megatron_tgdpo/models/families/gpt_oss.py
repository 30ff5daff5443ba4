"""GPT-OSS: windows on every other layer, attention sinks, biases everywhere, experts with a clamped gate of their own.

The files have all experts of a layer in one tensor, gate and up alternating. As published they are in MXFP4: refused,
and taken once transformers has saved them dequantised.
"""

import functools
from typing import Any

import torch
from transformers import PretrainedConfig

from megatron_tgdpo.models.families import dense, experts
from megatron_tgdpo.models.families.dense import ATTENTION, MLP
from megatron_tgdpo.models.families.family import Family, Weight


def _gate(gate: torch.Tensor, alpha: float) -> torch.Tensor:
    return gate * torch.sigmoid(gate * alpha)


def _config_kwargs(hf_config: PretrainedConfig) -> dict[str, Any]:
    return {
        **experts.config_kwargs(
            hf_config,
            experts=hf_config.num_local_experts,
            size=hf_config.intermediate_size,
            top_k=hf_config.num_experts_per_tok,
            normalised=True,
        ),
        **dense.window_kwargs(hf_config),
        "softmax_type": "learnable",
        "add_bias_linear": True,
        # (up + 1) * gate * sigmoid(alpha * gate), gate up to the limit, up on both sides
        "activation_func": functools.partial(_gate, alpha=hf_config.swiglu_alpha),
        "activation_func_clamp_value": hf_config.swiglu_limit,
        "glu_linear_offset": 1.0,
    }


_BESIDE_EXPERTS = {name: weight for name, weight in dense.WEIGHTS.items() if not name.startswith("mlp.")}

FAMILY = Family(
    architecture="GptOssForCausalLM",
    config_keys=experts.CONFIG_KEYS
    | dense.WINDOW_KEYS
    | {"num_local_experts", "num_experts_per_tok", "swiglu_alpha", "swiglu_limit"},
    config_kwargs=_config_kwargs,
    weights={
        **_BESIDE_EXPERTS,
        "self_attention.linear_qkv.bias": dense.QKV_BIAS,
        "self_attention.linear_proj.bias": Weight("copy", ((ATTENTION + "o_proj.bias", ("hidden",)),)),
        "self_attention.core_attention.softmax_offset": Weight("column", ((ATTENTION + "sinks", ("heads",)),)),
        "mlp.router.weight": Weight("copy", ((MLP + "router.weight", ("experts", "hidden")),)),
        "mlp.router.bias": Weight("copy", ((MLP + "router.bias", ("experts",)),)),
        "mlp.experts.linear_fc1.weight": Weight(
            "stacked_glu", ((MLP + "experts.gate_up_proj", ("experts", "hidden", "expert_gate_up")),)
        ),
        "mlp.experts.linear_fc1.bias": Weight(
            "stacked_glu", ((MLP + "experts.gate_up_proj_bias", ("experts", "expert_gate_up")),)
        ),
        "mlp.experts.linear_fc2.weight": Weight(
            "stacked_row", ((MLP + "experts.down_proj", ("experts", "expert_mlp", "hidden")),)
        ),
        "mlp.experts.linear_fc2.bias": Weight(
            "stacked_copy", ((MLP + "experts.down_proj_bias", ("experts", "hidden")),)
        ),
    },
)
