"""What of FP8 and FP4 neither megatron-core, Transformer Engine nor the GPU may be asked.

Pure functions of their arguments. Sources of the refusals: megatron-core 0.16.1 and 0.19.2
``transformer/transformer_config.py: __post_init__``, ``fp8_utils.py: get_fp8_context``, ``fp4_utils.py:
get_fp4_context`` and ``optimizer/``; Megatron-LM 0.16.1 ``training/arguments.py: validate_args``; TransformerEngine 2.9
to 2.20 ``pytorch/quantization.py: check_*_support``.
"""

from dataclasses import dataclass

from megatron_tgdpo.config.constraints import FP4, Rule, first_broken
from megatron_tgdpo.config.schema import Config
from megatron_tgdpo.errors import UserError
from megatron_tgdpo.gpu.capabilities import OLDEST_TE, Capabilities, Version, dotted, supported_engine
from megatron_tgdpo.gpu.fp8 import asked_by, frozen_params_fp8


def check_precision(config: Config, found: Capabilities, spec: str) -> None:
    """Refuses every precision that megatron-core, Transformer Engine or the GPU would reject, or that means nothing.

    Args:
        config: The run.
        found: The machine.
        spec: The resolved layer spec.

    Raises:
        UserError: Names the key, the reason and the way out.
    """
    asked = _Asked(config, config.precision.policy_recipe, config.frozen_recipe, found, spec)
    rules = (*_MEANING, *_MACHINE) if asked.recipes else _MEANING
    broken = first_broken(rules, asked)
    if broken:
        raise UserError(broken)
    for recipe in asked.recipes:
        key = asked_by(recipe) if recipe == asked.policy else f"precision.frozen=fp8 (recipe {recipe})"
        broken = first_broken(_GPU, _Kernels(recipe, key, found.compute_capability or (0,), found.cuda or (0,)))
        if broken:
            raise UserError(broken)
    if config.offload.frozen and frozen_params_fp8(config):
        raise UserError("offload.frozen moves plain weights only: set it to false, or keep frozen weights out of FP8")


@dataclass(frozen=True)
class _Asked:
    """What the rules are about."""

    config: Config
    policy: str | None
    frozen: str | None
    found: Capabilities
    spec: str

    @property
    def recipes(self) -> list[str]:
        return sorted({recipe for recipe in (self.policy, self.frozen) if recipe})

    @property
    def computes_in(self) -> tuple[str, str]:
        """Of the policy, and of reference and guide."""
        dtype = self.config.precision.dtype
        return self.policy or dtype, self.frozen or dtype

    @property
    def kind(self) -> str:
        return "FP4" if FP4 in self.recipes else "FP8"

    @property
    def engine(self) -> str:
        return dotted(self.found.transformer_engine)


@dataclass(frozen=True)
class _Kernels:
    """A recipe, the key that asks for it, and what runs it."""

    recipe: str
    key: str
    capability: Version
    cuda: Version

    @property
    def found(self) -> tuple[str, str]:
        """Compute capability of the GPU, and CUDA that torch was built with."""
        return dotted(self.capability), dotted(self.cuda)


# What means nothing, or something else than it says.
_MEANING = (
    Rule(
        lambda c: c.config.precision.fp4 != "none" and c.config.precision.fp8 != "none",
        "precision.fp4 and precision.fp8 are for the same products: set one of them to none",
    ),
    Rule(
        lambda c: c.config.precision.dtype == "fp32" and c.config.precision.frozen == "bf16",
        "precision.frozen=bf16 with precision.dtype=fp32: all models have one dtype, set precision.frozen=same",
    ),
    Rule(
        lambda c: c.config.precision.fp8 == "none" and c.config.precision.fp8_params,
        "precision.fp8_params=true needs precision.fp8: choose a recipe, or set it to false",
    ),
    Rule(
        lambda c: not c.recipes and c.config.precision.first_last_layers_bf16,
        "precision.first_last_layers_bf16=true without FP8 or FP4 means nothing: set it to false",
    ),
    Rule(
        lambda c: c.policy == "delayed" and c.config.precision.first_last_layers_bf16,
        "precision.first_last_layers_bf16 does not go with fp8=delayed, whose amax reduction spans all layers: "
        "choose another recipe",
    ),
    Rule(
        lambda c: c.policy == "delayed" and c.config.precision.frozen == "same" and bool(c.config.method.frozen),
        "precision.frozen=same with fp8=delayed would make the reference depend on what it saw before: set "
        "precision.frozen to bf16 or fp8 (with tensorwise scaling)",
    ),
    Rule(
        lambda c: c.policy == "mxfp8" and c.config.precision.fp8_params,
        "precision.fp8_params with fp8=mxfp8 would keep weights in the gradient buffer between steps, which this "
        "trainer does not arrange: set it to false",
    ),
    Rule(
        lambda c: c.config.offload.optimizer and c.config.precision.fp8_params and c.policy != "delayed",
        "offload.optimizer with precision.fp8_params works with fp8=delayed only: switch one of them off",
    ),
    Rule(
        lambda c: c.config.method.frozen and c.policy != c.frozen and c.config.train.check_start,
        "the policy computes in {c.computes_in[0]}, reference and guide in {c.computes_in[1]}, so the first loss is "
        "not ln 2: set train.check_start=false, or precision.frozen=same",
    ),
)


# What FP8 needs.
_MACHINE = (
    Rule(
        lambda c: c.config.precision.dtype != "bf16",
        "precision.fp8, precision.fp4 and precision.frozen=fp8 need precision.dtype=bf16 for everything beside",
    ),
    Rule(
        lambda c: c.found.device != "cuda" or c.found.compute_capability is None,
        "{c.kind} needs a CUDA GPU: set precision.fp8=none, precision.fp4=none and precision.frozen=same",
    ),
    Rule(
        lambda c: not supported_engine(c.found.transformer_engine),
        f"{{c.kind}} needs Transformer Engine >={dotted(OLDEST_TE)}, found {{c.engine}}: install one of these, or set "
        "precision.fp8=none, precision.fp4=none and precision.frozen=same",
    ),
    Rule(
        lambda c: c.spec != "transformer_engine",
        "{c.kind} needs model.layer_spec=transformer_engine (or auto): the local layers have no {c.kind}",
    ),
)


# What a recipe needs of the GPU.
_GPU = (
    Rule(
        lambda c: c.recipe == "nvfp4" and not (10, 0) <= c.capability < (12, 0),
        "{c.key} needs compute capability 10.x (Blackwell), this GPU has {c.found[0]}: set it to none",
    ),
    Rule(
        lambda c: c.recipe == "nvfp4" and c.cuda < (12, 8),
        "{c.key} needs CUDA 12.8, torch was built with {c.found[1]}: set it to none",
    ),
    Rule(
        lambda c: c.capability < (8, 9),
        "{c.key} needs compute capability 8.9 (Ada, Hopper or later), this GPU has {c.found[0]}",
    ),
    Rule(
        lambda c: c.capability < (9, 0) and c.cuda < (12, 1),
        "{c.key} on Ada needs CUDA 12.1, torch was built with {c.found[1]}",
    ),
    Rule(
        lambda c: c.recipe == "blockwise" and (c.capability < (9, 0) or c.cuda < (12, 9)),
        "{c.key} needs compute capability 9.0 (Hopper or later) and CUDA 12.9, found {c.found[0]} and {c.found[1]}",
    ),
    Rule(
        lambda c: c.recipe == "mxfp8" and not (10, 0) <= c.capability < (12, 0),
        "{c.key} needs compute capability 10.x (Blackwell), this GPU has {c.found[0]}: choose another recipe",
    ),
)
