"""Checks that a directory holds exactly the parameters that its config describes, before any of them is read."""

import torch
from transformers import PretrainedConfig

from checkpoints_convert.pieces import checkpoint_sizes
from megatron_tgdpo.checkpoints.manifest import read_metadata
from megatron_tgdpo.checkpoints.reader import CheckpointReader
from megatron_tgdpo.errors import UserError
from megatron_tgdpo.models.hf_config import padded_vocab_size
from megatron_tgdpo.models.hf_weights.mapping import global_parameters, parameter_count

# What a training checkpoint holds beside the model: names of optimizer state begin so.
_OPTIMIZER = "optimizer."
# The vocabulary may be padded for any tensor-parallel size up to this one.
_LARGEST_TENSOR_SIZE = 128


def check_checkpoint(checkpoint: CheckpointReader, hf_config: PretrainedConfig, stored_dtype: torch.dtype) -> None:
    """Compares the model's tensors in a Megatron checkpoint, saved at any layout, with what the config asks for.

    Raises:
        UserError: A tensor is missing, unexpected, of another shape or of another dtype.
    """
    expected = checkpoint_sizes(hf_config)
    found = {key: info for key, info in checkpoint.tensors.items() if not key.startswith(_OPTIMIZER)}
    where = checkpoint.path
    for key in sorted(expected.keys() - found.keys()):
        raise UserError(f"{where}: {key} missing, config.json asks for it")
    for key in sorted(found.keys() - expected.keys()):
        raise UserError(f"{where}: {key} not expected, config.json describes another model")
    parameters = {parameter.checkpoint_key: parameter for parameter in global_parameters(hf_config)}
    vocabulary = {key for key, parameter in parameters.items() if parameter.kind == "vocab"}
    paddings = {padded_vocab_size(hf_config, tensor) for tensor in range(1, _LARGEST_TENSOR_SIZE + 1)}
    for key, info in found.items():
        size, wanted = tuple(info.size), expected[key]
        if size != wanted and not (key in vocabulary and size[0] in paddings and size[1:] == wanted[1:]):
            raise UserError(f"{where}: {key} has shape {list(size)}, config.json asks for {list(wanted)}")
        dtype = parameters[key].dtype(stored_dtype)
        if info.properties.dtype != dtype:
            raise UserError(f"{where}: {key} is stored as {info.properties.dtype}, tgdpo.json says {dtype}")
    count = read_metadata(where).get("parameters", parameter_count(hf_config))
    if count != parameter_count(hf_config):
        raise UserError(f"{where}: it has {count:,} parameters, config.json asks for {parameter_count(hf_config):,}")
