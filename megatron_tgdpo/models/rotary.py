"""Rotary position frequencies, taken from the HF config through transformers' own formulas.

megatron-core hard-codes the constants of llama3 scaling, so its rotary embedding is not used.
"""

import math
from typing import Any

import torch
from torch import Tensor
from transformers import PretrainedConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from megatron_tgdpo.errors import UserError

SUPPORTED_ROPE_TYPES = ("default", "llama3", "linear", "yarn", "dynamic", "longrope")


def rope_layer_types(hf_config: PretrainedConfig) -> tuple[str, ...] | None:
    """The layer types that have rotary settings of their own, one table of angles each; None where all share one."""
    settings = getattr(hf_config, "rope_parameters", None) or {}
    if not any(isinstance(value, dict) for value in settings.values()):
        return None
    return tuple(sorted(set(hf_config.layer_types)))


def rope_settings(hf_config: PretrainedConfig, layer_type: str | None = None) -> tuple[str, float, dict[str, Any]]:
    """Reads rope type, base and scaling parameters from either of transformers' spellings.

    transformers 5 has ``rope_parameters`` with ``rope_theta`` inside, or one such dictionary for each layer type; 4.57
    has ``rope_theta`` and ``rope_scaling``.

    Args:
        hf_config: The HF config.
        layer_type: Of :func:`rope_layer_types`, if it has any.

    Returns:
        The type's name, the base (theta) and the dictionary as it is in the config (empty if there is none).
    """
    settings = getattr(hf_config, "rope_parameters", None) or getattr(hf_config, "rope_scaling", None) or {}
    if layer_type is not None:
        settings = settings.get(layer_type) or {}
    theta = settings.get("rope_theta") or getattr(hf_config, "rope_theta", None) or 10000.0
    return settings.get("rope_type") or settings.get("type") or "default", float(theta), dict(settings)


def head_dim(hf_config: PretrainedConfig) -> int:
    """Size of an attention head, which may differ from hidden_size / num_attention_heads."""
    result: int = getattr(hf_config, "head_dim", None) or hf_config.hidden_size // hf_config.num_attention_heads
    return result


def rotated_part(hf_config: PretrainedConfig, settings: dict[str, Any]) -> float:
    """The part of a head that is rotated, of :func:`rope_settings`' dictionary or the config itself."""
    for found in (settings.get("partial_rotary_factor"), getattr(hf_config, "partial_rotary_factor", None)):
        if found is not None:
            return float(found)
    return 1.0


def rope_frequencies(hf_config: PretrainedConfig, layer_type: str | None = None) -> tuple[Tensor, float]:
    """What rotary positions are made of.

    Args:
        hf_config: The HF config.
        layer_type: Of :func:`rope_layer_types`, if it has any.

    Returns:
        Radians a position, [R / 2] float32 on the CPU, where the first R elements of a head are rotated; and the factor
        by which YaRN and LongRoPE multiply what they rotate (1 for all other types). With dynamic scaling and LongRoPE
        they hold for sequences up to :func:`longest_exact`.

    Raises:
        UserError: The rope type is unknown here, its values give no frequencies, or it rotates no even part of a head.
    """
    rope_type, theta, settings = rope_settings(hf_config, layer_type)
    partial = rotated_part(hf_config, settings)
    if rope_type not in SUPPORTED_ROPE_TYPES:
        raise UserError(
            f"config.json: rope type {rope_type!r} is not supported, only {', '.join(SUPPORTED_ROPE_TYPES)}: take a "
            "model with one of these"
        )
    dim = int(head_dim(hf_config) * partial)
    if not 0 < dim <= head_dim(hf_config) or dim % 2:
        raise UserError(f"config.json: partial_rotary_factor {partial} rotates {dim} elements of a head, no even part")
    if rope_type == "default":
        inv_freq, factor = 1.0 / theta ** (torch.arange(0, dim, 2, dtype=torch.float32) / dim), 1.0
    else:
        named = {} if layer_type is None else {"layer_type": layer_type}
        inv_freq, factor = ROPE_INIT_FUNCTIONS[rope_type](hf_config, torch.device("cpu"), **named)
    if not inv_freq.isfinite().all() or not 0 < factor < math.inf:
        raise UserError(f"config.json: the rope scaling {settings} gives no finite frequencies")
    return inv_freq.float(), float(factor)


def longest_exact(hf_config: PretrainedConfig) -> int | None:
    """Tokens up to which the angles of a sequence are its own; None if they always are.

    Beyond it, dynamic scaling gives each batch the frequencies of the longest sequence that was seen so far, and
    LongRoPE those for long sequences to all of a batch that has one; Ministral-3 scales queries by their position.
    """
    found = []
    for kind in rope_layer_types(hf_config) or (None,):
        rope_type, _, settings = rope_settings(hf_config, kind)
        if rope_type == "dynamic":
            found.append(hf_config.max_position_embeddings)
        if rope_type == "longrope" or settings.get("llama_4_scaling_beta"):
            name = "original_max_position_embeddings"
            found.append(settings[name] if name in settings else getattr(hf_config, name))
    return min(found, default=None)


class RotaryFrequencies:
    """Angles by position id.

    Not a module on purpose: a buffer would be cast to bf16 with the rest of the model, and angles need fp32. YaRN's
    factor is part of the softmax's scale, or of the queries (``models/config.py``).

    Args:
        hf_config: The model's HF config.
        device: Where position ids will be.
        interleaved: Whether neighbours are rotated together, not the first half with the second.

    Raises:
        UserError: As :func:`rope_frequencies`.
    """

    def __init__(self, hf_config: PretrainedConfig, device: torch.device, *, interleaved: bool = False) -> None:
        tables = [rope_frequencies(hf_config, kind)[0] for kind in rope_layer_types(hf_config) or (None,)]
        doubled = [table.repeat_interleave(2) if interleaved else torch.cat((table, table)) for table in tables]
        self.inv_freq: Tensor = torch.cat(doubled).to(device=device)

    def __call__(self, position_ids: Tensor) -> Tensor:
        """Gathers the angles of each token.

        Args:
            position_ids: [1, S] integer.

        Returns:
            [S, 1, 1, R] fp32 radians, the two of a rotated pair equal, as megatron-core's rotary functions want them;
            several tables one after another.
        """
        return (position_ids[0, :, None].float() * self.inv_freq)[:, None, None, :]
