"""What decoders with multi-head latent attention (MLA) have in common: DeepSeek-V2's attention (arXiv 2405.04434, 2.1).

Keys and values of all heads come of one small vector for each token, after a norm, and so may queries; a part of each
query head is rotated, and of keys one such part that all heads share. Values have a size of their own.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from transformers import PretrainedConfig

from megatron_tgdpo.errors import UserError
from megatron_tgdpo.models.families import dense
from megatron_tgdpo.models.families.dense import ATTENTION
from megatron_tgdpo.models.families.family import Weight
from megatron_tgdpo.models.rotary import rope_settings


@dataclass(frozen=True)
class LatentSizes:
    """Of latent attention, in elements.

    Attributes:
        query_rank: Of the vector that queries come of; None where they come of the hidden state.
        rank: Of the one that keys and values come of.
        plain: Of a query or key head what is not rotated.
        rotated: What is.
        value: Of a value head.
    """

    query_rank: int | None
    rank: int
    plain: int
    rotated: int
    value: int

    @property
    def query(self) -> int:
        """Of a query or key head."""
        return self.plain + self.rotated


CONFIG_KEYS = dense.CONFIG_KEYS | {
    "q_lora_rank",
    "kv_lora_rank",
    "qk_nope_head_dim",
    "qk_rope_head_dim",
    "v_head_dim",
    "qk_head_dim",
}

_INSIDE = ("self_attention.linear_qkv.weight", "self_attention.linear_proj.weight")


def _linear(
    name: str, kind: Any, rows: Any, columns: Any, *, only_if: str | None = None, unless: str | None = None
) -> Weight:
    return Weight(kind, ((f"{ATTENTION}{name}.weight", (rows, columns)),), only_if, unless)


_WEIGHTS = {
    "self_attention.linear_q.weight": _linear("q_proj", "column", "latent_query", "hidden", unless="q_lora_rank"),
    "self_attention.linear_q_down.weight": _linear("q_a_proj", "copy", "query_rank", "hidden", only_if="q_lora_rank"),
    "self_attention.q_layernorm.weight": Weight(
        "copy", ((ATTENTION + "q_a_layernorm.weight", ("query_rank",)),), only_if="q_lora_rank"
    ),
    "self_attention.linear_q_up.weight": _linear(
        "q_b_proj", "column", "latent_query", "query_rank", only_if="q_lora_rank"
    ),
    "self_attention.linear_kv_down.weight": _linear("kv_a_proj_with_mqa", "copy", "latent", "hidden"),
    "self_attention.kv_layernorm.weight": Weight("copy", ((ATTENTION + "kv_a_layernorm.weight", ("rank",)),)),
    "self_attention.linear_kv_up.weight": _linear("kv_b_proj", "column", "latent_kv", "rank"),
    "self_attention.linear_proj.weight": _linear("o_proj", "row", "hidden", "latent_value"),
}


def with_latent_attention(weights: Mapping[str, Weight]) -> dict[str, Weight]:
    """A decoder's weights with those of latent attention in the place of its own."""
    return {**{name: weight for name, weight in weights.items() if name not in _INSIDE}, **_WEIGHTS}


def attention_kwargs(hf_config: PretrainedConfig, *, interleaved: bool) -> dict[str, Any]:
    """The settings of latent attention, which win over the decoder's own.

    Args:
        hf_config: The HF config.
        interleaved: Whether neighbours are rotated together.

    Raises:
        UserError: A size that no such attention has, or grouped heads.
    """
    for key in ("kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim", "q_lora_rank"):
        size = getattr(hf_config, key)
        if not (key == "q_lora_rank" and size is None) and (not isinstance(size, int) or size < 1):
            raise UserError(f"config.json: {key} is {size!r}: it must be a positive number")
    heads, groups = hf_config.num_attention_heads, hf_config.num_key_value_heads
    if heads != groups:
        raise UserError(
            f"config.json: num_key_value_heads is {groups}, but with latent attention every one of the {heads} heads "
            "has keys of its own: set it to num_attention_heads"
        )
    sizes = LatentSizes(
        hf_config.q_lora_rank,
        hf_config.kv_lora_rank,
        hf_config.qk_nope_head_dim,
        hf_config.qk_rope_head_dim,
        hf_config.v_head_dim,
    )
    if sizes.value > sizes.query:
        raise UserError(
            f"config.json: v_head_dim {sizes.value} is more than qk_nope_head_dim and qk_rope_head_dim together, "
            f"{sizes.query}: attention kernels take values of the size of keys at most"
        )
    return {
        # megatron-core's name of what the last projection takes from each head.
        "kv_channels": sizes.value,
        "latent": sizes,
        "softmax_scale": _temperature(hf_config) / math.sqrt(sizes.query),
        "rotary_interleaved": interleaved,
    }


def _temperature(hf_config: PretrainedConfig) -> float:
    """What YaRN multiplies all scores by: the square of 0.1 m log(factor) + 1, of ``mscale_all_dim`` m.

    Beside it what is rotated has a factor of its own, 1 in all published models (``models/rotary.py``).
    """
    rope_type, _, settings = rope_settings(hf_config)
    scale, factor = settings.get("mscale_all_dim") or 0.0, settings.get("factor") or 1.0
    if rope_type == "default" or factor <= 1:
        return 1.0
    return float((0.1 * scale * math.log(factor) + 1) ** 2)
