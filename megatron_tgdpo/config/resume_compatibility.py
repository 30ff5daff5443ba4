"""What may differ between a run and its continuation, key by key, and what a difference means.

Keys that name files are compared by content: the same bytes at another path are the same, other bytes at the same path
are not. ``INPUTS`` says which, and ``training/run_data.py`` computes the fingerprints.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from enum import Enum
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from megatron_tgdpo.config.loading import to_dict
from megatron_tgdpo.config.schema import Config
from megatron_tgdpo.errors import UserError
from megatron_tgdpo.loss.methods import METHODS


class ChangePolicy(Enum):
    """When a key may have another value than the run had so far."""

    START = "each start's own: it says how this start goes, and is not compared"
    FREE = "always: it does not change what is computed, but for rounding"
    ASKED = "with `train.resume=changed`: from the next step on"
    FIXED = "never: with another value it is another run"


CHANGE_POLICIES: dict[ChangePolicy, tuple[str, ...]] = {
    ChangePolicy.START: ("train.resume", "train.branch_from", "train.rehash", "train.exit_step"),
    ChangePolicy.FREE: (
        "model.layer_spec",
        # The guide that comes of these is compared by its content, as any guide.
        "guide.method", "guide.beta", "guide.gamma", "guide.lr", "guide.steps", "guide.epochs", "guide.output_dir",
        "data.validation", "data.test", "data.columns", "data.workers",
        "guidance.mode", "guidance.cache", "guidance.verify", "guidance.prefetch",
        "parallel.tensor", "parallel.pipeline", "parallel.context", "parallel.virtual_pipeline",
        "parallel.expert", "parallel.expert_tensor",
        "parallel.pipeline_layers",
        "parallel.sequence_parallel", "parallel.device", "parallel.timeout_minutes",
        "batch.tokens_per_micro_batch", "batch.shared_prompts",
        "overlap.grad_reduce", "overlap.param_gather", "overlap.tensor",
        "offload.optimizer", "offload.activations", "offload.frozen", "offload.frozen_from",
        "train.fused", "train.keep_logits_mib", "train.recompute", "train.recompute_modules",
        "train.check_start",
        "eval.every_steps", "eval.generate",
        "checkpoint.every_steps", "checkpoint.keep", "checkpoint.background", "checkpoint.verify",
        "checkpoint.best_metric", "checkpoint.best_mode",
        "export.hf", "export.merge",
        "log.every_steps", "log.timing_every_steps", "log.energy", "log.wandb", "log.mlflow", "log.swanlab",
        "preflight.enabled", "preflight.slow_group_ratio",
        "output_dir",
    ),
    ChangePolicy.ASKED: (
        "model.reference", "model.guide",
        "data.train", "data.max_length", "data.max_prompt_length", "data.overlong_prompt", "data.chat_template",
        "data.template_kwargs",
        "loss.beta", "loss.alpha", "loss.guide_beta", "loss.form", "loss.reference_free", "loss.label_smoothing",
        "loss.sft_weight", "loss.gamma", "loss.weights", "loss.select_share", "guidance.unit",
        "moe.aux_loss_coeff", "moe.z_loss_coeff",
        "batch.global_pairs",
        "optimizer.lr", "optimizer.beta1", "optimizer.beta2", "optimizer.eps", "optimizer.weight_decay",
        "optimizer.clip_grad", "optimizer.schedule", "optimizer.warmup_ratio", "optimizer.warmup_steps",
        "optimizer.moments", "optimizer.main_weights",
        "precision.fp8", "precision.fp8_format", "precision.fp8_amax_history", "precision.fp8_amax_algorithm",
        "precision.fp8_params", "precision.fp4", "precision.first_last_layers_bf16", "precision.frozen",
        "train.steps", "train.epochs",
    ),
    ChangePolicy.FIXED: (
        "model.policy",  # its weights were where the run began, and are its reference by default
        "data.tokenizer",  # the embedding was trained on its ids
        "data.shuffle", "train.seed",  # the order of the epoch under way
        "loss.method",
        "lora.rank", "lora.alpha", "lora.targets", "lora.rslora", "lora.adapter",  # what trains
        "precision.dtype",  # of the weights in the checkpoint
    ),
}  # fmt: skip
POLICY_OF = {key: policy for policy, keys in CHANGE_POLICIES.items() for key in keys}

# Keys that name files, with what they name.
INPUTS = {
    "model.policy": "weights",
    "model.reference": "weights",
    "model.guide": "weights",
    "lora.adapter": "weights",
    "data.train": "token ids",
    "data.validation": "token ids",
    "data.tokenizer": "ids",
    "data.chat_template": "template",
}
# Fingerprints by key of INPUTS; None for a file that the run has not.
Inputs = Mapping[str, str | None]


@dataclass(frozen=True)
class Recorded:
    """What a run was, as its newest checkpoint or its directory says.

    Attributes:
        source: What says so.
        config: All keys of the config that it had, nested; keys that its version did not have are missing.
        inputs: Fingerprints of its inputs; those that were not recorded are missing.
    """

    source: Path
    config: Mapping[str, Any]
    inputs: Inputs


@dataclass(frozen=True)
class Change:
    """A key that has another value, or whose files have another content.

    Attributes:
        key: Dotted.
        was: Its value so far; of a file, its fingerprint.
        now: Its value from here on.
    """

    key: str
    was: Any
    now: Any

    @property
    def policy(self) -> ChangePolicy:
        return POLICY_OF[self.key]

    def __str__(self) -> str:
        if self.key in INPUTS:
            return f"{self.key} of other {INPUTS[self.key]} ({_short(self.now)}, was {_short(self.was)})"
        return f"{self.key} {json.dumps(self.now)}, was {json.dumps(self.was)}"

    def record(self, step: int) -> dict[str, Any]:
        """The change as plain values, for the checkpoints that follow: after which step it took effect."""
        return {"after_step": step, **asdict(self)}


def find_changes(recorded: Recorded, config: Config, inputs: Inputs | None) -> list[Change]:
    """Compares a run with what is to continue it, key by key, in the order of :data:`CHANGE_POLICIES`.

    Args:
        recorded: The run so far.
        config: The config that continues it.
        inputs: Fingerprints of its inputs; None before they are known: then keys of :data:`INPUTS` are left out.
    """
    # A key that the run's version did not have: what it did then is the default.
    defaults = flatten(OmegaConf.to_container(OmegaConf.structured(Config)))  # type: ignore[arg-type]
    theirs, ours = {**defaults, **flatten(recorded.config)}, flatten(to_dict(config))
    # An option that the method has got since.
    loss = {name: theirs[f"loss.{name}"] for name in ("weights", "reference_free")}
    options = METHODS[theirs["loss.method"]].given(loss).options if theirs["loss.method"] in METHODS else {}
    theirs |= {f"loss.{name}": value for name, value in options.items() if theirs[f"loss.{name}"] is None}
    changes = []
    for key, policy in POLICY_OF.items():
        if key in INPUTS:
            if inputs is not None and key in recorded.inputs and recorded.inputs[key] != inputs[key]:
                changes.append(Change(key, recorded.inputs[key], inputs[key]))
        elif policy is not ChangePolicy.START and theirs[key] != ours[key]:
            changes.append(Change(key, theirs[key], ours[key]))
    return changes


def check_changes(recorded: Recorded, changes: list[Change], output_dir: str, *, asked: bool) -> None:
    """Refuses changes that make another run of it, and those that were not asked for.

    Args:
        recorded: The run so far.
        changes: From :func:`find_changes`.
        output_dir: Where it is to be continued.
        asked: Whether keys of ``ChangePolicy.ASKED`` may change.

    Raises:
        UserError: It names the keys.
    """
    fixed = [change for change in changes if change.policy is ChangePolicy.FIXED]
    if fixed:
        section = recorded.config.get("lora") or {}
        lora = section.get("rank") is not None or section.get("adapter") is not None
        raise UserError(
            f"{recorded.source} cannot be continued with {_listed(fixed)}: that makes another run, which may start "
            f"from the {'adapter' if lora else 'weights'} of this one: "
            f"{'lora.adapter' if lora else 'model.policy'}=RUN/checkpoints/step_N, output_dir not {output_dir}"
        )
    unasked = [change for change in changes if change.policy is ChangePolicy.ASKED]
    if unasked and not asked:
        raise UserError(
            f"{recorded.source} was made with other values: {_listed(unasked)}: give train.resume=changed to continue "
            f"with these, what was used so far to continue as before, or another output_dir than {output_dir} "
            "for another run"
        )


def flatten(nested: Mapping[str, Any]) -> dict[str, Any]:
    """Sections and keys as dotted keys."""
    flat: dict[str, Any] = {}
    for section, values in nested.items():
        if isinstance(values, Mapping):
            flat |= {f"{section}.{key}": value for key, value in values.items()}
        else:
            flat[section] = values
    return flat


def _listed(changes: list[Change]) -> str:
    return "; ".join(map(str, changes))


def _short(fingerprint: str | None) -> str:
    return "none" if fingerprint is None else fingerprint[:12]
