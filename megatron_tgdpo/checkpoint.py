"""A run's checkpoints: ``checkpoints/step_XXXXXXXX``, saved complete or not at all, loaded onto any layout.

Only the policy is saved, with its optimizer state; the learning rate and the data order follow from the step.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch.distributed as dist

from megatron_tgdpo import checkpoint_directory, checkpoint_format
from megatron_tgdpo.errors import UserError
from megatron_tgdpo.setup import colocated_model
from megatron_tgdpo.train_step import Engine


def checkpoint_path(output_dir: Path, step: int) -> Path:
    return output_dir / "checkpoints" / f"step_{step:08d}"


def save_checkpoint(
    engine: Engine, output_dir: Path, hf_dir: Path, step: int, run_metadata: Mapping[str, Any], keep: int
) -> None:
    """Saves policy and optimizer after ``step`` and removes checkpoints beyond the newest ``keep`` (0: none).

    Collective over all ranks.

    Raises:
        UserError: On every rank, if it could not be saved on some; then earlier checkpoints are still there.
    """
    path = checkpoint_path(output_dir, step)
    if checkpoint_directory.is_complete(path):
        return
    checkpoint_format.save(
        path, training_state(engine, is_loading=False), hf_dir=hf_dir, metadata={"step": step, **run_metadata}
    )
    if dist.get_rank() == 0 and keep:
        for old in checkpoint_directory.complete_checkpoints(output_dir)[:-keep]:
            checkpoint_directory.remove_checkpoint(old)
    dist.barrier()


def load_checkpoint(engine: Engine, path: Path, run_metadata: Mapping[str, Any]) -> int:
    """Restores policy, optimizer and schedule from a training checkpoint, saved on whatever layout. Collective.

    Returns:
        The step it was saved after.

    Raises:
        UserError: It belongs to other data, or is damaged.
    """
    metadata = checkpoint_directory.read_metadata(path)
    for name, value in run_metadata.items():
        if metadata.get(name) != value:
            raise UserError(f"{path}: saved with {name}={metadata.get(name)}, this run has {name}={value}")
    state = checkpoint_format.load(path, training_state(engine, is_loading=True))
    colocated_model(engine).policy.load_state_dict(state["model"])
    engine.optimizer.load_state_dict(state["optimizer"])
    engine.scheduler.step(metadata["step"])
    return int(metadata["step"])


def training_state(engine: Engine, *, is_loading: bool) -> dict[str, Any]:
    """megatron-core's sharded state dict of policy and optimizer, its names independent of the layout. Collective."""
    metadata = {
        # The only format of the distributed optimizer that loads onto another TP, PP and DP.
        "distrib_optim_sharding_type": "fully_reshardable",
        "distrib_optim_fully_reshardable_mem_efficient": False,
        "singleton_local_shards": False,
        "chained_optim_avoid_prefix": True,
        "dp_cp_group": engine.pg.dp_cp,
    }
    model_state = colocated_model(engine).policy.sharded_state_dict(metadata=metadata)
    optimizer_state = engine.optimizer.sharded_state_dict(model_state, is_loading=is_loading, metadata=metadata)
    return {"model": model_state, "optimizer": optimizer_state}
