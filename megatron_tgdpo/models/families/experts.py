"""What decoders with experts have in common: a layer's MLP is a router and experts, each a gated MLP, or dense.

A token goes to the ``top_k`` experts with the highest router logits, whatever their load. Their outputs are weighted by
the softmax over all experts, with normalised weights by the softmax over the chosen ones. The losses that spread
tokens evenly over experts in pre-training are off.
"""

from collections.abc import Sequence
from typing import Any

from transformers import PretrainedConfig

from megatron_tgdpo.errors import UserError
from megatron_tgdpo.models.families import dense
from megatron_tgdpo.models.families.family import Weight

# Keys of those losses, which are off in training.
CONFIG_KEYS = dense.CONFIG_KEYS | {"output_router_logits", "router_aux_loss_coef"}

# Which layers have experts.
QWEN_LAYER_KEYS = frozenset({"mlp_only_layers", "decoder_sparse_step"})

# transformers 5 has the first, 4.57 the second
QWEN_KEYS = frozenset({"num_local_experts", "num_experts", "num_experts_per_tok", "moe_intermediate_size"})


def weights(router: str, gate: str, up: str, down: str) -> dict[str, Weight]:
    """The dense decoder's weights, and those of experts in the MLP's place.

    Args:
        router: Name of the router's weight in HF files, with ``{layer}``.
        gate: Of an expert's gate projection, with ``{layer}`` and ``{expert}``.
        up: Of its up projection.
        down: Of its down projection.
    """
    return {
        **dense.WEIGHTS,
        "mlp.router.weight": Weight("copy", ((router, ("experts", "hidden")),)),
        "mlp.experts.linear_fc1.weight": Weight(
            "glu", ((gate, ("expert_mlp", "hidden")), (up, ("expert_mlp", "hidden")))
        ),
        "mlp.experts.linear_fc2.weight": Weight("row", ((down, ("hidden", "expert_mlp")),)),
    }


QWEN_WEIGHTS = weights(
    dense.MLP + "gate.weight",
    dense.MLP + "experts.{expert}.gate_proj.weight",
    dense.MLP + "experts.{expert}.up_proj.weight",
    dense.MLP + "experts.{expert}.down_proj.weight",
)


def qwen_layers(hf_config: PretrainedConfig) -> list[bool]:
    """Whether each layer has experts, by ``mlp_only_layers`` and ``decoder_sparse_step``.

    Raises:
        UserError: The step is not positive.
    """
    step, without = hf_config.decoder_sparse_step, set(hf_config.mlp_only_layers or ())
    if step < 1:
        raise UserError(f"config.json: decoder_sparse_step is {step}: it must be positive")
    return [layer not in without and (layer + 1) % step == 0 for layer in range(hf_config.num_hidden_layers)]


def after_first_dense(hf_config: PretrainedConfig) -> list[bool]:
    """Whether each layer has experts, by ``first_k_dense_replace``: all but so many first ones."""
    return [layer >= hf_config.first_k_dense_replace for layer in range(hf_config.num_hidden_layers)]


def config_kwargs(
    hf_config: PretrainedConfig,
    *,
    experts: int,
    size: int,
    top_k: int,
    normalised: bool,
    layers: Sequence[bool] | None = None,
) -> dict[str, Any]:
    """The dense decoder's settings with experts in the MLP's place.

    Args:
        hf_config: The HF config.
        experts: Of a layer.
        size: Of an expert's hidden layer.
        top_k: Experts of a token.
        normalised: Whether the weights of a token's experts sum to 1.
        layers: Whether each layer has experts; None where all have.

    Raises:
        UserError: There are fewer experts than a token goes to, or one with a weight of 1; or no layer has experts.
    """
    if not 1 <= top_k <= experts:
        raise UserError(f"config.json: num_experts_per_tok is {top_k} with {experts} experts")
    if top_k == 1 and normalised:
        raise UserError("config.json: num_experts_per_tok is 1 with normalised weights: no router could learn")
    settings = dense.config_kwargs(hf_config)
    if layers is None or all(layers):
        # Without a list, as megatron-core's checkpoints have all layers in one tensor then.
        settings["ffn_hidden_size"] = size
    elif not any(layers):
        raise UserError(f"config.json: none of {len(layers)} layers has experts, which is not supported")
    elif hf_config.intermediate_size < 1:
        raise UserError(
            f"config.json: intermediate_size is {hf_config.intermediate_size}, and some layers have no experts: it "
            "must be positive"
        )
    else:
        settings["moe_layer_freq"] = [int(has) for has in layers]
    return {
        **settings,
        "num_moe_experts": experts,
        "moe_ffn_hidden_size": size,
        "moe_router_topk": top_k,
        "moe_router_pre_softmax": not normalised,
    }
