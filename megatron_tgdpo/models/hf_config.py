"""The HF config of a model directory, read and checked."""

import contextlib
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, PretrainedConfig
from transformers.configuration_utils import ALLOWED_LAYER_TYPES
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, MODEL_MAPPING_NAMES

from megatron_tgdpo.checkpoints.model_directory import check_hf_files, hf_directory, refuse_adapter
from megatron_tgdpo.errors import UserError, one_line
from megatron_tgdpo.models.families import family_of
from megatron_tgdpo.models.families.family import Family
from megatron_tgdpo.models.rotary import RotaryFrequencies
from megatron_tgdpo.storage.files import read_error
from megatron_tgdpo.storage.json_text import parse_json

_VOCABULARY_MULTIPLE = 128
_MAY_BE_ZERO = ("mscale", "mscale_all_dim", "llama_4_scaling_beta")
_ROTARY_NUMBERS = {
    "rope_theta",
    "rope_local_base_freq",
    "partial_rotary_factor",
    "factor",
    "original_max_position_embeddings",
    "low_freq_factor",
    "high_freq_factor",
    "beta_fast",
    "beta_slow",
    "attention_factor",
    *_MAY_BE_ZERO,
}


def read_hf_config(path: Path) -> PretrainedConfig:
    """Reads the HF config of a checkpoint directory and checks that this project computes the same model.

    Args:
        path: An HF directory, or a Megatron checkpoint directory (its ``hf/`` subfolder is read). Local files only.

    Raises:
        UserError: A LoRA adapter, no or malformed ``config.json``, an unknown architecture, or a setting that would
            change the maths.
    """
    refuse_adapter(path)
    directory = hf_directory(path)
    file = directory / "config.json"
    if not file.is_file():
        raise UserError(f"{path}: no config.json there, give an HF or a Megatron checkpoint directory")
    check_hf_files(path, "config.json")
    try:
        values = parse_json(file.read_text(encoding="utf-8"))
        architectures = _architectures(values)
    except OSError as error:
        raise read_error(file, error) from error
    except (ValueError, TypeError, AttributeError) as error:
        raise UserError(f"{file}: not a readable HF config: {error}") from error
    try:
        family = family_of(architectures)
        if values.get("transformers_weights"):
            raise UserError(
                f"config.json: transformers_weights is {values['transformers_weights']!r}, only model.safetensors, or "
                "its shards by their index, are read: save the model again without it"
            )
        _check_rotary_values(values)
        hf_config = AutoConfig.from_pretrained(directory, local_files_only=True, trust_remote_code=False)
        # transformers goes by model_type alone.
        if _causal_lm(hf_config.model_type) != family.architecture:
            raise UserError(
                f"config.json: architectures is {architectures}, but model_type is {hf_config.model_type!r}, which "
                "transformers loads as another model: mend the one that is wrong"
            )
        _check(hf_config, family)
    except UserError as error:
        raise UserError(f"{directory}: {error}") from error
    except Exception as error:  # transformers raises many types for one cause: the file's content
        raise UserError(f"{file}: {_what_is_wrong(values, family, error)}") from error
    hf_config.architectures = architectures
    result: PretrainedConfig = hf_config
    return result


def _check(hf_config: PretrainedConfig, family: Family) -> None:
    """Refuses what this project would compute otherwise; of other wrong values an error of any type may come."""
    if getattr(hf_config, "quantization_config", None):
        raise UserError(f"config.json: quantization_config: {_dequantise(hf_config)}")
    _check_sizes(hf_config)
    family.check(hf_config)
    family.config_kwargs(hf_config)
    RotaryFrequencies(hf_config, torch.device("cpu"))


def _what_is_wrong(values: Mapping[str, Any], family: Family, error: Exception) -> str:
    """Names the value that an error comes of: the only one without which there is none; else what the error says."""
    found = []
    for name in values.keys() - {"model_type"}:
        others = {key: value for key, value in values.items() if key != name}
        with contextlib.suppress(Exception):
            _check(AutoConfig.for_model(**others), family)
            found.append(name)
    if len(found) != 1:
        return one_line(error)
    return f"{found[0]} is {values[found[0]]!r:.200}, which is no value for it in a {values['model_type']} model"


def _check_rotary_values(values: Mapping[str, Any]) -> None:
    """Refuses rotary settings that are no numbers, or not positive; transformers computes with them unseen.

    Raises:
        UserError: There is one.
    """
    for key in ("rope_scaling", "rope_parameters"):
        settings = values.get(key) or {}
        if not isinstance(settings, dict):
            raise UserError(f"config.json: {key} is {settings!r:.60}: it must be a mapping")
        by_layer_type = {name: inner for name, inner in settings.items() if name in ALLOWED_LAYER_TYPES}
        for where, each in (
            (key, settings),
            *((f"{key}.{name}", inner or {}) for name, inner in by_layer_type.items()),
        ):
            if not isinstance(each, dict):
                raise UserError(f"config.json: {where} is {each!r:.60}: it must be a mapping")
            for name in _ROTARY_NUMBERS & each.keys():
                _check_number(f"{where}.{name}", each[name])
    for name in _ROTARY_NUMBERS & values.keys():
        _check_number(name, values[name])


def _check_number(name: str, value: Any) -> None:
    is_number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    if value is not None and not (is_number and (value > 0 or name.endswith(_MAY_BE_ZERO))):
        kind = "number" if name.endswith(_MAY_BE_ZERO) else "positive number"
        raise UserError(f"config.json: {name} is {value!r:.60}: it must be a {kind}")


def _dequantise(hf_config: PretrainedConfig) -> str:
    """Why quantised weights are refused, and what to do."""
    settings = hf_config.quantization_config
    method = settings.get("quant_method") if isinstance(settings, dict) else getattr(settings, "quant_method", None)
    name, exact = str(getattr(method, "value", method)), ""
    if name == "mxfp4":
        reader, exact = "Mxfp4Config", ", which is exact,"
    elif name == "fp8":
        reader = "FineGrainedFP8Config"
    else:
        return "quantized weights are not supported, dequantize them"
    return (
        f"{name.upper()} weights are not supported: load them with transformers "
        f'(AutoModelForCausalLM.from_pretrained(DIR, quantization_config={reader}(dequantize=True), dtype="bfloat16"))'
        f"{exact} and save_pretrained to another directory"
    )


def _architectures(values: Mapping[str, Any]) -> list[str] | None:
    """A config's architectures; those of the causal language model where there is none, or the model without a head."""
    given, model_type = values.get("architectures"), values.get("model_type")
    headless = MODEL_MAPPING_NAMES.get(str(model_type))
    causal_lm = _causal_lm(model_type)
    return [causal_lm] if causal_lm and (not given or given == [headless]) else given


def _causal_lm(model_type: object) -> str | None:
    """The class that transformers loads for a ``model_type``."""
    return MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(str(model_type))


def padded_vocab_size(hf_config: PretrainedConfig, tensor: int) -> int:
    """Rows of the embedding: a multiple of lcm(128, tp), so that checkpoints do not depend on tp."""
    multiple = math.lcm(_VOCABULARY_MULTIPLE, tensor)
    result: int = math.ceil(hf_config.vocab_size / multiple) * multiple
    return result


def _check_sizes(hf_config: PretrainedConfig) -> None:
    """Refuses a size that no model has; transformers checks types only.

    Raises:
        UserError: A size below 1, or query heads that the key heads do not divide.
    """
    # Families with a size of their own for experts do not read intermediate_size.
    hidden = "moe_intermediate_size" if hasattr(hf_config, "moe_intermediate_size") else "intermediate_size"
    heads = ("num_attention_heads", "num_key_value_heads")
    for key in ("num_hidden_layers", "hidden_size", "vocab_size", hidden, *heads):
        if not isinstance(getattr(hf_config, key), int) or getattr(hf_config, key) < 1:
            raise UserError(f"config.json: {key} is {getattr(hf_config, key)}: it must be positive")
    query, groups = (getattr(hf_config, key) for key in heads)
    if query % groups:
        raise UserError(f"config.json: num_attention_heads {query} is not divisible by num_key_value_heads {groups}")
