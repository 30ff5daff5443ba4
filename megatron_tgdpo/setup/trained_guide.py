"""Whether the guide that a config's section ``guide`` asks for is there: finished, and of what the section says."""

import shlex
from collections.abc import Sequence
from pathlib import Path

from megatron_tgdpo.config.guide import guide_config
from megatron_tgdpo.config.resume_compatibility import ChangePolicy, Inputs, find_changes
from megatron_tgdpo.config.schema import Config
from megatron_tgdpo.errors import UserError
from megatron_tgdpo.output.directory import DONE_FILE, recorded_run

_FIX = "set guide.output_dir to another directory for another guide, or the values back to what they were"


def is_trained(config: Config) -> bool:
    """Whether the guide's run is finished; True where a config has no section ``guide``."""
    return config.guide.method is None or (Path(config.guide_dir) / DONE_FILE).exists()


def check_finished(config: Config, command: Sequence[str] = ()) -> None:
    """Checks that the guide's run is finished, where section ``guide`` asks for one; nothing heavy is imported for it.

    Args:
        config: Of the TGDPO run.
        command: What the user gave ``tgdpo``: the config's file and its overrides; to be named with the fix.

    Raises:
        UserError: It is not.
        StorageError: Something cannot be read.
    """
    if is_trained(config):
        return
    directory = Path(config.guide_dir)
    state = "is trained only in part" if recorded_run(directory) else "is not trained yet"
    words = "".join(f" {shlex.quote(word)}" for word in command)
    raise UserError(
        f"the guide {directory} {state}: tgdpo dpo-guide{words} does it, tgdpo pipeline{words} that and the rest"
    )


def check_trained(config: Config, inputs: Inputs | None = None) -> None:
    """Checks the guide that section ``guide`` asks for; a config without the section is left alone.

    Args:
        config: Of the TGDPO run.
        inputs: Fingerprints of its inputs; None before they are known: then values alone are compared.

    Raises:
        UserError: The guide is not trained, or not to its end, or with other values or inputs.
        StorageError: Something cannot be read.
    """
    if config.guide.method is None:
        return
    directory = Path(config.guide_dir)
    check_finished(config)
    recorded = recorded_run(directory)
    guide = guide_config(config)
    if inputs is not None:
        inputs = {**inputs, "model.guide": None}
        if "reference" not in guide.method.frozen:
            inputs["model.reference"] = None
    if recorded is None:
        raise UserError(f"the guide {directory}: its checkpoints are gone: remove {directory} to train it again")
    changes = [change for change in find_changes(recorded, guide, inputs) if change.policy is not ChangePolicy.FREE]
    if changes:
        raise UserError(
            f"the guide {directory} was trained with other values than section guide and the config say: "
            f"{'; '.join(map(str, changes))}: {_FIX}"
        )
