"""The engine's state to and from a checkpoint, on any layout.

Only what trains of the policy is saved, its weights or its adapter, with its optimizer state and what delayed scaling
remembers; the learning rate and the data order follow from the step.
"""

import logging
from pathlib import Path
from typing import Any

import torch.distributed as dist
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor

from megatron_tgdpo.checkpoints.load import load_sharded
from megatron_tgdpo.checkpoints.reader import CheckpointReader
from megatron_tgdpo.distributed.ranks import raise_on_all_ranks
from megatron_tgdpo.gpu.overlap import finish_param_gather
from megatron_tgdpo.models.fp8_tensors import dequantised, history_shards, restore_history
from megatron_tgdpo.models.lora import adapter_state, load_adapter_state
from megatron_tgdpo.setup.engine import Engine, policy_chunks
from megatron_tgdpo.setup.models import POLICY
from megatron_tgdpo.training.sharded_optimizer_state import (
    has_parameters,
    load_optimizer_shards,
    optimizer_shards,
    weight_shards,
)

logger = logging.getLogger(__name__)

# What of a parameter group is the optimizer's state; everything else (learning rate, betas, ...) is a setting.
_GROUP_STATE = ("params", "step")


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
    state = load_sharded(path, wanted)
    for number, chunk in enumerate(policy_chunks(engine)):
        if chunk.config.adapters:
            load_adapter_state(chunk, POLICY, state["model"][str(number)])
        else:
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
    model_state = {
        name: adapter_state(chunk, POLICY) if chunk.config.adapters else chunk.sharded_state_dict(metadata=metadata)
        for name, chunk in chunks.items()
    }
    history = {name: history_shards(chunk, model_state[name], engine.pg) for name, chunk in chunks.items()}
    others = {"fp8": history} if any(history.values()) else {}
    if is_loading:
        # Where moments come into being with the first step, they are made here.
        for optimizer in filter(has_parameters, engine.optimizer.chained_optimizers):
            optimizer.load_state_dict(optimizer.state_dict())
    optimizer_state = optimizer_shards(engine.optimizer, model_state)
    if not is_loading:
        return {"model": weight_shards(engine.optimizer, model_state), "optimizer": optimizer_state, **others}
    # Only now: parameters are found in the model's state by identity.
    plain = {name: dequantised(state) for name, state in model_state.items()}
    return {"model": plain, "optimizer": optimizer_state, **others}
