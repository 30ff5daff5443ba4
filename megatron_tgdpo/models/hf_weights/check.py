"""Checks that an HF directory holds exactly the tensors that its config describes, before any is read."""

import logging
from pathlib import Path

import torch
from transformers import PretrainedConfig

from megatron_tgdpo.errors import UserError
from megatron_tgdpo.models.families import family_of
from megatron_tgdpo.models.hf_weights.mapping import expected_shapes
from megatron_tgdpo.models.hf_weights.reader import HfCheckpoint

logger = logging.getLogger(__name__)

_LM_HEAD = "lm_head.weight"
_EMBEDDING = "model.embed_tokens.weight"
_BLOCK_BYTES = 16 << 20  # what is compared at a time


def open_hf(path: Path, hf_config: PretrainedConfig) -> HfCheckpoint:
    """Opens an HF directory and compares its tensors with what the config asks for.

    A tied model has one matrix under either of two names, or under both. Layers after the model's are left out, with a
    word in the log.

    Raises:
        UserError: A tensor is missing, unexpected or of another shape, or the ``lm_head`` of a tied model differs.
    """
    checkpoint = HfCheckpoint(path)
    tie(checkpoint, hf_config)
    tied = bool(hf_config.tie_word_embeddings) and _LM_HEAD in checkpoint.tensors
    later = _later_layers(checkpoint, hf_config)
    if later:
        logger.warning(
            "%s: %d tensors of layers after the model's, as %s, are left out: they predict several tokens at a time, "
            "are not trained, and not written again",
            path,
            len(later),
            later[0],
        )
    checkpoint.check(expected_shapes(hf_config), (*later, _LM_HEAD) if tied else later)
    if tied and not _same(checkpoint):
        raise UserError(
            f"{checkpoint.path}: config.json says tie_word_embeddings, but {_LM_HEAD} differs from {_EMBEDDING}: "
            "set tie_word_embeddings to false"
        )
    return checkpoint


def _later_layers(checkpoint: HfCheckpoint, hf_config: PretrainedConfig) -> list[str]:
    """Tensors of layers that the family's models have after their own, for the prediction of several tokens."""
    key, layers = family_of(hf_config.architectures).later_layers, hf_config.num_hidden_layers
    count = 0 if key is None else getattr(hf_config, key, None) or 0
    # Numbered on after the model's layers, or of a part of their own (K-EXAONE).
    prefixes = (*(f"model.layers.{layer}." for layer in range(layers, layers + count)), *(("mtp.",) if count else ()))
    return sorted(name for name in checkpoint.tensors if name.startswith(prefixes))


def tie(checkpoint: HfCheckpoint, hf_config: PretrainedConfig) -> None:
    """Where a tied model has its embedding under the name of the head alone, reads it from there."""
    if hf_config.tie_word_embeddings:
        checkpoint.take_for(_EMBEDDING, _LM_HEAD)


def _same(checkpoint: HfCheckpoint) -> bool:
    """Whether head and embedding have the same values; one may be stored in another dtype."""
    head, embedding = checkpoint.tensors[_LM_HEAD], checkpoint.tensors[_EMBEDDING]
    if head == embedding or head.shape != embedding.shape:
        return head == embedding
    dtype = torch.promote_types(head.torch_dtype, embedding.torch_dtype)
    count, width = head.shape
    block = max(1, _BLOCK_BYTES // (4 * width))
    rows = [(start, min(start + block, count)) for start in range(0, count, block)]
    return all(
        torch.equal(checkpoint.rows(_LM_HEAD, *span).to(dtype), checkpoint.rows(_EMBEDDING, *span).to(dtype))
        for span in rows
    )
