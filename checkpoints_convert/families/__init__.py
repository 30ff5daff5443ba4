"""Model families by HF architecture name; one declarative file each."""

from collections.abc import Sequence

from checkpoints_convert.families import llama
from checkpoints_convert.families.family import Family
from megatron_tgdpo.errors import UserError

_FAMILIES: tuple[Family, ...] = (llama.FAMILY,)


def family_of(architectures: Sequence[str] | None) -> Family:
    """Finds the family by the ``architectures`` of a ``config.json``.

    Raises:
        UserError: The config names no architecture, or one that is not supported.
    """
    for family in _FAMILIES:
        if family.architecture in (architectures or ()):
            return family
    known = ", ".join(family.architecture for family in _FAMILIES)
    raise UserError(f"config.json: architectures is {architectures}, supported are: {known}")
