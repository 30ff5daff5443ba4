"""What a checkpoint holds of delayed scaling. With Transformer Engine's own linears: ``tests/emulation``."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing.mapping import ShardedObject

from megatron_tgdpo.models.fp8_tensors import history_shards, restore_history

NAMES = ("decoder.layers.0.mlp.linear_fc1", "decoder.layers.1.mlp.linear_fc1")
LAYERS, HISTORY = 6, 4


class Linear(torch.nn.Module):
    """What Transformer Engine's linear keeps: three operands forward, two backward."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(2, 2))
        self.fp8_meta_tensors_initialized = True
        sizes = {"scaling_fwd": 3, "scaling_bwd": 2}
        random = torch.Generator().manual_seed(seed)
        self.fp8_meta = {
            name: SimpleNamespace(
                amax_history=torch.rand(HISTORY, size, generator=random), scale=torch.rand(size, generator=random)
            )
            for name, size in sizes.items()
        }

    @property
    def kept(self) -> list[torch.Tensor]:
        return [tensor for state in self.fp8_meta.values() for tensor in (state.amax_history, state.scale)]


def chunk(seed: int, recipe: str = "delayed") -> Any:
    """The third and fourth of six layers."""
    model = torch.nn.Module()
    for name in NAMES:
        parent = model
        *path, last = name.split(".")
        for part in path:
            if not hasattr(parent, part):
                parent.add_module(part, torch.nn.Module())
            parent = getattr(parent, part)
        parent.add_module(last, Linear(seed + len(list(model.modules()))))
    model.config = SimpleNamespace(fp8="hybrid", fp8_recipe=recipe)
    return model


def extra_states() -> dict[str, ShardedObject]:
    key = "decoder.layers.mlp.linear_fc1._extra_state"
    return {
        f"{name}._extra_state": ShardedObject(key, None, (LAYERS,), (number + 2,), (0, 0, 0))
        for number, name in enumerate(NAMES)
    }


@pytest.fixture
def groups(single_rank_group: dist.ProcessGroup) -> Any:
    return SimpleNamespace(tp=single_rank_group, dp_cp=single_rank_group)


def test_layers_are_placed_in_the_whole_model(groups: Any) -> None:
    shards = history_shards(chunk(1), extra_states(), groups)
    placed = {
        (shard.key, shard.global_shape, shard.global_offset)
        for tensors in shards.values()
        for shard in tensors.values()
    }
    key = "optimizer.fp8.decoder.layers.mlp.linear_fc1"
    sizes = {"forward": 3, "backward": 2}
    assert placed == {
        (f"{key}.{direction}.{name}", (LAYERS, *packs, operands), (layer, *(0 for _ in packs), 0))
        for direction, operands in sizes.items()
        for name, packs in (("amax", (HISTORY,)), ("scale", ()))
        for layer in (2, 3)
    }


def test_what_was_saved_comes_back(groups: Any) -> None:
    model, other = chunk(1), chunk(2)
    shards = history_shards(model, extra_states(), groups)
    saved = {name: {key: shard.data for key, shard in tensors.items()} for name, tensors in shards.items()}
    wanted = [[tensor.clone() for tensor in model.get_submodule(name).kept] for name in NAMES]
    for name in NAMES:
        for tensor in model.get_submodule(name).kept:
            # Training goes on while what was saved is being written.
            tensor.fill_(7)
    restore_history(other, saved, {})
    for name, tensors in zip(NAMES, wanted, strict=True):
        for got, want in zip(other.get_submodule(name).kept, tensors, strict=True):
            assert torch.equal(got, want)


def test_other_recipes_keep_nothing(groups: Any) -> None:
    assert history_shards(chunk(1, "tensorwise"), extra_states(), groups) == {}
