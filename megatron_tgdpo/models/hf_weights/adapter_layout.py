"""How LoRA adapters of ``peft`` lie in this project's terms: linears, names, shapes; nothing here needs megatron-core.

Legend as in ``models/lora.py``; i inputs, o outputs of a Hugging Face linear.
"""

import hashlib
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import PretrainedConfig

from megatron_tgdpo.checkpoints.adapter_directory import Lora, peft_shapes_there, read_peft_tensors
from megatron_tgdpo.errors import UserError
from megatron_tgdpo.models.families import family_of
from megatron_tgdpo.models.families.family import Kind
from megatron_tgdpo.models.hf_weights.mapping import Heads, expected_shapes, join_shards

# A decoder layer's parallel linears.
PARALLEL_LINEARS = ("self_attention.linear_qkv", "self_attention.linear_proj", "mlp.linear_fc1", "mlp.linear_fc2")


@dataclass(frozen=True)
class FusedLinear:
    """A parallel linear of one layer and the Hugging Face linears it is made of.

    Attributes:
        name: Relative to the layer, of ``PARALLEL_LINEARS``.
        kind: Of its weight, see ``families/family.py``.
        parts: Names of the Hugging Face linears, ``{layer}`` standing for the 0-based layer.
    """

    name: str
    kind: Kind
    parts: tuple[str, ...]

    @property
    def row_parallel(self) -> bool:
        return self.kind == "row"


def fused_linears(hf_config: PretrainedConfig) -> list[FusedLinear]:
    """Those of every layer, in the order of ``PARALLEL_LINEARS``.

    Raises:
        UserError: The model has experts.
    """
    family = family_of(hf_config.architectures)
    if family.has_experts:
        raise UserError(
            f"{family.architecture} has experts, beside which adapters are not supported yet: take whole models"
        )
    weights = family.weights
    found = []
    for name in PARALLEL_LINEARS:
        weight = weights[f"{name}.weight"]
        parts = tuple(tensor.removesuffix(".weight") for tensor, _ in weight.hf_tensors)
        found.append(FusedLinear(name, weight.kind, parts))
    return found


def checkpoint_prefix(fused: FusedLinear) -> str:
    """What the names of an adapter's tensors begin with in a checkpoint, in which all layers are stacked."""
    return f"decoder.layers.{fused.name}.adapter."


def adapted_linears(lora: Lora, hf_config: PretrainedConfig) -> dict[str, tuple[int, int]]:
    """(o, i) of each Hugging Face linear that has an adapter, by its name, in the order of a forward pass."""
    shapes = expected_shapes(hf_config)
    found = {}
    for layer in range(hf_config.num_hidden_layers):
        for fused in fused_linears(hf_config):
            for part in adapted_parts(fused, lora):
                name = part.format(layer=layer)
                rows, columns = shapes[f"{name}.weight"]
                found[name] = (rows, columns)
    return found


def adapted_parts(fused: FusedLinear, lora: Lora) -> Iterator[str]:
    """Those of a parallel linear's Hugging Face linears that have an adapter."""
    return (part for part in fused.parts if lora.adapts(part.rpartition(".")[2]))


def peft_shapes(lora: Lora, hf_config: PretrainedConfig) -> dict[str, tuple[int, int]]:
    """Name and shape of every tensor of an adapter: ``NAME.lora_A.weight`` [r, i], ``NAME.lora_B.weight`` [o, r]."""
    found = {}
    for name, (rows, columns) in adapted_linears(lora, hf_config).items():
        found[f"{name}.lora_A.weight"] = (lora.rank, columns)
        found[f"{name}.lora_B.weight"] = (rows, lora.rank)
    return found


def check_adapter(path: Path, lora: Lora, hf_config: PretrainedConfig) -> None:
    """Compares the tensors of a ``peft`` directory with what its config and the base model's ask for.

    Raises:
        UserError: One is missing, strange, or of another shape.
    """
    there, expected = peft_shapes_there(path), peft_shapes(lora, hf_config)
    for name in sorted(there.keys() | expected.keys()):
        if there.get(name) != expected.get(name):
            raise UserError(
                f"{path}: {name} has shape {there.get(name)}, its adapter_config.json and the base model's config.json "
                f"ask for {expected.get(name)}: an adapter of another base model, or damaged"
            )


def read_adapter(path: Path, lora: Lora, hf_config: PretrainedConfig) -> dict[str, Tensor]:
    """The tensors of a ``peft`` directory, by name, after :func:`check_adapter`.

    Raises:
        UserError: That does, or a value is not finite.
    """
    check_adapter(path, lora, hf_config)
    tensors = read_peft_tensors(path)
    for name, tensor in tensors.items():
        if not tensor.float().isfinite().all():
            raise UserError(f"{path}: {name} has values that are not finite: get or make this adapter again")
    return tensors


def new_adapter(lora: Lora, hf_config: PretrainedConfig, seed: int) -> Iterator[tuple[str, Tensor]]:
    """A fresh adapter as ``peft`` begins: A uniform within 1 / sqrt(i), B zero. The same on every layout."""
    for name, (rows, columns) in adapted_linears(lora, hf_config).items():
        digest = hashlib.sha256(f"{seed} {name}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
        bound = 1 / math.sqrt(columns)
        yield f"{name}.lora_A.weight", torch.empty(lora.rank, columns).uniform_(-bound, bound, generator=generator)
        yield f"{name}.lora_B.weight", torch.zeros(rows, lora.rank)


def peft_tensors(
    fused: FusedLinear, layer: int, a: Tensor, b: Tensor, lora: Lora, hf_config: PretrainedConfig
) -> Iterator[tuple[str, Tensor]]:
    """A parallel linear's whole ``a`` and ``b`` as tensors by their names in ``peft``.

    Args:
        fused: The linear.
        layer: 0-based.
        a: [n, r, i].
        b: As :class:`~megatron_tgdpo.models.lora.LoraAdapter` has it with one tensor rank.
        lora: What the adapter is.
        hf_config: Of the base model.
    """
    parts = list(b) if fused.kind == "glu" else [b]
    if fused.kind in ("qkv", "fused_qkv"):
        parts = join_shards(fused.kind, [b], Heads.of(hf_config), hf_config.vocab_size)
    if fused.kind == "fused_glu":
        parts = [b.flatten(0, 1)]
    wanted = set(adapted_parts(fused, lora))
    for number, part in enumerate(fused.parts):
        if part in wanted:
            name = part.format(layer=layer)
            yield f"{name}.lora_A.weight", a[number]
            yield f"{name}.lora_B.weight", parts[number]
