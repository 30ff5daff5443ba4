"""How LoRA adapters of ``peft`` lie in this project's terms: linears, names, shapes; nothing here needs megatron-core.

Legend as in ``models/lora.py``; i inputs, o outputs of a Hugging Face linear.
"""

import hashlib
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import PretrainedConfig

from megatron_tgdpo.checkpoints.adapter_directory import Lora, peft_shapes_there, read_peft_tensors
from megatron_tgdpo.errors import UserError
from megatron_tgdpo.models.families import family_of
from megatron_tgdpo.models.families.family import STACKED, Kind
from megatron_tgdpo.models.hf_weights.mapping import (
    Experts,
    Heads,
    are_alike,
    dimension_sizes,
    expert_layers,
    join_shards,
    stored_layer,
)

# A decoder layer's parallel linears: of attention, and of an MLP. Experts have two of the latter each.
PARALLEL_LINEARS = ("self_attention.linear_qkv", "self_attention.linear_proj", "mlp.linear_fc1", "mlp.linear_fc2")
# What transformers 5 calls a layer's experts, whose matrices of one kind are one parameter.
_EXPERTS = "model.layers.{layer}.mlp.experts"
_ONE_EXPERT = re.compile(r"\.experts\.\d+\.")


@dataclass(frozen=True)
class FusedLinear:
    """A parallel linear of one layer and the Hugging Face linears it is made of.

    Attributes:
        name: Relative to the layer, of ``PARALLEL_LINEARS``; of experts as in a checkpoint.
        kind: Of its weight, see ``families/family.py``.
        parts: Names of the Hugging Face linears, ``{layer}`` standing for the 0-based layer; of experts that of the
            parameter that has them all.
        prefix: What the names of an adapter's tensors begin with in a checkpoint.
        index: The layer's place on their first axis; nothing where they are of this layer alone.
        experts: How many there are of it in a layer, each with an adapter of its own; 0 of what is no expert's.
    """

    name: str
    kind: Kind
    parts: tuple[str, ...]
    prefix: str
    index: tuple[int, ...]
    experts: int = 0

    @property
    def row_parallel(self) -> bool:
        return self.kind == "row"


def fused_linears(hf_config: PretrainedConfig, layer: int = 0) -> list[FusedLinear]:
    """Those of a layer, counted from 0, in the order of ``PARALLEL_LINEARS``.

    With experts, theirs take the MLP's place, each with gate and up as one, as transformers 5 and so ``peft`` has them.
    Routers and shared experts are not among them: ``peft`` has no name for a shared expert's that it does not take as
    the experts'.
    """
    family, with_experts = family_of(hf_config.architectures), expert_layers(hf_config)
    experts = Experts.of(hf_config) if with_experts[layer] else None
    prefix, index = stored_layer(layer, alike=are_alike(with_experts))
    found = []
    for name in PARALLEL_LINEARS[: None if experts is None else 2]:
        weight = family.weights[f"{name}.weight"]
        parts = tuple(tensor.removesuffix(".weight") for tensor, _ in weight.hf_tensors)
        found.append(FusedLinear(name, weight.kind, parts, f"{prefix}{name}.adapter.", index))
    if experts is not None:
        linears: list[tuple[str, Kind, str]] = [
            ("mlp.experts.linear_fc1", "fused_glu", "gate_up_proj"),
            ("mlp.experts.linear_fc2", "row", "down_proj"),
        ]
        for name, kind, part in linears:
            stored = family.weights[f"{name}.weight"].kind
            if stored in STACKED:
                kind = stored
            parts = (f"{_EXPERTS}.{part}",)
            found.append(FusedLinear(name, kind, parts, f"{prefix}{name}.adapter.", index, experts.count))
    return found


def linear_shapes(fused: FusedLinear, hf_config: PretrainedConfig) -> list[tuple[int, int]]:
    """(o, i) of each of a parallel linear's parts; of one expert's."""
    experts = Experts.of(hf_config)
    if fused.experts and experts is not None:
        hidden = hf_config.hidden_size
        return [(hidden, experts.size) if fused.row_parallel else (2 * experts.size, hidden)]
    weight, sizes = family_of(hf_config.architectures).weights[f"{fused.name}.weight"], dimension_sizes(hf_config)
    return [(sizes[rows], sizes[columns]) for _, (rows, columns) in weight.hf_tensors]


def adapted_linears(lora: Lora, hf_config: PretrainedConfig) -> dict[str, tuple[int, int, int]]:
    """(experts, o, i) of each Hugging Face linear that has an adapter, by its name in ``peft``, in the order of a
    forward pass; 1 for experts of what is no expert's."""
    found = {}
    for layer in range(hf_config.num_hidden_layers):
        for fused in fused_linears(hf_config, layer):
            wanted = set(adapted_parts(fused, lora))
            for part, shape in zip(fused.parts, linear_shapes(fused, hf_config), strict=True):
                if part in wanted:
                    found[peft_name(fused, part, layer, lora)] = (fused.experts or 1, *shape)
    return found


def peft_name(fused: FusedLinear, part: str, layer: int, lora: Lora) -> str:
    """What ``peft`` calls a linear.

    Of experts it wraps the module that has their parameters, once for each that has adapters, in their order; so the
    first of two is within the second, as its base layer.
    """
    name = part.format(layer=layer)
    if not fused.experts:
        return name
    return name.rpartition(".")[0] + (".base_layer" if not fused.row_parallel and lora.adapts("down_proj") else "")


def adapted_parts(fused: FusedLinear, lora: Lora) -> Iterator[str]:
    """Those of a parallel linear's Hugging Face linears that have an adapter.

    Raises:
        UserError: Not all parts of one linear would, or experts with biases.
    """
    found = [part for part in fused.parts if lora.adapts(part.rpartition(".")[2])]
    if found and fused.kind in STACKED:
        raise UserError(
            f"adapters of {', '.join(lora.targets)}: this model's experts have biases, and adapters of such are not "
            "supported: take those of attention (q_proj, k_proj, v_proj, o_proj) alone"
        )
    return iter(found)


def peft_shapes(lora: Lora, hf_config: PretrainedConfig) -> dict[str, tuple[int, int]]:
    """Name and shape of every tensor of an adapter: ``NAME.lora_A.weight`` [r, i], ``NAME.lora_B.weight`` [o, r].

    Of experts: [experts r, i], an expert's rows one after another; [o, r experts], the experts' columns in turns.
    """
    found = {}
    for name, (experts, rows, columns) in adapted_linears(lora, hf_config).items():
        found[f"{name}.lora_A.weight"] = (experts * lora.rank, columns)
        found[f"{name}.lora_B.weight"] = (rows, lora.rank * experts)
    return found


def check_adapter(path: Path, lora: Lora, hf_config: PretrainedConfig) -> None:
    """Compares the tensors of a ``peft`` directory with what its config and the base model's ask for.

    Raises:
        UserError: One is missing, strange, or of another shape.
    """
    there, expected = peft_shapes_there(path), peft_shapes(lora, hf_config)
    single = next((name for name in sorted(there) if _ONE_EXPERT.search(name)), None)
    if single is not None:
        raise UserError(
            f"{path}: {single} is an adapter of one expert's linear, as transformers 4 has them: only those of all "
            "experts in one are read (target_parameters mlp.experts.gate_up_proj and mlp.experts.down_proj)"
        )
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
    for name, (experts, rows, columns) in adapted_linears(lora, hf_config).items():
        digest = hashlib.sha256(f"{seed} {name}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
        bound = 1 / math.sqrt(columns)
        yield (
            f"{name}.lora_A.weight",
            torch.empty(experts * lora.rank, columns).uniform_(-bound, bound, generator=generator),
        )
        yield f"{name}.lora_B.weight", torch.zeros(rows, lora.rank * experts)


def peft_tensors(
    fused: FusedLinear, layer: int, a: Tensor, b: Tensor, lora: Lora, hf_config: PretrainedConfig
) -> Iterator[tuple[str, Tensor]]:
    """A parallel linear's whole ``a`` and ``b`` as tensors by their names in ``peft``.

    Args:
        fused: The linear.
        layer: 0-based.
        a: [n, r, i]; of experts [experts, r, i].
        b: As :class:`~megatron_tgdpo.models.lora.LoraAdapter` has it with one tensor rank; of experts as many of what
            :class:`~megatron_tgdpo.models.lora.ExpertAdapter` has.
        lora: What the adapter is.
        hf_config: Of the base model.
    """
    if fused.experts:
        (part,) = fused.parts
        name = peft_name(fused, part, layer, lora)
        yield f"{name}.lora_A.weight", a.flatten(0, 1)
        yield f"{name}.lora_B.weight", b.flatten(1, -2).permute(1, 2, 0).flatten(1)
        return
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


def of_expert(tensors: Mapping[str, Tensor], name: str, experts: int, expert: int) -> tuple[Tensor, Tensor]:
    """A [r, i] and B [o, r] of one expert, from tensors by their names in ``peft``, of ``name``."""
    a, b = (tensors[f"{name}.lora_{which}.weight"] for which in "AB")
    return a.view(experts, -1, a.shape[1])[expert], b.view(b.shape[0], -1, experts)[:, :, expert]


def factors(
    tensors: Mapping[str, Tensor], lora: Lora, hf_config: PretrainedConfig
) -> Iterator[tuple[str, Tensor, Tensor]]:
    """A and B of each tensor of a Hugging Face checkpoint that an adapter adds to, by the tensor's name.

    Args:
        tensors: By their names in ``peft``.
        lora: What the adapter is.
        hf_config: Of the base model.
    """
    weights = family_of(hf_config.architectures).weights
    for layer in range(hf_config.num_hidden_layers):
        for fused in fused_linears(hf_config, layer):
            for part in adapted_parts(fused, lora):
                name = peft_name(fused, part, layer, lora)
                if not fused.experts:
                    yield f"{name}.weight", tensors[f"{name}.lora_A.weight"], tensors[f"{name}.lora_B.weight"]
                    continue
                stored = weights[f"{fused.name}.weight"].hf_tensors
                for expert in range(fused.experts):
                    a, b = of_expert(tensors, name, fused.experts, expert)
                    # Files have gate and up of each expert.
                    for (tensor, _), rows in zip(stored, b.chunk(len(stored)), strict=True):
                        yield tensor.format(layer=layer, expert=expert), a, rows
