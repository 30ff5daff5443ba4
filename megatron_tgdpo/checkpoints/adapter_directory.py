"""LoRA adapters in directories as ``peft`` writes them: what they are, and their tensors.

An adapter of a linear adds ``scale * B @ A @ x`` to its output. Source: peft 0.21
``tuners/lora``, ``utils/save_and_load.py``.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import safetensors.torch
from safetensors import SafetensorError
from torch import Tensor

from megatron_tgdpo.checkpoints.manifest import read_metadata
from megatron_tgdpo.checkpoints.model_directory import (
    ADAPTER_CONFIG,
    ADAPTER_WEIGHTS,
    is_megatron_checkpoint,
    is_peft_adapter,
)
from megatron_tgdpo.errors import DamageError, UserError
from megatron_tgdpo.storage.files import read_error
from megatron_tgdpo.storage.json_text import check_shape, parse_json

# The linears of a decoder layer, by the names that Hugging Face gives them.
LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
# What some families have instead of several of them.
FUSED_LINEARS = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}
# What ``peft`` calls the parameters that hold a layer's experts: as in its documentation, or shorter. In a model with
# experts the last three linears are theirs, and those of layers without.
EXPERT_PARAMETERS = {
    f"{module}{name}": name for module in ("mlp.experts.", "experts.", "") for name in ("gate_up_proj", "down_proj")
}
# The same of dense MLPs where other layers have experts, of which a shared one's linears have the same names.
_DENSE_PARAMETERS = {f"mlp.{name}.weight": name for name in LINEARS[4:]}
_PARAMETERS = EXPERT_PARAMETERS | _DENSE_PARAMETERS
ALL_LINEAR = "all-linear"
# In a checkpoint's metadata: the fields of its adapter.
LORA = "lora"
# In the header of adapter_model.safetensors: the base model's fingerprint.
BASE = "base_sha256"
_DTYPES = ("F64", "F32", "F16", "BF16")
# A longer header is none (the format's own limit).
_MAX_HEADER_BYTES = 100_000_000
# What peft calls the model around the linears.
PREFIX = "base_model.model."
# Keys of adapter_config.json that change nothing about what a plain adapter computes. Every other key must be empty.
_HARMLESS = frozenset(
    {
        "peft_type", "task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision", "r",
        "inference_mode", "runtime_config", "target_modules", "target_parameters", "lora_alpha",
        "lora_dropout", "use_rslora",
        "init_lora_weights", "layers_pattern", "megatron_core", "qalora_group_size", "eva_config",
    }
)  # fmt: skip
# Other initialisations, as PiSSA's, change the base model.
_INITIALISATIONS = (True, False, None, "gaussian", "orthogonal", "eva")

T = TypeVar("T")


@dataclass(frozen=True)
class Lora:
    """What an adapter is, apart from its weights.

    Attributes:
        rank: Rows of each A, columns of each B.
        alpha: See :attr:`scale`.
        targets: Of ``LINEARS``: those that have an adapter, in every layer; for ``FUSED_LINEARS``, all of its parts.
        rslora: Whether alpha is divided by the root of the rank, not by the rank.
    """

    rank: int
    alpha: float
    targets: tuple[str, ...] = LINEARS
    rslora: bool = False

    def adapts(self, linear: str) -> bool:
        """Whether a linear has an adapter, of ``LINEARS`` or ``FUSED_LINEARS``.

        Raises:
            UserError: A part of it would.
        """
        parts = FUSED_LINEARS.get(linear, (linear,))
        named = [part for part in parts if part in self.targets]
        if named and len(named) < len(parts):
            raise UserError(
                f"an adapter of {', '.join(named)}, but {linear} is one linear in this model: name all of "
                f"{', '.join(parts)} or none"
            )
        return bool(named)

    @property
    def scale(self) -> float:
        return self.alpha / (math.sqrt(self.rank) if self.rslora else self.rank)


def read_peft_config(path: Path) -> tuple[Lora, str | None]:
    """An adapter directory's ``adapter_config.json``: what the adapter is, and what it calls its base model.

    Raises:
        UserError: It cannot be read, is of another kind than plain LoRA, or of other linears than ``LINEARS``.
    """
    file = path / ADAPTER_CONFIG
    try:
        content = parse_json(file.read_bytes())
        check_shape(content, dict, file.name)
    except OSError as error:
        raise read_error(file, error) from error
    except (ValueError, TypeError) as error:
        raise UserError(f"{file}: cannot be read ({error})") from error
    kind = content.get("peft_type")
    if kind != "LORA":
        raise UserError(f"{file}: an adapter of type {kind}: only LORA is supported")
    for key, value in content.items():
        if (key not in _HARMLESS and value not in ("none", None) and value) or (
            key == "init_lora_weights" and value not in _INITIALISATIONS
        ):
            raise UserError(f"{file}: {key} is {str(value)[:40]!r}: only plain LoRA is supported")
    rank, alpha = content.get("r"), content.get("lora_alpha")
    if not isinstance(rank, int) or isinstance(rank, bool) or rank < 1:
        raise UserError(f"{file}: r is {rank!r}: a positive number of rows is wanted")
    if not isinstance(alpha, int | float) or isinstance(alpha, bool) or not 0 < abs(alpha) < 1e12:
        raise UserError(f"{file}: lora_alpha is {str(alpha)[:40]}: a number other than 0 is wanted")
    rslora = content.get("use_rslora")
    if rslora not in (True, False, None) or (isinstance(rslora, int) and not isinstance(rslora, bool)):
        raise UserError(f"{file}: use_rslora is {str(rslora)[:40]!r}: true or false is wanted")
    base = content.get("base_model_name_or_path")
    lora = Lora(rank, float(alpha), _targets(file, content), bool(rslora))
    return lora, base if isinstance(base, str) and base else None


def _targets(file: Path, content: Mapping[str, Any]) -> tuple[str, ...]:
    stored, parameters = content.get("target_modules"), content.get("target_parameters") or []
    if stored == ALL_LINEAR and not parameters:
        return LINEARS
    if not isinstance(parameters, list) or not all(
        isinstance(name, str) and name in _PARAMETERS for name in parameters
    ):
        raise UserError(f"{file}: target_parameters is {str(parameters)[:80]}: supported are {', '.join(_PARAMETERS)}")
    if stored == ALL_LINEAR:
        raise UserError(f"{file}: target_modules is {ALL_LINEAR} beside target_parameters: name the modules")
    modules = stored if isinstance(stored, list) else [] if stored is None else [stored]
    names, known = [*modules, *(_PARAMETERS[name] for name in parameters)], (*LINEARS, *FUSED_LINEARS)
    unknown = [name for name in names if name not in known]
    if unknown or not names:
        raise UserError(f"{file}: target_modules names {unknown}: supported are {ALL_LINEAR} and {', '.join(known)}")
    wanted = {part for name in names for part in FUSED_LINEARS.get(name, (name,))}
    return tuple(name for name in LINEARS if name in wanted)


def read_peft_tensors(path: Path) -> dict[str, Tensor]:
    """All tensors of an adapter directory by name: ``model.layers.0.self_attn.q_proj.lora_A.weight``.

    Raises:
        UserError: There is no such file.
        DamageError: It is damaged.
        StorageError: It cannot be read.
    """
    file = path / ADAPTER_WEIGHTS
    try:
        tensors = safetensors.torch.load(file.read_bytes())
    except OSError as error:
        raise read_error(file, error) from error
    except SafetensorError as error:
        raise DamageError(f"{file}: damaged ({error}): get the adapter again") from error
    return _without_prefix(path, tensors)


def is_adapter(path: Path) -> bool:
    """Whether a directory holds an adapter: one of ``peft``, or a checkpoint of a run that trained one."""
    return is_peft_adapter(path) or (is_megatron_checkpoint(path) and LORA in read_metadata(path))


def read_lora(path: Path) -> Lora:
    """What the adapter in a directory is.

    Raises:
        UserError: It cannot be read, or is of a kind that is not supported.
    """
    if is_peft_adapter(path):
        return read_peft_config(path)[0]
    stored = read_metadata(path)[LORA]
    return Lora(stored["rank"], stored["alpha"], tuple(stored["targets"]), stored["rslora"])


def read_base(path: Path) -> str | None:
    """The fingerprint of an adapter's base model (``setup/fingerprints.py``), where the directory has it.

    Raises:
        UserError: It cannot be read.
    """
    if not is_peft_adapter(path):
        return (read_metadata(path).get("inputs") or {}).get("model.policy")
    base = _header(path).get("__metadata__", {}).get(BASE)
    return base if isinstance(base, str) else None


def peft_shapes_there(path: Path) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor of :func:`read_peft_tensors`, from the file's header; raises what that does."""
    entries = {name: entry for name, entry in _header(path).items() if name != "__metadata__"}
    for name, entry in entries.items():
        if entry["dtype"] not in _DTYPES:
            raise UserError(f"{path}: {name} has dtype {entry['dtype'][:40]}: only {', '.join(_DTYPES)} are read")
    shapes = {name: tuple(entry["shape"]) for name, entry in entries.items()}
    return _without_prefix(path, shapes)


def _header(path: Path) -> dict[str, Any]:
    file = path / ADAPTER_WEIGHTS
    if not file.is_file() and (path / "adapter_model.bin").is_file():
        raise UserError(f"{path}: weights as a pickle (adapter_model.bin): save the adapter as safetensors")
    try:
        with file.open("rb") as stream:
            size = int.from_bytes(stream.read(8), "little")
            text = stream.read(min(size, _MAX_HEADER_BYTES))
        if len(text) != size:
            raise ValueError("its header is longer than the file, or than headers are")
        header = parse_json(text)
        check_shape(header, dict, "header")
        check_shape(
            header,
            {name: {} if name == "__metadata__" else {"shape": [int], "dtype": str} for name in header},
            "header",
        )
    except OSError as error:
        raise read_error(file, error) from error
    except (ValueError, TypeError) as error:
        raise DamageError(f"{file}: damaged ({error}): get the adapter again") from error
    result: dict[str, Any] = header
    return result


def _without_prefix(path: Path, named: Mapping[str, T]) -> dict[str, T]:
    strange = [name for name in named if not name.startswith(PREFIX)]
    if strange:
        file = path / ADAPTER_WEIGHTS
        raise UserError(f"{file}: {strange[0]}: no tensor of a LoRA adapter (they begin with {PREFIX})")
    return {name.removeprefix(PREFIX): value for name, value in named.items()}
