"""What a model family declares: its config in megatron-core's terms and the names and layout of its weights."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from transformers import PretrainedConfig

# How a megatron-core parameter is made of HF tensors, and how tensor parallelism splits it:
#   copy   one tensor, the same on every rank
#   vocab  one tensor, rows split, zero rows added up to the padded vocabulary
#   row    one tensor, columns split (row-parallel linear)
#   glu    gate and up: each split by rows, then joined per rank
#   qkv    query, key, value interleaved per key/value group, then rows split
Kind = Literal["copy", "vocab", "row", "glu", "qkv"]


# A dimension of an HF tensor: vocabulary; hidden; mlp (intermediate size); query and kv (heads x head size).
Dimension = Literal["vocab", "hidden", "mlp", "query", "kv"]


@dataclass(frozen=True)
class Weight:
    """One megatron-core parameter.

    Attributes:
        kind: How the HF tensors become the parameter.
        hf_tensors: (name, shape) of each, ``{layer}`` in the name standing for the 0-based layer.
    """

    kind: Kind
    hf_tensors: tuple[tuple[str, tuple[Dimension, ...]], ...]


@dataclass(frozen=True)
class Family:
    """A model family.

    Attributes:
        architecture: The name in ``config.json``'s ``architectures``.
        check: Raises UserError, naming the key, for any setting that would change the maths and is not supported.
        config_kwargs: The family's part of TransformerConfig's arguments, from the HF config.
        weights: By megatron-core name; names of a layer's parameters are relative to ``decoder.layers.N.``.
        ignored: Endings of HF tensor names that carry no weights.
    """

    architecture: str
    check: Callable[[PretrainedConfig], None]
    config_kwargs: Callable[[PretrainedConfig], dict[str, Any]]
    weights: Mapping[str, Weight]
    ignored: tuple[str, ...] = ()
