"""The parameters of a model, each with the HF tensors it is made of."""

import re
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from megatron.core.models.gpt.gpt_model import GPTModel
from transformers import PretrainedConfig

from megatron_tgdpo.models.families import family_of
from megatron_tgdpo.models.families.family import Kind
from megatron_tgdpo.models.hf_weights.mapping import EMBEDDING, OUTPUT
from megatron_tgdpo.models.hf_weights.spec_names import local_name

_LAYER_PARAMETER = re.compile(r"decoder\.layers\.(\d+)\.(.+)")


@dataclass(frozen=True)
class MappedParameter:
    """One parameter of this rank and the HF tensors it is made of.

    Attributes:
        name: The parameter's name in the model, which depends on its layer spec.
        parameter: The parameter itself, this rank's shard.
        kind: See ``families/family.py``.
        hf_names: Names of the HF tensors.
        is_tied_copy: The last stage's copy of tied embeddings: loaded, never exported.
    """

    name: str
    parameter: torch.nn.Parameter
    kind: Kind
    hf_names: tuple[str, ...]
    is_tied_copy: bool


def mapped_parameters(model: GPTModel, hf_config: PretrainedConfig) -> Iterator[MappedParameter]:
    """Goes through the parameters of this rank's slice of the model, in the model's order.

    Args:
        model: This rank's slice of a language model.
        hf_config: The config it was built from.

    Raises:
        KeyError: The family's table lacks a parameter of the model.
    """
    weights = family_of(hf_config.architectures).weights
    for name, parameter in model.named_parameters():
        match = _LAYER_PARAMETER.fullmatch(name)
        layer = None
        key = name
        if match:
            # The index in the module list is local to the pipeline stage; layer_number is global and 1-based.
            layer = int(model.decoder.layers[int(match[1])].layer_number) - 1
            key = local_name(match[2])
        is_tied_copy = key == OUTPUT and bool(hf_config.tie_word_embeddings)
        weight = weights[EMBEDDING if is_tied_copy else key]
        names = tuple(hf_name.format(layer=layer) for hf_name, _ in weight.hf_tensors)
        yield MappedParameter(name, parameter, weight.kind, names, is_tied_copy)
