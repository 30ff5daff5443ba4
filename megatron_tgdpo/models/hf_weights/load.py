"""Weights into this rank's slice of a model, from an HF directory or a Megatron checkpoint."""

import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from transformers import PretrainedConfig

from megatron_tgdpo.checkpoints.integrity import refuse_damage
from megatron_tgdpo.checkpoints.load import load_sharded
from megatron_tgdpo.checkpoints.model_directory import is_megatron_checkpoint
from megatron_tgdpo.errors import UserError
from megatron_tgdpo.models.families import family_of
from megatron_tgdpo.models.families.family import Kind
from megatron_tgdpo.models.fp8_tensors import dequantised, without_fp8, write_parameter
from megatron_tgdpo.models.hf_config import read_hf_config
from megatron_tgdpo.models.hf_weights.check import open_hf
from megatron_tgdpo.models.hf_weights.mapping import EMBEDDING, OUTPUT, Heads, expected_shapes, local_name, read_shard
from megatron_tgdpo.models.hf_weights.reader import HfCheckpoint
from megatron_tgdpo.models.language_model import LanguageModel
from megatron_tgdpo.models.lora import without_adapters

_LAYER_PARAMETER = re.compile(r"decoder\.layers\.(\d+)\.(.+)")
# An expert's, of the local layer spec or of Transformer Engine's grouped products.
_EXPERT_PARAMETERS = (
    re.compile(r"(mlp\.experts\.)local_experts\.(\d+)\.(.+)"),
    re.compile(r"(mlp\.experts\.)()(.+\.(?:weight|bias))(\d+)"),
)


@dataclass(frozen=True)
class MappedParameter:
    """One parameter of this rank and the HF tensors it is made of.

    Attributes:
        name: The parameter's name in the model, which depends on its layer spec.
        parameter: The parameter itself, this rank's shard.
        kind: See ``families/family.py``.
        hf_names: Names of the HF tensors.
        expert: Whose it is, the 0-based number among all experts; None if it is no expert's.
    """

    name: str
    parameter: torch.nn.Parameter
    kind: Kind
    hf_names: tuple[str, ...]
    expert: int | None = None


def mapped_parameters(model: LanguageModel, hf_config: PretrainedConfig) -> Iterator[MappedParameter]:
    """Goes through the parameters of this rank's slice of the model but its adapters', in the model's order.

    Args:
        model: This rank's slice of a language model.
        hf_config: The config it was built from.

    Raises:
        KeyError: The family's table lacks a parameter of the model.
    """
    weights = family_of(hf_config.architectures).weights
    for name, parameter in without_adapters(dict(model.named_parameters())).items():
        match = _LAYER_PARAMETER.fullmatch(name)
        layer = expert = None
        key = name
        if match:
            # The index in the module list is local to the pipeline stage; layer_number is global and 1-based.
            layer = int(model.decoder.layers[int(match[1])].layer_number) - 1
            key, local_expert = without_expert(local_name(match[2]))
            if local_expert is not None:
                ep = model.pg_collection.ep
                expert = ep.rank() * (int(model.config.num_moe_experts or 0) // ep.size()) + local_expert
        # The last stage's copy of tied embeddings.
        weight = weights[EMBEDDING if key == OUTPUT and hf_config.tie_word_embeddings else key]
        names = tuple(hf_name.format(layer=layer, expert=expert) for hf_name, _ in weight.hf_tensors)
        yield MappedParameter(name, parameter, weight.kind, names, expert)


def without_expert(key: str) -> tuple[str, int | None]:
    """A layer's parameter without its expert's number among this rank's, and that number."""
    for pattern in _EXPERT_PARAMETERS:
        if match := pattern.fullmatch(key):
            return match[1] + match[3], int(match[2] or match[4])
    return key, None


def load_megatron_weights(
    chunks: Sequence[LanguageModel], path: Path, hf_config: PretrainedConfig, *, verify: bool = True
) -> None:
    """Loads the model part of a Megatron checkpoint saved at any layout; collective over all ranks.

    Args:
        chunks: This rank's slices, all of them; every parameter is overwritten.
        path: The checkpoint.
        hf_config: The config that the model was built from.
        verify: Whether to read the checkpoint whole first, the ranks sharing the work, and compare checksums.

    Raises:
        UserError: The checkpoint is incomplete or corrupt, or its config describes weights of other shapes.
    """
    if verify:
        refuse_damage(path)
    # megatron-core fills or cuts the vocabulary silently, and takes no notice of tensors that it is not asked for.
    theirs, ours = expected_shapes(read_hf_config(path)), expected_shapes(hf_config)
    for name in sorted(theirs.keys() | ours.keys()):
        if theirs.get(name) != ours.get(name):
            raise UserError(
                f"{path}: {name} has shape {theirs.get(name)}, the given config.json asks for {ours.get(name)}"
            )
    # Together: every part of every tensor must be asked for by some rank.
    wanted = {str(number): dequantised(chunk.sharded_state_dict()) for number, chunk in enumerate(chunks)}
    loaded = load_sharded(path, {"model": wanted})["model"]
    for number, chunk in enumerate(chunks):
        chunk.load_state_dict(loaded[str(number)])


@torch.no_grad()
def load_hf_weights(model: LanguageModel, path: Path, hf_config: PretrainedConfig, pg: ProcessGroupCollection) -> None:
    """Loads slices of an HF checkpoint straight into this rank's parameters; no collectives.

    Args:
        model: This rank's slice; every parameter is overwritten, padded vocabulary rows with zeros.
        path: An HF directory with safetensors.
        hf_config: The config that the model was built from.
        pg: Process groups; ``pg.tp``, and for experts ``pg.ep`` and ``pg.expt_tp``, are read.

    Raises:
        UserError: A file or tensor is missing, truncated, unexpected or of another shape than the config says.
    """
    if not path.is_dir():
        raise UserError(f"{path}: no such directory")
    checkpoint = open_hf(path, hf_config)
    heads = Heads.of(hf_config)
    for mapped in mapped_parameters(model, hf_config):
        rank = (pg.tp if mapped.expert is None else pg.expt_tp).rank()
        shape = mapped.parameter.shape
        shard = read_shard(checkpoint, mapped.kind, mapped.hf_names, shape, heads, rank, mapped.expert)
        if shard.shape != shape:
            raise ValueError(f"{mapped.name}: {list(shard.shape)} read for {list(shape)}")
        write_parameter(mapped.parameter, shard)


@torch.no_grad()
def refuse_non_finite(chunks: Sequence[LanguageModel], path: Path, hf_config: PretrainedConfig) -> None:
    """Looks through loaded weights for NaN and infinity, which would make every loss NaN; no collectives.

    Args:
        chunks: This rank's slices.
        path: That they were loaded from.
        hf_config: The config that the model was built from.

    Raises:
        UserError: There is one; it names the HF tensor.
    """
    for chunk in chunks:
        for mapped in mapped_parameters(chunk, hf_config):
            weight = without_fp8(mapped.parameter.detach())
            if not all(math.isfinite(float(bound)) for bound in torch.aminmax(weight)):
                raise UserError(f"{path}: {_non_finite(path, mapped, weight.dtype)}: get or make these weights again")


def _non_finite(path: Path, mapped: MappedParameter, dtype: torch.dtype) -> str:
    """Which of a parameter's tensors holds NaN or infinity, as far as the files tell."""
    names = list(mapped.hf_names)
    if not is_megatron_checkpoint(path):
        files = HfCheckpoint(path)
        stored = [name for name in names if name in files.tensors]
        names = [name for name in stored if not files.whole(name).isfinite().all()]
        if not names:
            return f"{' or '.join(stored)} has values beyond what {str(dtype).removeprefix('torch.')} holds"
    return f"{' or '.join(names)} has values that are not finite"
