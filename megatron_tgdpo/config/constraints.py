"""What a value may be, said at its field with the default, and what several values may be together.

A field of a section is ``name: int = positive(4)``: what the functions here return stands for the default, and carries
what holds of the value. Null, where the field's type has it, is always allowed.
"""

from collections.abc import Callable, Collection, Iterable
from dataclasses import field
from typing import Any, NamedTuple

FP8_RECIPES = ("none", "delayed", "tensorwise", "blockwise", "mxfp8")
FP4 = "nvfp4"
FP4_RECIPES = ("none", FP4)
MOMENTS = ("fp32", "bf16", "fp8")
RECOMPUTE_CHOICES = ("none", "selective", "full")  # in the order of their cost
# Parts of a layer that selective recomputation may compute again, by megatron-core's names.
RECOMPUTE_MODULES = ("core_attn", "layernorm", "mlp", "moe", "shared_experts")

# FP8 scaling without a memory: what a weight or activation becomes depends on nothing but itself.
STATELESS_RECIPES = ("tensorwise", "blockwise", "mxfp8")
# Those that linears may compute in beside adapters; None is the plain dtype.
BESIDE_ADAPTERS = (None, "tensorwise", "blockwise")
# Those that the grouped products of experts may be made in.
WITH_EXPERTS = (None, "tensorwise", "blockwise")

# What is wrong with a value, as it follows "KEY is "; None for nothing.
Constraint = Callable[[Any], str | None]


def positive(default: Any, *, at_most: float | None = None) -> Any:
    """A number above 0; above ``at_most`` it is a slip."""
    return _number(default, at_most, lambda value: value > 0, "it must be positive")


def at_least(least: float, default: Any, *, at_most: float | None = None) -> Any:
    """A number that is not less; above ``at_most`` it is a slip."""
    must = f"be at least {least}" if least else "not be negative"
    return _number(default, at_most, lambda value: value >= least, f"it must {must}")


def fraction(default: Any, *, below: float = 1) -> Any:
    """A number in [0, below)."""
    return _number(default, None, lambda value: 0 <= value < below, f"it must be in [0, {below})")


def share(default: Any) -> Any:
    """A number in [0, 1]."""
    return _number(default, None, lambda value: 0 <= value <= 1, "it must be in [0, 1]")


def one_of(choices: Collection[str], default: Any) -> Any:
    """One of some words."""

    def constraint(value: Any) -> str | None:
        return None if value in choices else f"'{value}': choose one of {', '.join(choices)}"

    return field(default=default, metadata={"constraint": constraint})


def some_of(choices: Collection[str], default: Any) -> Any:
    """A list of some words, each once."""

    def constraint(value: Any) -> str | None:
        unknown = [word for word in value if word not in choices]
        if value and not unknown and len(set(value)) == len(value):
            return None
        return f"{value}: choose one or more of {', '.join(choices)}, each once"

    return field(default=default, metadata={"constraint": constraint})


def recomputed_modules(recompute: str) -> frozenset[str]:
    """The parts of a layer that selective recomputation computes again: of ``TrainConfig.recomputation``."""
    if recompute in ("none", "full"):
        return frozenset()
    return frozenset(("core_attn",) if recompute == "selective" else recompute.split(","))


def _number(default: Any, at_most: float | None, holds: Callable[[Any], bool], must: str) -> Any:
    def constraint(value: Any) -> str | None:
        return None if holds(value) else f"{value}: {must}"

    return field(default=default, metadata={"constraint": constraint, "at_most": at_most})


class Rule(NamedTuple):
    """What values must not be together.

    Attributes:
        broken: Whether they are so, of what the rules of a table are about, such as the config.
        message: What to say then, with the keys and the way out; ``{c...}`` stands for attributes of that.
    """

    broken: Callable[[Any], bool]
    message: str


def first_broken(rules: Iterable[Rule], c: Any) -> str | None:
    """The message of the first rule that is broken; later ones may build on it."""
    return next((rule.message.format(c=c) for rule in rules if rule.broken(c)), None)


def size_multiple(recipe: str) -> int:
    """What the sizes of an FP8 or FP4 product must be multiples of.

    Source: TransformerEngine 2.9 to 2.20 ``pytorch/utils.py: assert_dim_for_fp8_exec``.
    """
    return 32 if recipe in ("mxfp8", FP4) else 16


def token_multiple(recipe: str, sequence_parallel: bool) -> int:
    """The same of the tokens on one rank; blocks are gathered whole by tensor ranks: ``assert_dim_for_all_gather``."""
    return 128 if recipe == "blockwise" and sequence_parallel else size_multiple(recipe)
