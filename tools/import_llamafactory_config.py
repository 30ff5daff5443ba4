"""Turns a YAML of the TGDPO reference code (LLaMA-Factory's keys) into this project's configuration.

    python -m tools.import_llamafactory_config REFERENCE.yaml --ranks 8 --out config.yaml
        (--dataset-info dataset_info.json | --train pairs.jsonl [--validation F])

``--ranks`` is the number of GPUs that the reference run used: its batch size is per device, ours is global. Datasets
have names there, which ``dataset_info.json`` explains, and paths here. Keys without counterpart are listed; those that
would change the maths are refused.
"""

import argparse
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from megatron_tgdpo.config import config_from_dict, to_yaml
from megatron_tgdpo.errors import UserError
from megatron_tgdpo.run_directory import write_atomically
from tools.llamafactory_datasets import dataset_file

# Reference key -> our key, value as it is.
_RENAMED = {
    "model_name_or_path": "model.policy",
    "ref_model": "model.reference",
    "tgdpo_reward_model": "model.guide",
    "cutoff_len": "data.max_length",
    "max_prompt_length": "data.max_prompt_length",
    "preprocessing_num_workers": "data.workers",
    "output_dir": "output_dir",
    "logging_steps": "log.every_steps",
    "save_steps": "checkpoint.every_steps",
    "save_total_limit": "checkpoint.keep",
    "eval_steps": "eval.every_steps",
    "learning_rate": "optimizer.lr",
    "warmup_ratio": "optimizer.warmup_ratio",
    "weight_decay": "optimizer.weight_decay",
    "max_grad_norm": "optimizer.clip_grad",
    "adam_beta1": "optimizer.beta1",
    "adam_beta2": "optimizer.beta2",
    "adam_epsilon": "optimizer.eps",
    "seed": "train.seed",
}
# Values without which the reference run would compute something else than this project does.
_REQUIRED_VALUES: dict[str, tuple[Any, ...]] = {
    "pref_loss": ("sigmoid", "simpo"),
    "finetuning_type": ("full",),
    "stage": ("tgdpo", "dpo"),
}
# Reference key -> our option of the loss.
_LOSS_OPTIONS = {
    "pref_beta": "beta",
    "tgdpo_alpha": "alpha",
    "pref_ftx": "sft_weight",
    "dpo_label_smoothing": "label_smoothing",
    "simpo_gamma": "gamma",
}
# What the reference code reads only for one method.
_ONLY_FOR = {"tgdpo_alpha": "tgdpo", "tgdpo_reward_model": "tgdpo", "simpo_gamma": "simpo"}
_SCHEDULES = {"cosine": "cosine", "linear": "linear", "constant": "constant", "constant_with_warmup": "constant"}
_HANDLED = {
    "per_device_train_batch_size", "gradient_accumulation_steps", "num_train_epochs", "max_steps", "lr_scheduler_type",
    "bf16", "fp16", "dataset", "eval_dataset", *_RENAMED, *_REQUIRED_VALUES, *_LOSS_OPTIONS,
}  # fmt: skip


def convert(reference: Mapping[str, Any], ranks: int, train: str, validation: str | None) -> dict[str, Any]:
    """Maps the reference code's keys to ours.

    Args:
        reference: The parsed YAML.
        ranks: GPUs of the reference run.
        train: Path of the training pairs.
        validation: Path of the validation pairs, or None.

    Returns:
        Nested values for :func:`megatron_tgdpo.config.config_from_dict`.

    Raises:
        UserError: A key has a value that this project does not compute; the message names it.
    """
    for key, allowed in _REQUIRED_VALUES.items():
        if key in reference and reference[key] not in allowed:
            raise UserError(f"{key}: {reference[key]} is not supported here, only {', '.join(map(str, allowed))}")
    schedule = reference.get("lr_scheduler_type", "linear")
    if schedule not in _SCHEDULES:
        raise UserError(f"lr_scheduler_type: {schedule} is not supported here, only {', '.join(_SCHEDULES)}")
    if reference.get("fp16"):
        raise UserError("fp16: true is not supported here, use bf16")
    method = "simpo" if reference.get("pref_loss") == "simpo" else reference.get("stage", "dpo")
    used = {key: value for key, value in reference.items() if _ONLY_FOR.get(key, method) == method}
    flat = {ours: used[theirs] for theirs, ours in _RENAMED.items() if theirs in used}
    flat |= {f"loss.{ours}": used[theirs] for theirs, ours in _LOSS_OPTIONS.items() if theirs in used}
    for option in ("loss.sft_weight", "loss.label_smoothing"):
        if not flat.get(option):
            # 0 is how the reference code says that it is not used, whatever the method.
            flat.pop(option, None)
    per_device = reference.get("per_device_train_batch_size", 8)
    flat |= {
        "loss.method": method,
        "data.train": train,
        "data.validation": validation,
        "batch.global_pairs": per_device * reference.get("gradient_accumulation_steps", 1) * ranks,
        "optimizer.schedule": _SCHEDULES[schedule],
        "precision.dtype": "bf16" if reference.get("bf16") else "fp32",
        # Where the file is silent, what LLaMA-Factory and transformers default to.
        "optimizer.warmup_ratio": reference.get("warmup_ratio", 0.0),
        "train.seed": reference.get("seed", 42),
    }
    if method == "simpo":
        flat = {"loss.beta": 0.1, "loss.gamma": 0.5, **flat}
    if reference.get("max_steps", -1) > 0:
        flat["train.steps"] = reference["max_steps"]
    else:
        flat["train.epochs"] = reference.get("num_train_epochs", 3.0)
    nested: dict[str, Any] = {}
    for name, value in flat.items():
        section, _, key = name.rpartition(".")
        (nested.setdefault(section, {}) if section else nested)[key] = value
    return nested


def not_carried_over(reference: Mapping[str, Any]) -> list[str]:
    """Keys of the reference file that have no counterpart."""
    return sorted(set(reference) - _HANDLED)


def main() -> None:
    """Command line; see the module."""
    parser = argparse.ArgumentParser(
        prog="python -m tools.import_llamafactory_config", description=__doc__.split("\n")[0]
    )
    parser.add_argument("reference", type=Path)
    parser.add_argument("--ranks", type=int, required=True, help="GPUs of the reference run")
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--dataset-info", type=Path, help="dataset_info.json, to look up the YAML's dataset names")
    source.add_argument("--train", help="training pairs")
    parser.add_argument("--validation", help="validation pairs")
    parser.add_argument("--out", type=Path, required=True, help="file to write")
    args = parser.parse_args()
    try:
        reference = _read(args.reference)
        train, validation = args.train, args.validation
        if args.dataset_info:
            train = dataset_file(args.dataset_info, str(reference.get("dataset")))
            if validation is None and reference.get("eval_dataset"):
                validation = dataset_file(args.dataset_info, str(reference["eval_dataset"]))
        config = config_from_dict(convert(reference, args.ranks, train, validation), str(args.reference))
        write_atomically(args.out, to_yaml(config))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)
    left = not_carried_over(reference)
    print(f"{args.out}: written" + (f"; without a counterpart here: {', '.join(left)}" if left else ""))


def _read(path: Path) -> dict[str, Any]:
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError) as error:
        raise UserError(f"{path}: cannot be read: {' '.join(str(error).split())}") from error
    if not isinstance(values, dict):
        raise UserError(f"{path}: not a mapping of keys to values")
    return values


if __name__ == "__main__":
    main()
