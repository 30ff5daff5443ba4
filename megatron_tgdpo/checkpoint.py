"""A run's checkpoints: ``checkpoints/step_XXXXXXXX``, saved complete or not at all, loaded onto any layout.

Only the policy is saved, with its optimizer state; the learning rate and the data order follow from the step.
"""

import logging
import shutil
from pathlib import Path
from typing import Any

import torch.distributed as dist

from megatron_tgdpo import checkpoint_directory, checkpoint_format
from megatron_tgdpo.checkpoint_check import find_damage
from megatron_tgdpo.errors import AgreedError
from megatron_tgdpo.overlap import finish_param_gather
from megatron_tgdpo.setup import policy_chunks
from megatron_tgdpo.train_step import Engine

logger = logging.getLogger(__name__)

# What of a parameter group is the optimizer's state; everything else (learning rate, betas, ...) is a setting.
_GROUP_STATE = ("params", "step")


def checkpoint_path(output_dir: Path, step: int) -> Path:
    return output_dir / "checkpoints" / f"step_{step:08d}"


def newest_undamaged(output_dir: Path, verify: bool) -> Path | None:
    """The newest complete checkpoint; damaged ones are renamed to ``NAME.damaged``, with a warning. Collective.

    Args:
        output_dir: The run's directory.
        verify: Whether to read the checkpoints and compare checksums.

    Returns:
        The same on every rank; None if there is no checkpoint.

    Raises:
        AgreedError: There are checkpoints, and all of them are damaged.
    """
    found = [checkpoint_directory.complete_checkpoints(output_dir)]
    dist.broadcast_object_list(found, src=0)
    damage = None
    for path in reversed(found[0]):
        damage = find_damage(path) if verify else None
        if damage is None:
            return path
        if dist.get_rank() == 0:
            logger.warning("%s: it is set aside as %s.damaged, and the checkpoint before it is used", damage, path.name)
            shutil.rmtree(path.with_name(f"{path.name}.damaged"), ignore_errors=True)
            path.rename(path.with_name(f"{path.name}.damaged"))
        dist.barrier()
    if damage is not None:
        raise AgreedError(f"{damage}: no undamaged checkpoint is left; start again to train from the beginning")
    return None


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
    state = checkpoint_format.load(path, training_state(engine, is_loading=True))
    for number, chunk in enumerate(policy_chunks(engine)):
        chunk.load_state_dict(state["model"][str(number)])
    settings = [
        {name: value for name, value in group.items() if name not in _GROUP_STATE}
        for group in engine.optimizer.param_groups
    ]
    engine.optimizer.load_state_dict(state["optimizer"])
    for group, ours in zip(engine.optimizer.param_groups, settings, strict=True):
        group.update(ours)
    engine.scheduler.step(step)


def training_state(engine: Engine, *, is_loading: bool) -> dict[str, Any]:
    """megatron-core's sharded state dict of policy and optimizer, its names independent of the layout. Collective."""
    for chunk in engine.chunks:
        finish_param_gather(chunk)
    metadata = {
        # The only format of the distributed optimizer that loads onto another TP, PP and DP.
        "distrib_optim_sharding_type": "fully_reshardable",
        "distrib_optim_fully_reshardable_mem_efficient": False,
        "singleton_local_shards": False,
        "chained_optim_avoid_prefix": True,
        "dp_cp_group": engine.pg.dp_cp,
    }
    # A checkpoint has the names of the shards, which count layers through the whole model, not those of this dict.
    numbered = enumerate(policy_chunks(engine))
    model_state = {str(number): chunk.sharded_state_dict(metadata=metadata) for number, chunk in numbered}
    optimizer_state = engine.optimizer.sharded_state_dict(model_state, is_loading=is_loading, metadata=metadata)
    return {"model": model_state, "optimizer": optimizer_state}
