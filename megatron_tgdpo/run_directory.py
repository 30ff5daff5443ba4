"""What a run leaves in ``output_dir`` besides checkpoints: config, ``metrics.jsonl``, TensorBoard events, ``DONE``."""

import json
from pathlib import Path

from megatron_tgdpo.aside import replacing
from megatron_tgdpo.config import Config, load_config, to_dict, to_yaml
from megatron_tgdpo.errors import UserError
from megatron_tgdpo.files import write_error

DONE_FILE = "DONE"

# What may change between a run and its continuation, because it does not change what is computed.
FREE_KEYS = {
    "parallel", "checkpoint", "log", "preflight", "eval", "guidance", "output_dir", "batch.tokens_per_micro_batch",
    "batch.shared_prompts", "data.workers", "data.validation", "train.exit_step", "train.recompute",
    "train.keep_logits_mib", "train.check_start", "train.fused", "overlap", "offload", "model.layer_spec",
}  # fmt: skip


def claim_output_dir(config: Config) -> None:
    """Creates the output directory and writes the config there, or checks that it is this run's own (first rank only).

    Raises:
        UserError: The directory holds a run with another config, or cannot be written.
    """
    directory = Path(config.output_dir)
    saved = directory / "config.yaml"
    try:
        directory.mkdir(parents=True, exist_ok=True)
        # A run that never made a step may be started over with another config.
        if saved.exists() and (directory / "metrics.jsonl").exists():
            _check_same_run(load_config(saved), config)
            return
        write_atomically(saved, to_yaml(config))
    except OSError as error:
        raise write_error(directory, error) from error


def mark_done(output_dir: Path, step: int) -> None:
    """Leaves the only sign that a run is finished: it made its last step and saved it (first rank only).

    Raises:
        UserError: It cannot be written; a StorageError where that may pass.
    """
    write_atomically(output_dir / DONE_FILE, json.dumps({"step": step}) + "\n")


def is_done(config: Config) -> bool:
    """Whether this very run is finished.

    Raises:
        UserError: The directory holds another run that is.
    """
    directory = Path(config.output_dir)
    if not (directory / DONE_FILE).exists():
        return False
    _check_same_run(load_config(directory / "config.yaml"), config)
    return True


def _check_same_run(theirs: Config, ours: Config) -> None:
    theirs_dict, ours_dict = to_dict(theirs), to_dict(ours)
    for section, values in ours_dict.items():
        pairs = values.items() if isinstance(values, dict) else [(None, values)]
        for key, value in pairs:
            name = section if key is None else f"{section}.{key}"
            if section in FREE_KEYS or name in FREE_KEYS:
                continue
            other = theirs_dict[section] if key is None else theirs_dict[section][key]
            if other != value:
                raise UserError(
                    f"{ours.output_dir} holds a run with {name}={other}, this one has {name}={value}: choose another "
                    "output_dir, or use the same config to continue that run"
                )


def write_atomically(path: Path, text: str) -> None:
    """Writes a file aside and renames it, so that it is there whole or not at all.

    Raises:
        UserError: It cannot be written; a StorageError where that may pass, as on a full disk.
    """
    try:
        with replacing(path) as aside:
            aside.write_text(text, encoding="utf-8")
    except OSError as error:
        raise write_error(path, error) from error
