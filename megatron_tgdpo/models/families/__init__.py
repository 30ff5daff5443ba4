"""Model families by HF architecture name; one declarative file each."""

from collections.abc import Sequence

from megatron_tgdpo.errors import UserError
from megatron_tgdpo.models.families import gemma2, llama, mistral, mixtral, qwen2, qwen2_moe, qwen3, qwen3_moe
from megatron_tgdpo.models.families.family import Family

FAMILIES: tuple[Family, ...] = (
    llama.FAMILY,
    gemma2.FAMILY,
    qwen2.FAMILY,
    qwen3.FAMILY,
    mistral.FAMILY,
    qwen3_moe.FAMILY,
    qwen2_moe.FAMILY,
    mixtral.FAMILY,
)
# What a family with experts needs beyond what is there, by a part of its architecture's name.
_LACKING = {
    "GptOss": "attention sinks and experts with biases and an activation of their own",
    "Deepseek": "latent attention",
    "Qwen3Next": "linear attention",
    "Llama4": "chunked attention and layers without rotary positions",
    "Jamba": "state-space layers",
    "Dbrx": "experts in one fused tensor",
    "Glm4Moe": "a router with sigmoid scores and biases",
    "Moe": "experts of a kind that no family here has",
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
    lacking = next((what for part, what in _LACKING.items() if part.lower() in names), None)
    reason = f", a mixture of experts with {lacking}, which is not supported" if lacking else ""
    raise UserError(f"config.json: architectures is {architectures}{reason}; supported are: {known}")
