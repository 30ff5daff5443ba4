"""The models that are compared, by name."""

from collections.abc import Sequence
from pathlib import Path

from megatron_tgdpo.errors import UserError

REFERENCE, GUIDE = "reference", "guide"


def named_models(reference: Path, models: Sequence[tuple[str, Path]], guide: Path | None) -> dict[str, Path]:
    """The models' directories by name, the reference first.

    Raises:
        UserError: Two have one name, or there is only the reference.
    """
    found = {REFERENCE: reference}
    for name, path in [*models, *([(GUIDE, guide)] if guide else [])]:
        if name in found:
            raise UserError(f"--model {name}={path}: the name {name} is taken")
        found[name] = path
    if len(found) == 1:
        raise UserError("nothing to compare with the reference: give --model NAME=MODEL or --guide MODEL")
    return found
