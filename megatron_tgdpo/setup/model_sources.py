"""What each model of a run is made of: a whole model, and for some a LoRA adapter on it."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

from megatron_tgdpo.checkpoints.adapter_directory import ALL_LINEAR, LINEARS, Lora, is_adapter, read_base, read_lora
from megatron_tgdpo.checkpoints.model_directory import model_files
from megatron_tgdpo.config.schema import Config
from megatron_tgdpo.errors import UserError
from megatron_tgdpo.planning.memory import Sources
from megatron_tgdpo.setup.fingerprints import weights_fingerprint
from megatron_tgdpo.setup.trained_guide import is_trained
from megatron_tgdpo.storage.hub import local_path

# megatron-core's names of fused linears, for lora.targets.
_FUSED = {
    "qkv": ("q_proj", "k_proj", "v_proj"),
    "proj": ("o_proj",),
    "fc1": ("gate_proj", "up_proj"),
    "fc2": ("down_proj",),
}


@dataclass(frozen=True)
class ModelSource:
    """Where a model comes from.

    Attributes:
        base: Directory of the whole model.
        adapter: Directory of an adapter on it, or None.
    """

    base: Path
    adapter: Path | None = None

    @property
    def files(self) -> list[Path]:
        """Those that make it this model."""
        return model_files(self.base) + ([] if self.adapter is None else model_files(self.adapter))

    def fingerprint(self, digests: Mapping[str, str]) -> str:
        """sha256 (hex) of its weights; ``digests`` of its files are from ``setup/fingerprints.py: hash_files``."""
        base = weights_fingerprint(self.base, digests)
        if self.adapter is None:
            return base
        return sha256(f"{base} {weights_fingerprint(self.adapter, digests)}".encode()).hexdigest()


def model_sources(config: Config) -> dict[str, ModelSource]:
    """The policy, as it begins, and the frozen models that the method uses, by role.

    Adapters are of the policy's base model. A run's names are pinned (``setup/hub_inputs.py``).

    Raises:
        UserError: A checkpoint that is named cannot be read.
    """
    base, adapter = local_path(config.model.policy), config.lora.adapter
    policy = ModelSource(base, None if adapter is None else local_path(adapter))
    found = {"policy": policy}
    for role in config.method.frozen:
        text = {"reference": config.model.reference, "guide": config.model.guide}[role]
        path = None if text is None else local_path(text)
        if path is None:
            found[role] = policy
        else:
            found[role] = ModelSource(base, path) if is_adapter(path) else ModelSource(path)
    return found


def check_bases(sources: Mapping[str, ModelSource], base: str | None) -> None:
    """Compares the base model that an adapter's directory says it is of, where it says so, with the policy's.

    Args:
        sources: From :func:`model_sources`.
        base: Fingerprint of the policy's base model.

    Raises:
        UserError: One is of another.
    """
    for role, source in sources.items():
        theirs = None if source.adapter is None else read_base(source.adapter)
        if theirs is not None and theirs != base:
            raise UserError(
                f"the {role}'s adapter {source.adapter} was trained on another model than model.policy {source.base}: "
                f"the sha256 of its base is {theirs[:12]}, not {str(base)[:12]}: set model.policy to its base model"
            )


def trained_lora(config: Config) -> Lora | None:
    """The adapter that the policy trains; None where all of its weights train.

    Raises:
        UserError: ``lora.adapter`` cannot be read, or is of a kind that is not supported.
    """
    lora = config.lora
    if lora.adapter is not None:
        return read_lora(local_path(lora.adapter))
    if lora.rank is None:
        return None
    alpha = 2.0 * lora.rank if lora.alpha is None else lora.alpha
    return Lora(lora.rank, alpha, lora_targets(lora.targets), lora.rslora)


def planned_sources(config: Config, roles: Iterable[str]) -> Sources:
    """What the models of a run are made of, and which share a base, for the planner; as ``setup/models.py`` loads them.

    Args:
        config: The run.
        roles: Of the models that run, in their order.
    """
    sources, trained = model_sources(config), trained_lora(config)
    frozen: list[tuple[Path | str, Lora | None]] = []
    for role in roles:
        if role != "policy":
            source = sources[role]
            # A whole guide that is still to be trained has weights of its own, though it is planned as the policy.
            own = role == "guide" and trained is None and not is_trained(config)
            adapter = None if source.adapter is None else read_lora(source.adapter)
            frozen.append((role if own else source.base, adapter))
    return Sources.of(sources["policy"].base, trained, frozen)


def lora_targets(given: Any, what: str = "lora.targets") -> tuple[str, ...]:
    """The linears that ``lora.targets`` names, of ``LINEARS``.

    Raises:
        UserError: It names others, or none; the message begins with ``what``.
    """
    if given in (ALL_LINEAR, [ALL_LINEAR]):
        return LINEARS
    names = [given] if isinstance(given, str) else given
    unknown = [name for name in names if not isinstance(name, str) or name not in (*LINEARS, *_FUSED)]
    if unknown or not names:
        known = ", ".join((ALL_LINEAR, *LINEARS, *_FUSED))
        raise UserError(f"{what} names {', '.join(map(str, unknown)) or 'nothing'}: there are {known}")
    wanted = {part for name in names for part in _FUSED.get(name, (name,))}
    return tuple(name for name in LINEARS if name in wanted)
