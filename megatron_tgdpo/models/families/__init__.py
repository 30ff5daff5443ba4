"""Model families by HF architecture name; one declarative file each."""

from collections.abc import Sequence

from megatron_tgdpo.errors import UserError
from megatron_tgdpo.models.families import gemma2, llama, mistral, qwen2, qwen3
from megatron_tgdpo.models.families.family import Family

FAMILIES: tuple[Family, ...] = (llama.FAMILY, gemma2.FAMILY, qwen2.FAMILY, qwen3.FAMILY, mistral.FAMILY)
_EXPERTS = ("Moe", "Mixtral", "DeepseekV2", "DeepseekV3", "Dbrx", "Jamba", "GptOss", "Llama4")


def family_of(architectures: Sequence[str] | None) -> Family:
    """Finds the family by the ``architectures`` of a ``config.json``.

    Raises:
        UserError: The config names no architecture, or one that is not supported.
    """
    for family in FAMILIES:
        if family.architecture in (architectures or ()):
            return family
    known = ", ".join(family.architecture for family in FAMILIES)
    experts = any(part in name for name in architectures or () for part in _EXPERTS)
    reason = ", a mixture of experts, which is not supported" if experts else ""
    raise UserError(f"config.json: architectures is {architectures}{reason}; supported are: {known}")
