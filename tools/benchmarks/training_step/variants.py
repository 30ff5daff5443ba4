"""The variants that can be compared. Their modules are imported in their own processes only."""

import os
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

from megatron_tgdpo.errors import UserError
from tools.benchmarks.training_step.problem import Problem
from tools.benchmarks.training_step.recorder import Recorder

Run = Callable[[Problem, Recorder], None]
# Adam's first steps have the size of the learning rate, whatever the gradient's: where gradients cancel, rounding
# decides their sign, and the losses after that differ. A wrong mask or factor shows as 1e-2. Equality to 1e-5 is what
# tests/distributed/test_equivalence.py is for.
_LOSS_TOLERANCE = 2e-4


@dataclass(frozen=True)
class Variant:
    """One way to make a step.

    Attributes:
        name: On the command line and in tables.
        objective: ``tgdpo`` or ``dpo``, of all weights or with LoRA; losses of all variants of an objective must agree.
        models: What runs in a step.
        load: Imports what the variant needs and returns what runs all steps of a problem.
        frozen: Models of a step that have no backward pass.
        shared_prompts: Whether a pair's prompt is computed once.
        loss_tolerance: Largest relative difference of a step's loss, in fp32, from the first variant of the objective.
    """

    name: str
    objective: str
    models: str
    load: Callable[[], Run]
    frozen: int
    shared_prompts: bool = True
    loss_tolerance: float = _LOSS_TOLERANCE


def _reference(*, guided: bool) -> Callable[[], Run]:
    def load() -> Run:
        from tools.benchmarks.training_step import reference_step

        return lambda problem, recorder: reference_step.run(problem, recorder, guided=guided)

    return load


def _trl(*, lora: bool) -> Callable[[], Run]:
    def load() -> Run:
        from tools.benchmarks.training_step import trl_step

        return lambda problem, recorder: trl_step.run(problem, recorder, lora=lora)

    return load


def _ours(
    *, guided: bool, mode: str, shared_prompts: bool = True, lora: bool = False, disk: bool = False, **train: Any
) -> Callable[[], Run]:
    def load() -> Run:
        from tools.benchmarks.training_step import our_step

        def run(problem: Problem, recorder: Recorder) -> None:
            offload = {"frozen": True, "frozen_from": "disk"} if disk else {}
            config = our_step.our_config(
                problem,
                guided=guided,
                mode=mode,
                shared_prompts=shared_prompts,
                lora=lora,
                train=train,
                offload=offload,
            )
            our_step.run(problem, recorder, config)

        return run

    return load


# The baseline of all ratios.
REFERENCE = "reference"
# The yardstick of cached guidance.
POLICY_ONLY = "dpo-cached"
# As little memory as a step can do with.
_LEAN: dict[str, Any] = {"keep_logits_mib": 0, "recompute": "full"}
_MODULES: dict[str, Any] = {"recompute": "selective", "recompute_modules": ["layernorm", "mlp"]}
_THREE, _TWO, _ADAPTERS = "policy, reference, guide", "policy, reference", "base, two adapters"
VARIANTS = {
    variant.name: variant
    for variant in (
        Variant(REFERENCE, "tgdpo", _THREE, _reference(guided=True), 2, False),
        Variant("colocated", "tgdpo", _THREE, _ours(guided=True, mode="colocated"), 2),
        Variant(
            "colocated-unshared", "tgdpo", _THREE, _ours(guided=True, mode="colocated", shared_prompts=False), 2, False
        ),
        Variant("colocated-lean", "tgdpo", _THREE, _ours(guided=True, mode="colocated", **_LEAN), 2),
        Variant("colocated-disk", "tgdpo", _THREE, _ours(guided=True, mode="colocated", disk=True, **_LEAN), 2),
        Variant("cached", "tgdpo", "policy", _ours(guided=True, mode="cached"), 0),
        Variant(
            "cached-unshared", "tgdpo", "policy", _ours(guided=True, mode="cached", shared_prompts=False), 0, False
        ),
        Variant("cached-lean", "tgdpo", "policy", _ours(guided=True, mode="cached", **_LEAN), 0),
        Variant("cached-selective", "tgdpo", "policy", _ours(guided=True, mode="cached", recompute="selective"), 0),
        Variant("cached-modules", "tgdpo", "policy", _ours(guided=True, mode="cached", **_MODULES), 0),
        Variant("cached-full", "tgdpo", "policy", _ours(guided=True, mode="cached", recompute="full"), 0),
        Variant("reference-dpo", "dpo", _TWO, _reference(guided=False), 1, False),
        Variant("trl", "dpo", _TWO, _trl(lora=False), 1, False),
        Variant("dpo-colocated", "dpo", _TWO, _ours(guided=False, mode="colocated"), 1),
        Variant(POLICY_ONLY, "dpo", "policy", _ours(guided=False, mode="cached"), 0),
        Variant("lora", "tgdpo-lora", _ADAPTERS, _ours(guided=True, mode="colocated", lora=True), 2),
        Variant("lora-lean", "tgdpo-lora", _ADAPTERS, _ours(guided=True, mode="colocated", lora=True, **_LEAN), 2),
        Variant("lora-dpo", "dpo-lora", _ADAPTERS, _ours(guided=False, mode="colocated", lora=True), 1),
        Variant("trl-lora", "dpo-lora", _ADAPTERS, _trl(lora=True), 1, False),
    )
}
# Packages that variants need.
_NEEDS = {"trl": ("trl",), "trl-lora": ("trl", "peft")}
CACHED = ("cached", "cached-unshared", "cached-lean", "cached-selective", "cached-modules", "cached-full", POLICY_ONLY)


def usable_cores() -> int:
    """Cores of this process, which may be fewer than the machine's."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def choose_variants(names: list[str] | None) -> tuple[list[Variant], list[str]]:
    """The variants of these names, all by default, and lines that say which are left out and why.

    Raises:
        UserError: A name is unknown, or names a variant that cannot run here.
    """
    unknown = [name for name in names or () if name not in VARIANTS]
    if unknown:
        raise UserError(f"--variants: there is no variant '{unknown[0]}', choose from {', '.join(VARIANTS)}")
    chosen = [VARIANTS[name] for name in names or VARIANTS]
    wanted = {variant.name: _NEEDS[variant.name] for variant in chosen if variant.name in _NEEDS}
    absent = {name: [one for one in needs if find_spec(one) is None] for name, needs in wanted.items()}
    whys = {
        name: f"{' and '.join(needs)} {'are' if len(needs) > 1 else 'is'} not installed: "
        "pip install 'megatron-tgdpo[benchmark]'"
        for name, needs in absent.items()
        if needs
    }
    if names and whys:
        raise UserError(f"--variants: {next(iter(whys.values()))}")
    left_out = [f"variant {name} is left out: {why}" for name, why in whys.items()]
    return [variant for variant in chosen if variant.name not in whys], left_out
