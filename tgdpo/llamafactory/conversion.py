"""A config of the TGDPO reference code as one of this project; the command is ``tgdpo import-config``."""

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron_tgdpo.checkpoints.adapter_directory import ALL_LINEAR, LINEARS, is_adapter
from megatron_tgdpo.checkpoints.model_directory import hf_directory
from megatron_tgdpo.config.loading import changed_yaml, config_from_dict
from megatron_tgdpo.config.schema import Config
from megatron_tgdpo.config.values import typed
from megatron_tgdpo.errors import UserError
from megatron_tgdpo.loss.methods import METHODS
from megatron_tgdpo.models.hf_config import read_hf_config
from megatron_tgdpo.planning.cluster import Cluster
from megatron_tgdpo.planning.layouts import choose_layout
from megatron_tgdpo.setup.model_sources import model_sources, planned_sources
from megatron_tgdpo.storage.atomic_file import write_atomically
from megatron_tgdpo.storage.yaml_text import is_null, read_yaml_file
from tgdpo.llamafactory.datasets import dataset_files
from tgdpo.llamafactory.keys import LORA_READ, READ, LoraReference, Reference, harmless, is_lora, refuse_unknown
from tgdpo.llamafactory.templates import NAMES, chat_template

# Reference key -> our key, value as it is.
_RENAMED = {
    "model_name_or_path": "model.policy",
    "ref_model": "model.reference",
    "tgdpo_reward_model": "model.guide",
    "cutoff_len": "data.max_length",
    "preprocessing_num_workers": "data.workers",
    "output_dir": "output_dir",
    "logging_steps": "log.every_steps",
    "save_steps": "checkpoint.every_steps",
    "save_total_limit": "checkpoint.keep",
    "eval_steps": "eval.every_steps",
    "learning_rate": "optimizer.lr",
    "weight_decay": "optimizer.weight_decay",
    "max_grad_norm": "optimizer.clip_grad",
    "adam_beta1": "optimizer.beta1",
    "adam_beta2": "optimizer.beta2",
    "adam_epsilon": "optimizer.eps",
    "seed": "train.seed",
}
# What the reference code, or transformers, takes where the file is silent, as far as it bears on what is trained.
_DEFAULTS: dict[str, Any] = {
    "stage": "sft",
    "finetuning_type": "lora",
    "pref_loss": "sigmoid",
    "pref_beta": 0.1,
    "tgdpo_alpha": 0.5,
    "simpo_gamma": 0.5,
    "cutoff_len": 2048,
    "per_device_train_batch_size": 8,
    "gradient_accumulation_steps": 1,
    "learning_rate": 5e-5,
    "lr_scheduler_type": "linear",
    "warmup_ratio": 0.0,
    "warmup_steps": 0,
    "weight_decay": 0.0,
    "max_grad_norm": 1.0,
    "adam_beta1": 0.9,
    "adam_beta2": 0.999,
    "adam_epsilon": 1e-8,
    "num_train_epochs": 3.0,
    "max_steps": -1,
    "seed": 42,
    "bf16": False,
    "lora_rank": 8,
    "lora_target": "all",
}
# What null means where it is not the default.
_NULLS = {"max_grad_norm": 0.0, "save_total_limit": 0}
# Values without which the reference run would compute something else than this project does.
_REQUIRED_VALUES: dict[str, tuple[Any, ...]] = {
    "stage": ("tgdpo", "dpo"),
    "finetuning_type": ("full", "lora"),
    "pref_loss": ("sigmoid", "hinge", "ipo", "orpo", "simpo"),
}
# Why not.
_HINTS = {
    ("pref_loss", "kto_pair"): ": a pair's loss depends on the mean log-ratio of the others in its micro batch there",
}
# Reference key -> our option of the loss.
_LOSS_OPTIONS = {
    "pref_beta": "beta",
    "tgdpo_alpha": "alpha",
    "pref_ftx": "sft_weight",
    "dpo_label_smoothing": "label_smoothing",
    "simpo_gamma": "gamma",
}
# What the reference code reads only for some methods.
_ONLY_FOR = {
    "tgdpo_alpha": ("tgdpo",),
    "tgdpo_reward_model": ("tgdpo",),
    "simpo_gamma": ("simpo",),
    "ref_model": ("tgdpo", "dpo"),
}
# What the authors' TGDPO makes of these is not what they are elsewhere: another loss without the guide, no label
# smoothing, and an SFT term that is divided by the tokens twice.
_NOT_OF_TGDPO = {"pref_loss": ("sigmoid", "simpo"), "dpo_label_smoothing": (None, 0.0), "pref_ftx": (None, 0.0)}
_SCHEDULES = {"cosine": "cosine", "linear": "linear", "constant": "constant", "constant_with_warmup": "constant"}
_BESIDE = ".chat_template.jinja"


def convert(
    reference: Mapping[str, Any],
    ranks: int,
    train: str | Sequence[str],
    validation: str | Sequence[str] | None,
    *,
    columns: Mapping[str, str] | None = None,
    source: str = "the reference config",
    ignore: Sequence[str] = (),
    max_prompt_length: bool = False,
) -> dict[str, Any]:
    """Maps the reference code's keys to ours.

    Args:
        reference: The YAML, as :mod:`megatron_tgdpo.storage.yaml_text` reads it, or plain values.
        ranks: GPUs of the reference run.
        train: Path, or paths, of the training pairs.
        validation: The same of the validation pairs, or None.
        columns: By this project's name of a column, what the files call it, where that is another.
        source: What the reference is, for messages.
        ignore: Keys to leave out.
        max_prompt_length: Take it over. The authors' code never reads it.

    Returns:
        Nested values for :func:`megatron_tgdpo.config.loading.config_from_dict`, without layout and chat template.

    Raises:
        UserError: A key cannot be carried over, or has a value that this project does not compute; it is named.
    """
    refuse_unknown(reference, source, ignore)
    given = typed(Reference, {key: reference[key] for key in reference if key in READ}, "", source)
    lora = is_lora(reference, ignore)
    if lora:
        given |= typed(LoraReference, {key: reference[key] for key in reference if key in LORA_READ}, "", source)
    if any("${" in str(value) for value in given.values()):
        raise UserError(f"{source}: has ${{...}}: write the values out")
    given = {key: _NULLS.get(key, _DEFAULTS.get(key)) if value is None else value for key, value in given.items()}
    values = {**_DEFAULTS, **{key: value for key, value in given.items() if value is not None and key not in ignore}}
    _refuse_values(values, given, source, ignore)
    method = _method(values)
    values = {key: value for key, value in values.items() if method in _ONLY_FOR.get(key, (method,))}
    flat = {ours: values[theirs] for theirs, ours in _RENAMED.items() if theirs in values}
    flat |= {f"loss.{ours}": values[theirs] for theirs, ours in _LOSS_OPTIONS.items() if values.get(theirs) is not None}
    for option in ("loss.sft_weight", "loss.label_smoothing"):
        if not flat.get(option):
            # 0 is how the reference code says that it is not used, whatever the method.
            flat.pop(option, None)
    flat |= {
        "loss.method": method,
        **({"loss.form": values["pref_loss"]} if method == "dpo" and values["pref_loss"] != "sigmoid" else {}),
        "data.train": train,
        "data.validation": validation,
        "data.columns": dict(columns) if columns else None,
        "data.max_prompt_length": values.get("max_prompt_length") if max_prompt_length else None,
        "batch.global_pairs": values["per_device_train_batch_size"] * values["gradient_accumulation_steps"] * ranks,
        "optimizer.schedule": _SCHEDULES[values["lr_scheduler_type"]],
        **_warmup(values, source),
        "precision.dtype": "bf16" if values["bf16"] else "fp32",
        "train.steps" if values["max_steps"] > 0 else "train.epochs": (
            values["max_steps"] if values["max_steps"] > 0 else values["num_train_epochs"]
        ),
    }
    if lora:
        flat |= _lora(values, source, has_reference="reference" in METHODS[method].frozen)
    nested: dict[str, Any] = {}
    for name, value in flat.items():
        section, _, key = name.rpartition(".")
        (nested.setdefault(section, {}) if section else nested)[key] = value
    return nested


def _refuse_values(values: Mapping[str, Any], given: Mapping[str, Any], source: str, ignore: Sequence[str]) -> None:
    """Stops at a value with which the reference run computes something else than this project does.

    Args:
        values: Of all keys, with the reference code's defaults.
        given: Those of the config itself.
        source: What the reference is, for messages.
        ignore: Keys that are left out.
    """
    for key, allowed in _REQUIRED_VALUES.items():
        if values[key] not in allowed and key not in ignore:
            default = "" if values[key] is given.get(key) else ", which is the reference code's default: set it"
            hint = _HINTS.get((key, values[key]), "")
            raise UserError(
                f"{source}: {key}: {values[key]} is not carried over, only {', '.join(allowed)}{default}{hint}"
            )
    if values["stage"] == "tgdpo":
        for key, allowed in _NOT_OF_TGDPO.items():
            if values.get(key) not in allowed and key not in ignore:
                raise UserError(
                    f"{source}: {key}: {values[key]} with stage: tgdpo is not carried over: the authors' code "
                    "computes something else than its name says there: take it out, and set it in section loss of what "
                    "is written"
                )
    if (schedule := values["lr_scheduler_type"]) not in _SCHEDULES:
        raise UserError(f"{source}: lr_scheduler_type: {schedule} is not supported here, only {', '.join(_SCHEDULES)}")


def _lora(values: Mapping[str, Any], source: str, *, has_reference: bool) -> dict[str, Any]:
    """What trains, as our keys: a new adapter, or one that is there.

    Without ``ref_model`` the reference of the reference code is the base model with adapters off, also where training
    goes on with an adapter that has learned (``train/trainer_utils.py: create_ref_model``).
    """
    if path := values.get("adapter_name_or_path"):
        if "," in path:
            raise UserError(
                f"{source}: adapter_name_or_path: {path} names several: merge all but the last into the model first"
            )
        found = {"lora.adapter": path}
        if has_reference and "ref_model" not in values:
            found |= {"model.reference": values["model_name_or_path"], "train.check_start": False}
        return found
    targets = [name.strip() for name in values["lora_target"].split(",")]
    if targets == ["all"]:
        targets = [ALL_LINEAR]
    elif unknown := [name for name in targets if name not in LINEARS]:
        raise UserError(
            f"{source}: lora_target: {unknown[0]} has no adapter here: there are all, or some of {', '.join(LINEARS)}"
        )
    return {
        "lora.rank": values["lora_rank"],
        "lora.alpha": values.get("lora_alpha") or None,
        "lora.targets": targets,
        "lora.rslora": bool(values.get("use_rslora")),
    }


def _method(values: Mapping[str, Any]) -> str:
    if values["pref_loss"] in ("simpo", "orpo"):
        return str(values["pref_loss"])
    return "tgdpo" if values["stage"] == "tgdpo" else "dpo"


def _warmup(values: Mapping[str, Any], source: str) -> dict[str, Any]:
    """Warm-up as our keys. A number of steps takes precedence there, and ``constant`` has no warm-up."""
    steps, total = values["warmup_steps"], values["max_steps"]
    if values["lr_scheduler_type"] == "constant":
        return {"optimizer.warmup_ratio": 0.0}
    if 0 <= steps < 1:
        return {"optimizer.warmup_ratio": steps or values["warmup_ratio"]}
    if steps != int(steps) or steps < 0:
        raise UserError(f"{source}: warmup_steps: {steps:g} is not a number of steps")
    if 0 < total <= steps:
        raise UserError(f"{source}: warmup_steps: {steps:g} is not a number of steps below max_steps: {total}")
    return {"optimizer.warmup_ratio": 0.0, "optimizer.warmup_steps": int(steps)}


def not_carried_over(reference: Mapping[str, Any], ignore: Sequence[str] = ()) -> list[str]:
    """Keys of the reference file that have no counterpart and change nothing that is trained."""
    lora = is_lora(reference, ignore)
    return sorted(key for key in reference if harmless(key, lora=lora))


def _notes(reference: Mapping[str, Any], config: Config, ignore: Sequence[str]) -> list[str]:
    """What the reader of an imported config should know: lines."""
    lines = []
    left = [key for key in not_carried_over(reference, ignore) if key not in ignore]
    if left:
        lines.append(f"left out, without effect on training: {', '.join(left)}")
    if ignore:
        lines.append(f"left out as asked, whatever the effect: {', '.join(ignore)}")
    if "max_prompt_length" in reference and config.data.max_prompt_length is None:
        lines.append("max_prompt_length: left out, the authors' code never reads it; --max-prompt-length takes it over")
    if config.lora.adapter is not None and not config.train.check_start:
        lines.append("model.reference is the base, as the reference code has it: the first loss is not ln 2")
    if config.precision.dtype == "fp32":
        lines.append("precision.dtype is fp32: the reference code trains in fp32 where bf16 is not set")
    if config.optimizer.schedule == "constant" and not (config.optimizer.warmup_ratio or config.optimizer.warmup_steps):
        lines.append("lr_scheduler_type: constant has no warm-up in transformers, whatever warmup_ratio says")
    return lines


def import_config(args: argparse.Namespace) -> list[str]:
    """Writes the config, and its chat template beside it.

    Args:
        args: The options of ``tgdpo import-config``.

    Returns:
        What to say about it, lines.

    Raises:
        UserError: A file cannot be read or written, or a key cannot be carried over; it is named.
    """
    config, lines = _import(args)
    if config.data.chat_template is not None:
        write_atomically(
            Path(config.data.chat_template), chat_template(str(read_reference(args.reference)["template"]))
        )
    write_atomically(args.out, changed_yaml(config))
    return lines


def _import(args: argparse.Namespace) -> tuple[Config, list[str]]:
    """The config, and what to say about it."""
    source = str(args.reference)
    reference = read_reference(args.reference)
    strangers = sorted(set(args.ignore) - set(reference) - {"finetuning_type"})
    if strangers:
        raise UserError(f"--ignore {strangers[0]}: {source} does not have it")
    refuse_unknown(reference, source, args.ignore)  # before the data is read
    train, validation = args.train, args.validation
    columns: dict[str, str] = {}
    lines = []
    evaluates = validation is None and not _absent(reference, "eval_dataset", args.ignore)
    if args.dataset_info:
        keys = ["dataset", *(["eval_dataset"] if evaluates else [])]
        found, columns = dataset_files(args.dataset_info, {key: str(reference.get(key)) for key in keys})
        train, *others = (paths[0] if len(paths) == 1 else paths for paths in found.values())
        validation = others[0] if others else validation
    elif evaluates:
        lines.append(f"eval_dataset: {reference['eval_dataset']}: left out, give --validation")
    values = convert(
        reference,
        args.ranks,
        train,
        validation,
        columns=columns,
        source=source,
        ignore=args.ignore,
        max_prompt_length=args.max_prompt_length,
    )
    if not _absent(reference, "template", args.ignore):
        if (name := str(reference["template"])) not in NAMES:
            raise UserError(
                f"{source}: template: {name} is not one of those known here, {', '.join(NAMES)}: give it as Jinja in "
                "data.chat_template, or take the tokenizer's own, with --ignore template"
            )
        values["data"]["chat_template"] = str(Path(f"{args.out}{_BESIDE}").absolute())
    config = config_from_dict(values, source)
    layout, line = _layout(config, args)
    lines.append(line)
    if layout:
        values["parallel"] = layout["parallel"]
        values["train"] |= layout["train"]
        config = config_from_dict(values, source)
    return config, [*_notes(reference, config, args.ignore), *lines]


def _absent(reference: Mapping[str, Any], key: str, ignore: Sequence[str]) -> bool:
    return key in ignore or is_null(reference.get(key))


def read_reference(path: Path) -> dict[str, Any]:
    """The YAML of the reference code, unchecked.

    Raises:
        UserError: It cannot be read.
    """
    try:
        return read_yaml_file(path)
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from error


def _layout(config: Config, args: argparse.Namespace) -> tuple[dict[str, Any], str]:
    """The planner's layout as values of the config, if the models are here, and a line on it."""
    sources = model_sources(config)
    missing = [
        str(source.base) for source in sources.values() if not (hf_directory(source.base) / "config.json").is_file()
    ]
    if missing:
        return {}, f"layout: NOT planned, there is no {missing[0]}/config.json here: set parallel (see tgdpo plan)"
    if (adapter := sources["policy"].adapter) is not None and not is_adapter(adapter):
        return {}, f"layout: NOT planned, there is no adapter {adapter} here: set parallel (see tgdpo plan)"
    nodes, rest = divmod(args.ranks, args.gpus_per_node) if args.ranks > args.gpus_per_node else (1, 0)
    if rest:
        raise UserError(f"--ranks {args.ranks} are not whole nodes of --gpus-per-node {args.gpus_per_node}")
    cluster = Cluster(nodes, min(args.ranks, args.gpus_per_node), args.gpu_memory_gib)
    models = [read_hf_config(source.base) for source in sources.values()]
    plan = choose_layout(config, models, cluster, planned_sources(config, list(sources)))
    values = {"parallel": plan.layout.keys, "train": {"recompute": plan.recompute}}
    gib = plan.memory.total / 2**30
    return values, f"layout: {plan.layout}, recompute {plan.recompute}, {gib:.1f} GiB on the fullest GPU (planned)"
