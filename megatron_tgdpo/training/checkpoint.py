"""A run's checkpoints: ``checkpoints/step_XXXXXXXX``, saved complete or not at all, loaded onto any layout.

Only the policy is saved, with its optimizer state and what delayed scaling remembers; the learning rate and the data
order follow from the step.
"""

import itertools
import logging
from pathlib import Path
from typing import Any

import torch.distributed as dist
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor

from megatron_tgdpo.checkpoints import directory as checkpoint_directory
from megatron_tgdpo.checkpoints import sharded
from megatron_tgdpo.checkpoints.integrity import find_damage
from megatron_tgdpo.checkpoints.reader import CheckpointReader
from megatron_tgdpo.distributed.ranks import raise_on_all_ranks
from megatron_tgdpo.errors import AgreedError, StorageError
from megatron_tgdpo.gpu.overlap import finish_param_gather
from megatron_tgdpo.models.fp8 import dequantised, history_shards, restore_history
from megatron_tgdpo.setup.engine import Engine, policy_chunks
from megatron_tgdpo.training.sharding import load_optimizer_shards, optimizer_shards, weight_shards

logger = logging.getLogger(__name__)

# What of a parameter group is the optimizer's state; everything else (learning rate, betas, ...) is a setting.
_GROUP_STATE = ("params", "step")


def checkpoint_path(output_dir: Path, step: int) -> Path:
    return output_dir / "checkpoints" / f"step_{step:08d}"


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
    saved, aside = found[0]
    damages: list[tuple[Path, str]] = []
    for path in reversed(saved):
        damage = find_damage(path, content=verify)
        if damage is None:
            raise_on_all_ranks(lambda: _set_aside(damages) if is_first else None)
            return path
        damages.append((path, damage))
    if damages or aside:
        what = damages[0][1] if damages else f"{aside[-1]}: set aside for its damage"
        raise AgreedError(
            f"{what}: no undamaged checkpoint is left in {output_dir / 'checkpoints'}: put one back, or delete the "
            "damaged ones to train from the beginning"
        )
    return None


def _checkpoints(output_dir: Path) -> tuple[list[Path], list[Path]]:
    return checkpoint_directory.saved_checkpoints(output_dir), checkpoint_directory.set_aside(output_dir)


def _set_aside(damages: list[tuple[Path, str]]) -> None:
    for path, damage in damages:
        names = (f"{path.name}{checkpoint_directory.DAMAGED_SUFFIX}{number or ''}" for number in itertools.count())
        target = next(target for target in map(path.with_name, names) if not target.exists())
        logger.warning("%s: it is set aside as %s, and an earlier checkpoint is used", damage, target.name)
        try:
            path.rename(target)
        except OSError as error:
            raise StorageError(f"{path}: cannot be renamed to {target.name}: {error.strerror}") from error


def load_checkpoint(engine: Engine, path: Path, step: int) -> None:
    """Restores policy and optimizer from a training checkpoint, saved on whatever layout. Collective.

    The checkpoint has the optimizer's state. Its settings are those that the engine was built with, and the schedule
    is the engine's at ``step``.

    Args:
        engine: Of the run that continues.
        path: The checkpoint.
        step: The step that it was saved after.

    Raises:
        UserError: It is damaged.
    """
    wanted = training_state(engine, is_loading=True)
    has_history = "fp8" in wanted and raise_on_all_ranks(lambda: _has_history(path, wanted["fp8"]))
    if not has_history:
        wanted.pop("fp8", None)
    state = sharded.load(path, wanted)
    for number, chunk in enumerate(policy_chunks(engine)):
        chunk.load_state_dict(state["model"][str(number)])
        if has_history:
            restore_history(chunk, state["fp8"][str(number)], state["model"][str(number)])
    settings = [
        {name: value for name, value in group.items() if name not in _GROUP_STATE}
        for group in engine.optimizer.param_groups
    ]
    load_optimizer_shards(engine.optimizer, state["optimizer"])
    for group, ours in zip(engine.optimizer.param_groups, settings, strict=True):
        group.update(ours)
    engine.scheduler.step(step)


def _has_history(path: Path, wanted: dict[str, Any]) -> bool:
    """Whether the checkpoint has the histories of delayed scaling that are asked for."""
    shards: list[ShardedTensor] = list(nested_values(wanted))
    stored = CheckpointReader(path).tensors
    if all(shard.key in stored and stored[shard.key].size == shard.global_shape for shard in shards):
        return True
    if dist.get_rank() == 0:
        logger.info("%s has no history for precision.fp8=delayed of this length: it begins anew", path)
    return False


def training_state(engine: Engine, *, is_loading: bool) -> dict[str, Any]:
    """megatron-core's sharded state dict of policy and optimizer, and where there is any the history of FP8 scales.

    Its names are independent of the layout. Collective over the ranks of a stage. The optimizer's tensors are the part
    that this rank owns; so are the weights for saving, while for loading they are whole.
    """
    for chunk in engine.chunks:
        finish_param_gather(chunk)
    metadata = {"singleton_local_shards": False, "dp_cp_group": engine.pg.dp_cp}
    # A checkpoint has the names of the shards, which count layers through the whole model, not those of this dict.
    chunks = {str(number): chunk for number, chunk in enumerate(policy_chunks(engine))}
    model_state = {name: chunk.sharded_state_dict(metadata=metadata) for name, chunk in chunks.items()}
    history = {name: history_shards(chunk, model_state[name], engine.pg) for name, chunk in chunks.items()}
    others = {"fp8": history} if any(history.values()) else {}
    if is_loading:
        # Where moments come into being with the first step, they are made here.
        engine.optimizer.load_state_dict(engine.optimizer.state_dict())
    optimizer_state = optimizer_shards(engine.optimizer, model_state)
    if not is_loading:
        return {"model": weight_shards(engine.optimizer, model_state), "optimizer": optimizer_state, **others}
    # Only now: parameters are found in the model's state by identity.
    plain = {name: dequantised(state) for name, state in model_state.items()}
    return {"model": plain, "optimizer": optimizer_state, **others}
