"""What a model family declares: its config in megatron-core's terms and the names and layout of its weights."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from transformers import PretrainedConfig

from megatron_tgdpo.errors import UserError

# How a megatron-core parameter is made of HF tensors, and how tensor parallelism splits it:
#   copy   one tensor, the same on every rank
#   vocab  one tensor, rows split, zero rows added up to the padded vocabulary
#   row    one tensor, columns split (row-parallel linear)
#   glu    gate and up: each split by rows, then joined per rank
#   qkv    query, key, value interleaved per key/value group, then rows split (weights and biases)
#   column one tensor, rows split (as of a column-parallel linear)
#   fused_glu, fused_qkv   as glu and qkv, of one tensor that has the parts one after another
# Of an expert, in one tensor that has all experts along its first axis, matrices transposed:
#   stacked_copy   the same on every rank
#   stacked_row    a row-parallel linear's
#   stacked_glu    gate and up, an element of the one after one of the other
Kind = Literal[
    "copy",
    "vocab",
    "row",
    "glu",
    "qkv",
    "column",
    "fused_glu",
    "fused_qkv",
    "stacked_copy",
    "stacked_row",
    "stacked_glu",
]
STACKED: tuple[Kind, ...] = ("stacked_copy", "stacked_row", "stacked_glu")

# A dimension of an HF tensor: vocabulary; hidden; mlp (intermediate size); query and kv (heads x head size); head size;
# the number of query heads; gate_up (twice mlp); qkv (query and twice kv); the number of experts, the intermediate size
# of each, twice that, and of the one that all tokens go to; one.
Dimension = Literal[
    "vocab",
    "hidden",
    "mlp",
    "query",
    "kv",
    "head",
    "heads",
    "gate_up",
    "qkv",
    "experts",
    "expert_mlp",
    "expert_gate_up",
    "shared_mlp",
    "one",
]


@dataclass(frozen=True)
class Weight:
    """One megatron-core parameter.

    Attributes:
        kind: How the HF tensors become the parameter.
        hf_tensors: (name, shape) of each, ``{layer}`` in the name standing for the 0-based layer, ``{expert}`` for the
            0-based expert, each of which has such a parameter.
        only_if: The key of the HF config without which there is no such parameter; None if there always is.
    """

    kind: Kind
    hf_tensors: tuple[tuple[str, tuple[Dimension, ...]], ...]
    only_if: str | None = None

    @property
    def of_layer(self) -> bool:
        """Whether each layer has one."""
        return "{layer}" in self.hf_tensors[0][0]

    @property
    def of_expert(self) -> bool:
        """Whether each expert of each layer has one."""
        return "{expert}" in self.hf_tensors[0][0] or self.kind in STACKED


# What names of a layer's weights begin with that belong to a dense MLP, and to experts in its place.
_DENSE_MLP = ("mlp.linear_",)
_EXPERT_MLP = ("mlp.router.", "mlp.experts.", "mlp.shared_experts.")

# Keys that no family's maths depends on, beside those of transformers' base class (dtype, id2label, ...).
_HARMLESS_KEYS = frozenset(
    {
        "bos_token_id",
        "eos_token_id",
        "pad_token_id",
        "initializer_range",
        "use_cache",
        "pretraining_tp",
        "cache_implementation",
        # How transformers would split the model; it is no part of its maths, and some versions write it.
        "base_model_tp_plan",
        "base_model_pp_plan",
        "base_model_ep_plan",
    }
)


# Keys that change the maths and that the older of the supported transformers versions do not declare.
_LATER_KEYS = {"use_bidirectional_attention": None}


@dataclass(frozen=True)
class Family:
    """A model family.

    Attributes:
        architecture: The name in ``config.json``'s ``architectures``.
        config_keys: Keys of the HF config that ``config_kwargs`` and this project take into account. Every other key
            that transformers' config class declares must have its default value.
        config_kwargs: The family's part of LanguageModelConfig's arguments, from the HF config.
        weights: By megatron-core name; names of a layer's parameters are relative to ``decoder.layers.N.``.
    """

    architecture: str
    config_keys: frozenset[str]
    config_kwargs: Callable[[PretrainedConfig], dict[str, Any]]
    weights: Mapping[str, Weight]

    @property
    def has_experts(self) -> bool:
        """Whether MLPs are a router and experts, of some layers at least."""
        return any(weight.of_expert for weight in self.weights.values())

    def layer_weights(self, *, experts: bool) -> dict[str, Weight]:
        """The weights of a layer, which has experts, or a dense MLP."""
        others = _DENSE_MLP if experts else _EXPERT_MLP
        return {
            name: weight for name, weight in self.weights.items() if weight.of_layer and not name.startswith(others)
        }

    def check(self, hf_config: PretrainedConfig) -> None:
        """Refuses, by name, every setting that the family does not know of and that is not the default.

        Raises:
            UserError: There is one.
        """
        defaults = {**_LATER_KEYS, **vars(type(hf_config)())}
        free = self.config_keys | _HARMLESS_KEYS | vars(PretrainedConfig()).keys()
        for key in sorted(defaults.keys() - free):
            value, default = getattr(hf_config, key, None), defaults[key]
            # None and False both mean "without".
            if (value or None) != (default or None):
                raise UserError(
                    f"config.json: {key} is {value!r}, only {default!r} is supported for {self.architecture}"
                )
