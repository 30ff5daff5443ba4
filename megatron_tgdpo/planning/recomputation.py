"""Which parts of the policy's layers backward computes again: megatron-core's arguments, and what cannot be.

Source: megatron-core 0.16.1 and 0.19.2 ``transformer_config.py``, ``transformer_layer.py``, ``moe/moe_layer.py`` and
``tensor_parallel/random.py``. What these do not find in a layer they pass over without a word; here it is refused.
"""

from typing import Any

from transformers import PretrainedConfig

from megatron_tgdpo.config.constraints import RECOMPUTE_CHOICES, Rule, first_broken, recomputed_modules
from megatron_tgdpo.errors import UserError
from megatron_tgdpo.models.families import family_of
from megatron_tgdpo.models.hf_weights.mapping import Experts, expert_layers


def recompute_keys(recompute: str) -> dict[str, Any]:
    """The keys of section ``train`` for a value of ``TrainConfig.recomputation``."""
    if recompute in RECOMPUTE_CHOICES:
        return {"recompute": recompute}
    return {"recompute": "selective", "recompute_modules": recompute.split(",")}


def recompute_kwargs(recompute: str) -> dict[str, Any]:
    """megatron-core's arguments for a value of ``TrainConfig.recomputation``."""
    if recompute == "full":
        return {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
    modules = sorted(recomputed_modules(recompute))
    return {"recompute_granularity": "selective", "recompute_modules": modules} if modules else {}


class _Layers:
    """What the rules ask for: the modules, and what the policy's layers have."""

    def __init__(self, recompute: str, hf_config: PretrainedConfig, spec: str, can_discard: bool) -> None:
        family = family_of(hf_config.architectures)
        self.modules, self.experts, self.spec = recomputed_modules(recompute), Experts.of(hf_config), spec
        self.any_dense = not all(expert_layers(hf_config))
        self.pre_norms, self.can_discard = family.config_kwargs(hf_config).get("pre_norms", True), can_discard

    @property
    def first(self) -> str:
        """Of the modules of experts."""
        return min(self.modules & {"moe", "shared_experts"})


_RULES = (
    Rule(
        lambda c: "mlp" in c.modules and not c.any_dense,
        "has mlp, and model.policy experts in its place: choose moe, or shared_experts",
    ),
    Rule(
        lambda c: c.modules & {"moe", "shared_experts"} and c.experts is None,
        "has {c.first}, and model.policy no experts: choose mlp",
    ),
    Rule(
        lambda c: "shared_experts" in c.modules and not c.experts.shared,
        "has shared_experts, and model.policy none: choose moe",
    ),
    Rule(
        lambda c: "layernorm" in c.modules and not c.pre_norms,
        "has layernorm, the norms before attention and MLP, which model.policy has not: remove it",
    ),
    Rule(
        lambda c: "layernorm" in c.modules and c.spec == "transformer_engine" and c.experts is None,
        "has layernorm, which Transformer Engine's linears have inside: remove it",
    ),
    Rule(
        lambda c: "layernorm" in c.modules and not c.can_discard,
        "has layernorm, for which megatron-core needs Transformer Engine on a GPU: install it, or remove layernorm",
    ),
)


def check_recompute(recompute: str, hf_config: PretrainedConfig, spec: str, *, can_discard: bool = True) -> None:
    """Refuses modules that the policy's layers have not.

    Args:
        recompute: ``TrainConfig.recomputation``.
        hf_config: Of the policy.
        spec: Of its layers, ``local`` or ``transformer_engine``.
        can_discard: Whether outputs of norms can be made again: megatron-core asks Transformer Engine whether there is
            FP8 then, without looking whether it is there (on a CPU we answer, ``distributed/cpu_backend.py``).

    Raises:
        UserError: With the module, the reason and the way out.
    """
    message = first_broken(_RULES, _Layers(recompute, hf_config, spec, can_discard))
    if message is not None:
        raise UserError(f"train.recompute_modules {message}")
