"""What a run leaves in ``output_dir`` besides checkpoints: config, ``metrics.jsonl``, TensorBoard events, ``DONE``."""

import contextlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_tgdpo.checkpoints.listing import saved_checkpoints
from megatron_tgdpo.checkpoints.manifest import check_files
from megatron_tgdpo.config.loading import read_recorded, to_dict, to_yaml
from megatron_tgdpo.config.resume_compatibility import (
    INPUTS,
    POLICY_OF,
    ChangePolicy,
    Inputs,
    Recorded,
    check_changes,
    find_changes,
    flatten,
)
from megatron_tgdpo.config.schema import Config
from megatron_tgdpo.errors import DamageError, UserError
from megatron_tgdpo.output.metrics_file import METRICS_FILE
from megatron_tgdpo.storage.atomic_file import write_atomically
from megatron_tgdpo.storage.files import read_error, write_error
from megatron_tgdpo.storage.json_text import parse_json

SUMMARY_FILE = "data_summary.json"  # what became of the records of each data source
DONE_FILE = "DONE"
CONFIG_FILE = "config.yaml"
INPUTS_FILE = "inputs.json"


def claim_output_dir(config: Config) -> None:
    """Creates the output directory and writes the config there, or checks that it continues the run that is there.

    First rank only. Inputs are not looked at: their content is not known yet.

    Raises:
        UserError: The directory holds a run that this config does not continue, or cannot be written; a StorageError
            where storage failed, which may pass.
    """
    directory = Path(config.output_dir)
    try:
        directory.mkdir(parents=True, exist_ok=True)
        recorded = recorded_run(directory)
        if recorded is not None:
            changes = find_changes(recorded, config, None)
            check_changes(recorded, changes, config.output_dir, asked=config.train.resume == "changed")
            return
        write_atomically(directory / CONFIG_FILE, to_yaml(config))
    except OSError as error:
        raise write_error(directory, error) from error


def recorded_run(directory: Path) -> Recorded | None:
    """What the run in an output directory was: as its newest checkpoint says, else, if it made a step, its files.

    Returns:
        None where no run made a step: it may be configured anew.

    Raises:
        UserError: A checkpoint is of another format version, or a file that is there is not what a run writes.
        StorageError: Something cannot be read.
    """
    for checkpoint in reversed(saved_checkpoints(directory)):
        # Damage is dealt with when the checkpoint is loaded.
        with contextlib.suppress(DamageError):
            return recorded_by(checkpoint, check_files(checkpoint).metadata)
    try:
        if not ((directory / CONFIG_FILE).exists() and (directory / METRICS_FILE).exists()):
            return None
    except OSError as error:
        raise read_error(directory, error) from error
    return Recorded(directory, _read_config(directory), _read_inputs(directory / INPUTS_FILE))


def recorded_by(checkpoint: Path, metadata: Mapping[str, Any]) -> Recorded:
    """What a run was when it saved a checkpoint, whose ``tgdpo.json`` has this content."""
    # Checkpoints of versions that did not name all inputs have the data's fingerprint alone.
    inputs = metadata.get("inputs") or {"data.train": metadata.get("data_fingerprint")}
    return Recorded(checkpoint, metadata.get("config") or {}, {key: inputs[key] for key in inputs if key in POLICY_OF})


def record_start(config: Config, inputs: Inputs, step: int, steps: int) -> None:
    """Writes what the run is from here on: config and inputs; it is no longer done if steps are left. First rank only.

    Args:
        config: The run.
        inputs: Fingerprints of its inputs.
        step: The step that is done.
        steps: Of the whole run.

    Raises:
        UserError: The directory cannot be written; a StorageError where that may pass.
    """
    directory = Path(config.output_dir)
    try:
        write_atomically(directory / CONFIG_FILE, to_yaml(config))
        write_atomically(directory / INPUTS_FILE, json.dumps(inputs, indent=2) + "\n")
        if step < steps:
            (directory / DONE_FILE).unlink(missing_ok=True)
    except OSError as error:
        raise write_error(directory, error) from error


def mark_done(output_dir: Path, step: int) -> None:
    """Leaves the only sign that a run is finished: it made its last step and saved it (first rank only).

    Raises:
        UserError: It cannot be written; a StorageError where that may pass.
    """
    write_atomically(output_dir / DONE_FILE, json.dumps({"step": step}) + "\n")


def is_done(config: Config) -> bool:
    """Whether this very run is finished, as far as can be told without reading its inputs.

    Returns:
        False too where the run is to be continued with other values, or its inputs have moved: then it must be started
        to tell.

    Raises:
        UserError: The directory holds another run that is.
    """
    directory = Path(config.output_dir)
    if not (directory / DONE_FILE).exists():
        return False
    recorded = Recorded(directory, _read_config(directory), {})
    changes = find_changes(recorded, config, None)
    check_changes(recorded, changes, config.output_dir, asked=config.train.resume == "changed")
    theirs, ours = flatten(recorded.config), flatten(to_dict(config))
    moved = any(theirs.get(key) != ours[key] for key in INPUTS)
    return not moved and all(change.policy is ChangePolicy.FREE for change in changes)


def _read_config(directory: Path) -> dict[str, Any]:
    """The config that a run wrote, of whatever version."""
    file = directory / CONFIG_FILE
    try:
        return read_recorded(file)
    except OSError as error:
        raise read_error(file, error) from error


def _read_inputs(file: Path) -> Inputs:
    try:
        inputs = parse_json(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except OSError as error:
        raise read_error(file, error) from error
    except ValueError as error:
        raise UserError(f"{file}: cannot be read: {error}") from error
    if not isinstance(inputs, dict) or not all(isinstance(value, str | None) for value in inputs.values()):
        raise UserError(f"{file}: not a mapping of keys to fingerprints")
    return inputs
