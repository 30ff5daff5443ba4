"""Whether models divide by a parallel layout, from their HF configs alone: megatron-core is not imported for it.

Heads and sizes must divide by the tensor ranks; of layers every stage, and every chunk, needs one.
"""

from collections.abc import Callable, Mapping
from typing import Any

from transformers import PretrainedConfig

from megatron_tgdpo.distributed.layout import ParallelLayout
from megatron_tgdpo.errors import UserError
from megatron_tgdpo.models.families import family_of

# No layout has more ranks of one kind than there are of what they share.
_SHARED = ("num_layers", "num_attention_heads", "num_moe_experts")


def check_layout(configs: Mapping[str, PretrainedConfig], layout: ParallelLayout) -> None:
    """Checks that every model divides by the layout.

    Raises:
        UserError: One does not; the message names its role, and the sizes by which all of them do.
    """
    sizes = {role: _sizes(hf_config) for role, hf_config in configs.items()}
    _check_experts(sizes, layout)
    for role, kwargs in sizes.items():
        for key, size, problem in _PROBLEMS:
            why = problem(kwargs, size(layout), layout)
            if why is None:
                continue
            most = max(each.get(name) or 1 for each in sizes.values() for name in _SHARED)
            divide = [
                number
                for number in range(1, most + 1)
                if all(problem(each, number, layout) is None for each in sizes.values())
            ]
            raise UserError(f"model.{role}: {why}: set {key} to {_choices(divide)}")


def check_divides(kwargs: Mapping[str, Any], layout: ParallelLayout) -> None:
    """Checks one model; of arguments for megatron-core's config.

    Raises:
        UserError: It does not divide.
    """
    for _, size, problem in _PROBLEMS:
        why = problem(kwargs, size(layout), layout)
        if why is not None:
            raise UserError(why)


def _sizes(hf_config: PretrainedConfig) -> dict[str, Any]:
    family = family_of(hf_config.architectures)
    family.check(hf_config)
    return family.config_kwargs(hf_config)


def _choices(numbers: list[int]) -> str:
    if not numbers:
        return "1, and parallel.pipeline to fewer"
    if len(numbers) > 2 and numbers == list(range(1, len(numbers) + 1)):
        return f"at most {numbers[-1]}"
    *others, last = map(str, numbers)
    return f"{', '.join(others)} or {last}" if others else last


def _stages(kwargs: Mapping[str, Any], pp: int, layout: ParallelLayout) -> str | None:
    layers = kwargs["num_layers"]
    return f"{layers} layers are fewer than parallel.pipeline = {pp} stages" if layers < pp else None


def _chunks(kwargs: Mapping[str, Any], chunks: int, layout: ParallelLayout) -> str | None:
    layers, pp = kwargs["num_layers"], layout.pipeline
    if layers < pp * chunks:
        return f"{layers} layers are fewer than parallel.pipeline x virtual_pipeline = {pp} x {chunks}"
    return None


def _tensor_ranks(kwargs: Mapping[str, Any], tp: int, layout: ParallelLayout) -> str | None:
    groups = kwargs["num_query_groups"]
    if kwargs["num_attention_heads"] % tp:
        return f"{kwargs['num_attention_heads']} attention heads are not divisible by parallel.tensor = {tp}"
    if groups % tp and tp % groups:
        return f"{groups} key/value heads neither divide nor are divisible by parallel.tensor = {tp}"
    shared = kwargs.get("moe_shared_expert_intermediate_size", 0)
    if shared % tp:
        return f"size {shared} of the shared expert is not divisible by parallel.tensor = {tp}"
    if kwargs.get("qk_projection_norm") and tp > groups:
        return f"a norm over all of {groups} key/value heads, which parallel.tensor = {tp} would divide"
    has_dense = not kwargs.get("num_moe_experts") or "moe_layer_freq" in kwargs
    if has_dense and kwargs["ffn_hidden_size"] % tp:
        return f"MLP size {kwargs['ffn_hidden_size']} is not divisible by parallel.tensor = {tp}"
    return None


def _expert_ranks(kwargs: Mapping[str, Any], ep: int, layout: ParallelLayout) -> str | None:
    experts = kwargs.get("num_moe_experts")
    return f"{experts} experts are not divisible by parallel.expert = {ep}" if experts and experts % ep else None


def _expert_shards(kwargs: Mapping[str, Any], etp: int, layout: ParallelLayout) -> str | None:
    size = kwargs.get("moe_ffn_hidden_size")
    if size and etp > 1 and kwargs["add_bias_linear"]:
        return f"experts with biases, which parallel.expert_tensor = {etp} would add {etp} times"
    return f"expert size {size} is not divisible by parallel.expert_tensor = {etp}" if size and size % etp else None


def _check_experts(sizes: Mapping[str, Mapping[str, Any]], layout: ParallelLayout) -> None:
    with_experts = [role for role, kwargs in sizes.items() if kwargs.get("num_moe_experts")]
    if layout.splits_experts and not with_experts:
        raise UserError(
            f"parallel.expert is {layout.expert} and expert_tensor {layout.expert_shards}, but no model has experts: "
            "remove both keys"
        )
    if with_experts and layout.tensor > 1 and not layout.sequence_parallel:
        raise UserError(
            f"model.{with_experts[0]} has experts, which under parallel.tensor = {layout.tensor} would get every token "
            f"{layout.tensor} times: set parallel.sequence_parallel=true"
        )


# A key, its value in a layout, and what is wrong with such a value for a model.
_Problem = Callable[[Mapping[str, Any], int, ParallelLayout], str | None]
_PROBLEMS: tuple[tuple[str, Callable[[ParallelLayout], int], _Problem], ...] = (
    ("parallel.pipeline", lambda layout: layout.pipeline, _stages),
    ("parallel.virtual_pipeline", lambda layout: layout.virtual, _chunks),
    ("parallel.tensor", lambda layout: layout.tensor, _tensor_ranks),
    ("parallel.expert", lambda layout: layout.expert, _expert_ranks),
    ("parallel.expert_tensor", lambda layout: layout.expert_shards, _expert_shards),
)
