"""Keeps ``_extra_state`` out of checkpoints' content, so that both layer specs write and read the same ones.

megatron-core's local linears save an empty object under that name. Transformer Engine's modules save one each, FP8
history pickled into a tensor, and unpickle what they load. Here they neither write that nor get it: a checkpoint holds
the local spec's empty objects whatever the spec. The history is saved as tensors (``models/fp8_history.py``).
"""

from collections.abc import Mapping
from typing import Any

import torch
from megatron.core.dist_checkpointing.mapping import ShardedObject

from megatron_tgdpo.models.fp8_weights import write_parameter

_SUFFIX = "_extra_state"
_LINEARS = ("linear_qkv.", "linear_proj.", "linear_fc1.", "linear_fc2.")


def without_content(sharded_state_dict: dict[str, Any]) -> dict[str, Any]:
    """The same entries with the extra states that the local spec has, all of them empty."""
    kept = {}
    for name, entry in sharded_state_dict.items():
        if name.endswith(_SUFFIX):
            if not name.removesuffix(_SUFFIX).endswith(_LINEARS):
                continue
            assert isinstance(entry, ShardedObject)
            entry.data = None
        kept[name] = entry
    return kept


def load_without(module: torch.nn.Module, state_dict: Mapping[str, Any]) -> None:
    """Sets every parameter of ``module`` from the state dict, whose extra states are ignored.

    Raises:
        RuntimeError: An entry is missing or unexpected.
    """
    weights = {name: value for name, value in state_dict.items() if not name.endswith(_SUFFIX)}
    parameters = dict(module.named_parameters())
    if weights.keys() != parameters.keys():
        missing, unexpected = sorted(parameters.keys() - weights.keys()), sorted(weights.keys() - parameters.keys())
        raise RuntimeError(f"state dict: missing {missing}, unexpected {unexpected}")
    for name, parameter in parameters.items():
        write_parameter(parameter, weights[name])
