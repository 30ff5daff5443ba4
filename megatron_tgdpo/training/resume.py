"""Where a run goes on: after its newest checkpoint, after one that it branches from, or at its start."""

import itertools
import logging
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch.distributed as dist

from megatron_tgdpo.batching.sampler import Sampler
from megatron_tgdpo.checkpoints import listing as checkpoint_directory
from megatron_tgdpo.checkpoints.integrity import find_damage
from megatron_tgdpo.checkpoints.manifest import read_metadata
from megatron_tgdpo.config.resume_compatibility import Inputs, Recorded, check_changes, find_changes
from megatron_tgdpo.config.schema import Config
from megatron_tgdpo.distributed.ranks import raise_on_all_ranks
from megatron_tgdpo.errors import AgreedError, StorageError, UserError
from megatron_tgdpo.output.directory import record_start, recorded_by, recorded_run

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class StartPoint:
    """Where a run goes on.

    Attributes:
        inputs: Fingerprints of what it reads.
        checkpoint: The checkpoint that it loads; None at the start of a run.
        step: The step that is done.
        pairs: How many pairs of ``data.train`` its steps consumed, in the order that they have.
        changes: Every change of a value or input since the first step, as checkpoints record it.
    """

    inputs: Inputs
    checkpoint: Path | None = None
    step: int = 0
    pairs: int = 0
    changes: list[dict[str, Any]] = field(default_factory=list)

    def record(self) -> dict[str, Any]:
        """What each checkpoint of the run says of its inputs and their history."""
        return {"inputs": dict(self.inputs), "changes": self.changes}


def find_start(config: Config, inputs: Inputs) -> StartPoint:
    """Finds the checkpoint to load, and checks and logs what is not as it was when that was saved. Collective.

    Args:
        config: The run.
        inputs: From ``training/run_data.py: check_inputs``.

    Raises:
        AgreedError: On every rank: a key has another value, or a file another content, that it must not have or that
            was not asked for; ``train.branch_from`` is not a whole training checkpoint; or no checkpoint of the run is
            left undamaged.
        AgreedStorageError: On every rank: a checkpoint, or what else the run left, cannot be read.
    """
    verify = config.checkpoint.verify
    path = newest_undamaged(Path(config.output_dir), verify)
    asked = config.train.resume == "changed"
    if path is None and config.train.branch_from is not None:
        path, asked = Path(config.train.branch_from), True
        damage = find_damage(path, content=verify)
        if damage is not None:
            raise AgreedError(f"train.branch_from: {damage}: name another checkpoint")
    return raise_on_all_ranks(lambda: _start_at(path, config, inputs, asked=asked))


def newest_undamaged(output_dir: Path, verify: bool) -> Path | None:
    """The newest checkpoint without damage. Collective.

    Damaged ones that are newer are renamed to ``NAME.damaged``, with a warning: the run will save those steps again.
    Without one to go on from nothing is renamed.

    Args:
        output_dir: The run's directory.
        verify: Whether to read the checkpoints whole and compare checksums.

    Returns:
        The same on every rank; None if there never was a checkpoint.

    Raises:
        AgreedError: There are checkpoints, and all of them are damaged; or one is of another format version.
        AgreedStorageError: A checkpoint, or the directory, cannot be read.
    """
    is_first = dist.get_rank() == 0
    found = [raise_on_all_ranks(lambda: _checkpoints(output_dir) if is_first else ([], []))]
    dist.broadcast_object_list(found, src=0)
    saved, damaged = found[0]
    damages: list[tuple[Path, str]] = []
    for path in reversed(saved):
        damage = find_damage(path, content=verify)
        if damage is None:
            raise_on_all_ranks(lambda: _rename_damaged(damages) if is_first else None)
            return path
        damages.append((path, damage))
    if damages or damaged:
        what = damages[0][1] if damages else f"{damaged[-1]}: set aside for its damage"
        raise AgreedError(
            f"{what}: no undamaged checkpoint is left in {output_dir / 'checkpoints'}: put one back, or delete the "
            "damaged ones, or choose another output_dir, to train from the beginning"
        )
    return None


def _checkpoints(output_dir: Path) -> tuple[list[Path], list[Path]]:
    return checkpoint_directory.saved_checkpoints(output_dir), checkpoint_directory.set_aside(output_dir)


def _rename_damaged(damages: list[tuple[Path, str]]) -> None:
    for path, damage in damages:
        names = (f"{path.name}{checkpoint_directory.DAMAGED_SUFFIX}{number or ''}" for number in itertools.count())
        target = next(target for target in map(path.with_name, names) if not target.exists())
        logger.warning("%s: it is set aside as %s, and an earlier checkpoint is used", damage, target.name)
        try:
            path.rename(target)
        except OSError as error:
            raise StorageError(f"{path}: cannot be renamed to {target.name}: {error.strerror}") from error


def _start_at(path: Path | None, config: Config, inputs: Inputs, *, asked: bool) -> StartPoint:
    if path is None:
        # Nothing is kept of steps that were not saved; but whoever starts them again should mean the same run.
        recorded = recorded_run(Path(config.output_dir))
        if recorded is not None:
            _changes(recorded, config, inputs, 0, asked=asked)
        return StartPoint(inputs)
    metadata = read_metadata(path)
    step, pairs = metadata.get("step"), metadata.get("consumed_pairs")
    if step is None or pairs is None:
        raise UserError(f"{path}: not from training, so there is nothing to continue: give it as model.policy")
    changes = _changes(recorded_by(path, metadata), config, inputs, step, asked=asked)
    if any(change["key"] == "data.train" for change in changes):
        pairs = 0
    return StartPoint(inputs, path, step, pairs, [*(metadata.get("changes") or []), *changes])


def _changes(recorded: Recorded, config: Config, inputs: Inputs, step: int, *, asked: bool) -> list[dict[str, Any]]:
    changes = find_changes(recorded, config, inputs)
    check_changes(recorded, changes, config.output_dir, asked=asked)
    if dist.get_rank() == 0:
        for change in changes:
            logger.info("continuing with %s", change)
    return [change.record(step) for change in changes]


def begin(config: Config, start: StartPoint, order: Sampler) -> None:
    """Writes into the output directory what the run is from here on. Collective.

    Raises:
        AgreedError: On every rank: fewer steps are asked for than are done, or of a branch no more, or the directory
            cannot be written.
    """

    def check_and_record() -> None:
        # A branch that makes no step would leave nothing to find.
        is_own = start.checkpoint is None or start.checkpoint.parent.parent == Path(config.output_dir)
        if order.steps < start.step + (not is_own):
            key = "steps" if config.train.steps is not None else "epochs"
            raise UserError(
                f"{start.checkpoint} was saved after step {start.step}, and train.{key}={getattr(config.train, key)} "
                f"asks for {order.steps} steps: raise it, or start another run from an earlier checkpoint"
            )
        if dist.get_rank() == 0:
            record_start(config, start.inputs, start.step, order.steps)

    raise_on_all_ranks(check_and_record)


def last_step(config: Config, order: Sampler) -> int:
    """The step that this start of the run goes to."""
    return min(config.train.exit_step or order.steps, order.steps)


def log_nothing_to_do(config: Config, start: StartPoint, order: Sampler) -> None:
    """Says, on the first rank, that no step is left to make, and what to do to go on."""
    if dist.get_rank() != 0:
        return
    if start.step < order.steps:
        why = f"train.exit_step is {config.train.exit_step}: leave it out"
    else:
        key = "steps" if config.train.steps is not None else "epochs"
        why = f"the run is finished: give train.resume=changed and more train.{key}"
    logger.info(
        "nothing to do in %s: step %d of %d is done, and %s to go on, or another output_dir for another run",
        config.output_dir, start.step, order.steps, why,
    )  # fmt: skip
