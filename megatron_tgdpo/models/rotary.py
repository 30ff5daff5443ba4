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

SUPPORTED_ROPE_TYPES = ("default", "llama3", "linear", "yarn", "dynamic")


def rope_settings(hf_config: PretrainedConfig) -> tuple[str, float, dict[str, Any]]:
    """Reads rope type, base and scaling parameters from either of transformers' spellings.

    transformers 5 has ``rope_parameters`` with ``rope_theta`` inside; 4.57 has ``rope_theta`` and ``rope_scaling``.

    Returns:
        The type's name, the base (theta) and the dictionary as it is in the config (empty if there is none).
    """
    settings = getattr(hf_config, "rope_parameters", None) or getattr(hf_config, "rope_scaling", None) or {}
    theta = settings.get("rope_theta") or getattr(hf_config, "rope_theta", None) or 10000.0
    return settings.get("rope_type") or settings.get("type") or "default", float(theta), dict(settings)


def head_dim(hf_config: PretrainedConfig) -> int:
    """Size of an attention head, which may differ from hidden_size / num_attention_heads."""
    result: int = getattr(hf_config, "head_dim", None) or hf_config.hidden_size // hf_config.num_attention_heads
    return result


def rope_frequencies(hf_config: PretrainedConfig) -> tuple[Tensor, float]:
    """What rotary positions are made of.

    Returns:
        Radians a position, [D / 2] float32 on the CPU, and the factor by which YaRN multiplies rotated queries and keys
        (1 for all other types). With dynamic scaling they hold for sequences up to :func:`longest_exact`.

    Raises:
        UserError: The rope type is unknown here, its values give no frequencies, or it rotates only part of a head.
    """
    rope_type, theta, settings = rope_settings(hf_config)
    partial = settings.get("partial_rotary_factor", getattr(hf_config, "partial_rotary_factor", None))
    if rope_type not in SUPPORTED_ROPE_TYPES:
        raise UserError(
            f"config.json: rope type {rope_type!r} is not supported, only {', '.join(SUPPORTED_ROPE_TYPES)}: take a "
            "model with one of these"
        )
    if partial not in (None, 1, 1.0):
        raise UserError(f"config.json: partial_rotary_factor {partial} is not supported, only 1")
    if rope_type == "default":
        dim = head_dim(hf_config)
        inv_freq, factor = 1.0 / theta ** (torch.arange(0, dim, 2, dtype=torch.float32) / dim), 1.0
    else:
        inv_freq, factor = ROPE_INIT_FUNCTIONS[rope_type](hf_config, torch.device("cpu"))
    if not inv_freq.isfinite().all() or not 0 < factor < math.inf:
        raise UserError(f"config.json: the rope scaling {settings} gives no finite frequencies")
    return inv_freq.float(), float(factor)


def longest_exact(hf_config: PretrainedConfig) -> int | None:
    """Tokens up to which the angles of a sequence are its own; None if they always are.

    Beyond it, dynamic scaling gives each batch the frequencies of the longest sequence that was seen so far.
    """
    return hf_config.max_position_embeddings if rope_settings(hf_config)[0] == "dynamic" else None


class RotaryFrequencies:
    """Angles by position id.

    Not a module on purpose: a buffer would be cast to bf16 with the rest of the model, and angles need fp32. YaRN's
    factor is part of the softmax's scale (``models/config.py``).

    Args:
        hf_config: The model's HF config.
        device: Where position ids will be.

    Raises:
        UserError: As :func:`rope_frequencies`.
    """

    def __init__(self, hf_config: PretrainedConfig, device: torch.device) -> None:
        inv_freq, _ = rope_frequencies(hf_config)
        self.inv_freq: Tensor = inv_freq.to(device=device)

    def __call__(self, position_ids: Tensor) -> Tensor:
        """Gathers the angles of each token.

        Args:
            position_ids: [1, S] integer.

        Returns:
            [S, 1, 1, D] fp32 radians, the two halves of D equal, as megatron-core's rotary functions want them.
        """
        angles = position_ids[0, :, None].float() * self.inv_freq
        return torch.cat((angles, angles), dim=-1)[:, None, None, :]
