"""Checks that a directory holds exactly the parameters that its config describes, before any of them is read."""

from pathlib import Path

import torch
from transformers import PretrainedConfig

from checkpoints_convert.hf_reader import HfCheckpoint
from checkpoints_convert.mapping import expected_shapes, global_parameters, parameter_count
from checkpoints_convert.pieces import checkpoint_sizes, pieces_of
from megatron_tgdpo.checkpoint_directory import read_metadata
from megatron_tgdpo.checkpoint_reader import CheckpointReader
from megatron_tgdpo.errors import UserError
from megatron_tgdpo.hf_config import padded_vocab_size

_LM_HEAD = "lm_head.weight"
_EMBEDDING = "model.embed_tokens.weight"
# What a training checkpoint holds beside the model: names of optimizer state begin so.
_OPTIMIZER = "optimizer."
# The vocabulary may be padded for any tensor-parallel size up to this one.
_LARGEST_TENSOR_SIZE = 128


def open_hf(path: Path, hf_config: PretrainedConfig) -> HfCheckpoint:
    """Opens an HF directory and compares its tensors with what the config asks for.

    A tied model has one matrix under either of two names, or under both.

    Raises:
        UserError: A tensor is missing, unexpected or of another shape, or the ``lm_head`` of a tied model differs.
    """
    checkpoint = HfCheckpoint(path)
    tie(checkpoint, hf_config)
    tied = bool(hf_config.tie_word_embeddings) and _LM_HEAD in checkpoint.tensors
    checkpoint.check(expected_shapes(hf_config), (_LM_HEAD,) if tied else ())
    if tied and not _same(checkpoint, hf_config):
        raise UserError(
            f"{checkpoint.path}: config.json says tie_word_embeddings, but {_LM_HEAD} differs from {_EMBEDDING}: "
            "set tie_word_embeddings to false"
        )
    return checkpoint


def tie(checkpoint: HfCheckpoint, hf_config: PretrainedConfig) -> None:
    """Where a tied model has its embedding under the name of the head alone, reads it from there."""
    if hf_config.tie_word_embeddings:
        checkpoint.take_for(_EMBEDDING, _LM_HEAD)


def _same(checkpoint: HfCheckpoint, hf_config: PretrainedConfig) -> bool:
    """Whether head and embedding have the same values; one may be stored in another dtype."""
    head, embedding = checkpoint.tensors[_LM_HEAD], checkpoint.tensors[_EMBEDDING]
    if head == embedding or head.shape != embedding.shape:
        return head == embedding
    dtype = torch.promote_types(head.torch_dtype, embedding.torch_dtype)
    rows = [(piece.hf_start, piece.hf_end) for piece in pieces_of(global_parameters(hf_config)[0], 4)]
    return all(
        torch.equal(checkpoint.rows(_LM_HEAD, *span).to(dtype), checkpoint.rows(_EMBEDDING, *span).to(dtype))
        for span in rows
    )


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
    vocabulary = {parameter.key for parameter in global_parameters(hf_config) if parameter.kind == "vocab"}
    paddings = {padded_vocab_size(hf_config, tensor) for tensor in range(1, _LARGEST_TENSOR_SIZE + 1)}
    for key, info in found.items():
        size, wanted = tuple(info.size), expected[key]
        if size != wanted and not (key in vocabulary and size[0] in paddings and size[1:] == wanted[1:]):
            raise UserError(f"{where}: {key} has shape {list(size)}, config.json asks for {list(wanted)}")
        if info.properties.dtype != stored_dtype:
            raise UserError(f"{where}: {key} is stored as {info.properties.dtype}, tgdpo.json says {stored_dtype}")
    count = read_metadata(where).get("parameters", parameter_count(hf_config))
    if count != parameter_count(hf_config):
        raise UserError(f"{where}: it has {count:,} parameters, config.json asks for {parameter_count(hf_config):,}")
