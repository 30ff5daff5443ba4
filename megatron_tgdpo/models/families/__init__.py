"""Model families by HF architecture name; one declarative file each."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from types import MappingProxyType
from typing import Any

from transformers import PretrainedConfig

from megatron_tgdpo.errors import UserError
from megatron_tgdpo.models.families import (
    deepseek,
    dots1,
    ernie4_5,
    exaone4,
    exaone_moe,
    gemma2,
    gemma3,
    glm4,
    glm4_moe,
    gpt_oss,
    granite,
    llama,
    minicpm3,
    mistral,
    mixtral,
    olmo2,
    olmoe,
    phi3,
    qwen2,
    qwen2_moe,
    qwen3,
    qwen3_moe,
    seed_oss,
    smollm3,
    solar_open,
    youtu,
)
from megatron_tgdpo.models.families.family import Family

FAMILIES: tuple[Family, ...] = (
    llama.FAMILY,
    gemma2.FAMILY,
    qwen2.FAMILY,
    qwen3.FAMILY,
    mistral.FAMILY,
    gemma3.FAMILY,
    phi3.FAMILY,
    olmo2.OLMO2,
    olmo2.OLMO3,
    glm4.GLM,
    glm4.GLM4,
    smollm3.FAMILY,
    mistral.MINISTRAL,
    mistral.MINISTRAL3,
    granite.FAMILY,
    seed_oss.FAMILY,
    exaone4.FAMILY,
    ernie4_5.FAMILY,
    llama.CWM,
    gemma2.VAULTGEMMA,
    granite.HYPERCLOVAX,
    ernie4_5.HELIUM,
    youtu.FAMILY,
    minicpm3.FAMILY,
    qwen3_moe.FAMILY,
    qwen2_moe.FAMILY,
    mixtral.FAMILY,
    olmoe.FAMILY,
    gpt_oss.FAMILY,
    glm4_moe.FAMILY,
    glm4_moe.LITE,
    deepseek.V2,
    deepseek.V3,
    dots1.FAMILY,
    exaone_moe.FAMILY,
    solar_open.FAMILY,
)
# What the models of these architectures have and no model here; parts of names, the first that fits counts.
BEYOND = {
    "ForConditionalGeneration": "inputs other than text",
    "Gemma3n": "layers that share keys, and embeddings for each layer",
    "Gemma4": "layers that share keys, and embeddings for each layer",
    "Qwen3_5": "gated delta-net layers",
    "OlmoHybrid": "gated delta-net layers",
    "KimiLinear": "gated delta-net layers",
    "Mamba": "state-space layers",
    "Bamba": "state-space layers",
    "FalconH1": "state-space layers",
    "NemotronH": "state-space layers",
    "Zamba": "state-space layers",
    "Lfm": "convolution layers",
    "HunYuanDense": "norms of query and key heads after rotation",
    "Cohere": "attention and MLP side by side",
    "Nemotron": "an MLP without gate",
    "Arcee": "an MLP without gate",
    "Apertus": "an MLP without gate",
    "Starcoder2": "norms that subtract the mean",
    "StableLm": "norms that subtract the mean",
    "OlmoFor": "norms that subtract the mean",
    "PhiFor": "norms that subtract the mean",
    "GPT": "norms that subtract the mean",
}
# The same of those with experts, whatever the case of letters.
EXPERTS_BEYOND = {
    "DeepseekV32": "latent attention (MLA) that chooses its keys",
    "GlmMoeDsa": "latent attention (MLA) that chooses its keys",
    "LongcatFlash": "latent attention (MLA), and experts that do nothing",
    "Qwen3_5Moe": "gated delta-net layers",
    "Qwen3Next": "linear attention",
    "Llama4": "chunked attention and layers without rotary positions",
    "Jamba": "state-space layers",
    "Dbrx": "all of their weights in one tensor",
    "MiniMaxM2": "sigmoid scores, and none for all tokens",
    "Ernie4_5_Moe": "a softmax to whose scores a bias is added for the choice",
    "HunYuanMoE": "norms of query and key heads after rotation",
    "GraniteMoeHybrid": "state-space layers",
    "GraniteMoe": "fused projections of all experts in one tensor",
    "FlexOlmo": "norms after attention and experts only",
    "Phimoe": "a choice of two experts by thresholds, and norms that subtract the mean",
    "Moe": "parts that no family here has",
}


def family_of(architectures: Sequence[str] | None) -> Family:
    """Finds the family by the ``architectures`` of a ``config.json``.

    Raises:
        UserError: The config names no architecture, or one that is not supported.
    """
    for family in FAMILIES:
        if family.architecture in (architectures or ()):
            return family
    known = ", ".join(family.architecture for family in FAMILIES)
    names = " ".join(architectures or ()).lower()
    lacking = next((what for part, what in EXPERTS_BEYOND.items() if part.lower() in names), None)
    reason = f", a mixture of experts with {lacking}, which is not supported" if lacking else ""
    beyond = next((what for part, what in BEYOND.items() if any(part in name for name in architectures or ())), None)
    if beyond is not None and not lacking:
        reason = f", with {beyond}, which is not supported (docs/families.md)"
    raise UserError(f"config.json: architectures is {architectures}{reason}; supported are: {known}")


@dataclass(frozen=True)
class SameConfig:
    """A config by which object it is, as configs have no hash; nobody changes one that was read."""

    hf_config: PretrainedConfig

    def __hash__(self) -> int:
        return id(self.hf_config)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, SameConfig) and other.hf_config is self.hf_config


def settings_of(hf_config: PretrainedConfig) -> Mapping[str, Any]:
    """A model's ``Family.config_kwargs``, made once: a ranking of layouts asks for them a hundred thousand times.

    Raises:
        UserError: As :func:`family_of` and ``Family.config_kwargs``.
    """
    return _settings(SameConfig(hf_config))


@lru_cache(maxsize=64)
def _settings(same: SameConfig) -> Mapping[str, Any]:
    return MappingProxyType(family_of(same.hf_config.architectures).config_kwargs(same.hf_config))
