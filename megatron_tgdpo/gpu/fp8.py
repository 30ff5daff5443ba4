"""FP8 and FP4: what the configuration asks of megatron-core and Transformer Engine (refusals: ``gpu/fp8_checks.py``).

Everything here is a pure function of its arguments.
"""

from collections.abc import Mapping
from typing import Any

import torch

from megatron_tgdpo.config.constraints import FP4, size_multiple, token_multiple
from megatron_tgdpo.config.schema import Config, PrecisionConfig
from megatron_tgdpo.distributed.layout import ParallelLayout
from megatron_tgdpo.errors import UserError
from megatron_tgdpo.planning.memory import LinearBytes

# Values of 4 bits, and a scale of 8 for 16 of them.
_FP4_BYTES = 0.5 + 1 / 16


def asked_by(recipe: str) -> str:
    """The recipe as key and value."""
    return f"precision.{'fp4' if recipe == FP4 else 'fp8'}={recipe}"


def frozen_precision(config: Config) -> str:
    """Names what reference and guide compute in, for the key of what they computed."""
    recipe, precision = config.frozen_recipe, config.precision
    if recipe is None:
        return precision.dtype
    ends = "-ends-bf16" if precision.first_last_layers_bf16 else ""
    if recipe == FP4:
        return f"{precision.dtype}-fp4-{recipe}{ends}"
    return f"{precision.dtype}-fp8-{recipe}-{precision.fp8_format}{ends}"


def frozen_params_fp8(config: Config) -> bool:
    """Whether reference and guide hold their layers' weights in FP8: where they compute in it, quantised once.

    Only those that ``offload.frozen`` moves are held in the plain dtype, and quantised whenever they come. So are those
    that compute in FP4.
    """
    precision, recipe = config.precision, config.frozen_recipe
    asked = precision.frozen == "fp8" or precision.fp8_params
    return recipe not in (None, FP4) and (asked or not config.offload.frozen)


def linear_bytes(config: Config) -> LinearBytes:
    """What a weight of the layers' linears takes on the device.

    The policy's products read an FP8 or FP4 copy, and its transpose in backward; Transformer Engine keeps both beside
    bf16 weights, and FP8 weights are just these. Frozen models need no transpose.
    """
    plain, recipe = torch.bfloat16.itemsize, config.precision.policy_recipe
    one = _FP4_BYTES if recipe == FP4 else 1
    frozen: float | None = 1 if frozen_params_fp8(config) else None
    if config.frozen_recipe == FP4 and not config.offload.frozen:
        frozen = plain + one
    return LinearBytes(
        policy=None if recipe is None else 2 * one + (0 if config.precision.fp8_params else plain),
        frozen=frozen,
        plain_ends=config.precision.first_last_layers_bf16,
    )


def policy_transformer_kwargs(precision: PrecisionConfig) -> dict[str, Any]:
    """What FP8 or FP4 adds to the policy's LanguageModelConfig."""
    return _transformer_kwargs(precision, precision.policy_recipe, precision.fp8_params)


def frozen_transformer_kwargs(config: Config) -> dict[str, Any]:
    """What FP8 or FP4 adds to the LanguageModelConfig of reference and guide."""
    recipe, held = config.frozen_recipe, frozen_params_fp8(config)
    # Else Transformer Engine keeps what it quantised, and all layers would be on the device after all.
    streamed = recipe is not None and config.offload.frozen and not held
    return _transformer_kwargs(config.precision, recipe, held) | (
        {"disable_parameter_transpose_cache": True} if streamed else {}
    )


def _transformer_kwargs(precision: PrecisionConfig, recipe: str | None, params: bool) -> dict[str, Any]:
    if recipe is None:
        return {}
    ends = {
        "first_last_layers_bf16": precision.first_last_layers_bf16,
        "num_layers_at_start_in_bf16": 1,
        "num_layers_at_end_in_bf16": 1,
    }
    if recipe == FP4:
        return {"fp4": "e2m1", "fp4_recipe": recipe, **ends}
    return {
        "fp8": precision.fp8_format,
        "fp8_recipe": recipe,
        "fp8_param": params,
        "fp8_amax_history_len": precision.fp8_amax_history,
        "fp8_amax_compute_algo": precision.fp8_amax_algorithm,
        **ends,
    }


def check_fp8_sizes(kwargs: Mapping[str, Any], recipe: str, seq_length: int, layout: ParallelLayout) -> None:
    """Checks that every product of a model has sizes that FP8 kernels take.

    Args:
        kwargs: Arguments of the model's LanguageModelConfig.
        recipe: The model's.
        seq_length: Tokens of a pack, over all its ranks.
        layout: The parallel layout.

    Raises:
        UserError: A size is not a multiple of what the recipe asks.
    """
    step, gathered = size_multiple(recipe), token_multiple(recipe, layout.sequence_parallel)
    parts = layout.context * (layout.tensor if layout.sequence_parallel else 1)
    head, groups = kwargs["kv_channels"], kwargs["num_query_groups"]
    query = kwargs["num_attention_heads"] * head
    sizes = {
        "tokens of a pack on one rank (batch.tokens_per_micro_batch)": (seq_length / parts, gathered),
        "hidden size": (kwargs["hidden_size"], gathered),
        "query size of a tensor rank": (query / layout.tensor, step),
        "query, key and value size of a tensor rank": ((query + 2 * groups * head) / layout.tensor, step),
    }
    experts = kwargs.get("num_moe_experts")
    if not experts or "moe_layer_freq" in kwargs:
        sizes["MLP size of a tensor rank"] = (kwargs["ffn_hidden_size"] / layout.tensor, step)
    if experts:
        # Tokens of an expert are padded by megatron-core.
        part = kwargs["moe_ffn_hidden_size"] / layout.expert_shards
        sizes["expert size of a rank (parallel.expert_tensor)"] = (part, step)
        shared = kwargs.get("moe_shared_expert_intermediate_size") or 0
        sizes["shared expert's size of a tensor rank"] = (shared / layout.tensor, step)
    for name, (size, multiple) in sizes.items():
        if size % multiple:
            raise UserError(f"recipe {recipe}: the {name} is {size:g}, it must be a multiple of {multiple}")
