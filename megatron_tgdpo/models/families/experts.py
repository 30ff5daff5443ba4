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


def shared_weights(prefix: str) -> dict[str, Weight]:
    """Those of the expert that all tokens go to; ``prefix`` is of its projections' names, with ``{layer}``."""
    return {
        "mlp.shared_experts.linear_fc1.weight": Weight(
            "glu",
            (
                (f"{prefix}gate_proj.weight", ("shared_mlp", "hidden")),
                (f"{prefix}up_proj.weight", ("shared_mlp", "hidden")),
            ),
        ),
        "mlp.shared_experts.linear_fc2.weight": Weight(
            "row", ((f"{prefix}down_proj.weight", ("hidden", "shared_mlp")),)
        ),
    }


# What DeepSeek-V3's router, and those made like it, add to their scores.
SCORE_BIAS = {
    "mlp.router.expert_bias": Weight("copy", ((dense.MLP + "gate.e_score_correction_bias", ("experts",)),), fp32=True)
}

# Keys of DeepSeek's experts, and of those made like them.
DEEPSEEK_KEYS = frozenset(
    {
        "num_local_experts",
        "n_routed_experts",
        "num_experts_per_tok",
        "moe_intermediate_size",
        "n_shared_experts",
        "first_k_dense_replace",
        "n_group",
        "topk_group",
        "norm_topk_prob",
        "routed_scaling_factor",
    }
)


QWEN_WEIGHTS = weights(
    dense.MLP + "gate.weight",
    dense.MLP + "experts.{expert}.gate_proj.weight",
    dense.MLP + "experts.{expert}.up_proj.weight",
    dense.MLP + "experts.{expert}.down_proj.weight",
)


def check_others_keys(hf_config: PretrainedConfig, **wanted: object) -> None:
    """Refuses what the authors' own code would compute otherwise, by keys that transformers takes no notice of.

    Raises:
        UserError: The config has one of ``wanted`` with another value.
    """
    for key, value in wanted.items():
        found = getattr(hf_config, key, value)
        if found != value:
            raise UserError(f"config.json: {key} is {found!r}, only {value!r} is supported, as in transformers")


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


def typed_layers(hf_config: PretrainedConfig) -> list[bool]:
    """Whether each layer has experts, by ``mlp_layer_types``: ``sparse``, or ``dense``.

    Raises:
        UserError: Another type, another number of layers, or a ``first_k_dense_replace`` that says otherwise.
    """
    types, count = hf_config.mlp_layer_types, hf_config.num_hidden_layers
    unknown = sorted(set(types) - {"sparse", "dense"})
    if unknown or len(types) != count:
        what = f"has {unknown[0]!r}" if unknown else f"names {len(types)} of {count} layers"
        raise UserError(f"config.json: mlp_layer_types {what}: it must have sparse or dense for each layer")
    # Published files have it beside the types' default, and transformers takes no notice of it.
    first = getattr(hf_config, "first_k_dense_replace", None)
    if first is not None and types != ["dense"] * first + ["sparse"] * (count - first):
        raise UserError(
            f"config.json: first_k_dense_replace is {first}, and mlp_layer_types says otherwise, which transformers "
            "goes by: remove one of them"
        )
    return [each == "sparse" for each in types]


def config_kwargs(
    hf_config: PretrainedConfig,
    *,
    experts: int,
    size: int,
    top_k: int,
    normalised: bool,
    layers: Sequence[bool] | None = None,
    partial_rotary: bool = False,
) -> dict[str, Any]:
    """The dense decoder's settings with experts in the MLP's place.

    Args:
        hf_config: The HF config.
        experts: Of a layer.
        size: Of an expert's hidden layer.
        top_k: Experts of a token.
        normalised: Whether the weights of a token's experts sum to 1.
        layers: Whether each layer has experts; None where all have.
        partial_rotary: See :func:`dense.config_kwargs`.

    Raises:
        UserError: There are fewer experts than a token goes to, or one with a weight of 1; or no layer has experts.
    """
    if not 1 <= top_k <= experts:
        raise UserError(f"config.json: num_experts_per_tok is {top_k} with {experts} experts")
    if top_k == 1 and normalised:
        raise UserError("config.json: num_experts_per_tok is 1 with normalised weights: no router could learn")
    settings = dense.config_kwargs(hf_config, partial_rotary=partial_rotary)
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


def deepseek_config_kwargs(
    hf_config: PretrainedConfig,
    *,
    sigmoid: bool,
    normalised: bool,
    grouped: bool = True,
    layers: Sequence[bool] | None = None,
    partial_rotary: bool = False,
    experts_key: str = "n_routed_experts",
    shared_key: str = "n_shared_experts",
) -> dict[str, Any]:
    """DeepSeek's experts, routers and shared experts, also of models made like them, beside the dense decoder.

    Args:
        hf_config: With ``DEEPSEEK_KEYS``.
        sigmoid: Whether scores are sigmoids with a bias for the choice, groups judged by their best two experts
            (DeepSeek-V3); else a softmax over all experts, groups judged by their best one (DeepSeek-V2).
        normalised: Whether the weights of a token's experts sum to 1 before the scaling factor.
        grouped: Whether experts are chosen from some groups (``n_group``, ``topk_group``), or from all.
        layers: Whether each layer has experts; None: by ``first_k_dense_replace``.
        partial_rotary: See :func:`dense.config_kwargs`.
        experts_key: The config's name for the number of experts that are chosen from.
        shared_key: And for that of those for all tokens, which are one of so many times the size.

    Raises:
        UserError: As :func:`config_kwargs`; or groups do not divide the experts, or have too few.
    """
    experts, top_k = getattr(hf_config, experts_key), hf_config.num_experts_per_tok
    shared, groups = getattr(hf_config, shared_key), {}
    if grouped:
        groups = _group_kwargs(hf_config.n_group or 1, hf_config.topk_group or 1, experts, top_k, 2 if sigmoid else 1)
    if not shared or shared < 1:
        raise UserError(f"config.json: {shared_key} is {shared}, which is not supported: at least 1")
    return {
        **config_kwargs(
            hf_config,
            experts=experts,
            size=hf_config.moe_intermediate_size,
            top_k=top_k,
            normalised=normalised,
            layers=after_first_dense(hf_config) if layers is None else layers,
            partial_rotary=partial_rotary,
        ),
        "moe_shared_expert_intermediate_size": shared * hf_config.moe_intermediate_size,
        "moe_router_score_function": "sigmoid" if sigmoid else "softmax",
        "moe_router_topk_scaling_factor": hf_config.routed_scaling_factor,
        "router_score_bias": sigmoid,
        "router_normalised": normalised,
        **groups,
    }


def _group_kwargs(groups: int, chosen: int, experts: int, top_k: int, best: int) -> dict[str, Any]:
    if groups < 1 or experts % groups or experts // groups < best:
        raise UserError(f"config.json: n_group is {groups}, which does not divide {experts} experts into groups")
    if not 1 <= chosen <= groups or chosen * (experts // groups) < top_k:
        raise UserError(
            f"config.json: topk_group is {chosen} of {groups} groups with {experts // groups} experts each, for "
            f"{top_k} experts of a token"
        )
    # Among all groups there is nothing to choose.
    if chosen == groups:
        return {}
    return {"moe_router_num_groups": groups, "moe_router_group_topk": chosen, "router_group_best": best}
