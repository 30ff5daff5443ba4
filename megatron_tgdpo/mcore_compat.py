"""What differs between the versions of megatron-core that this project runs on; nothing else asks for a version.

A difference that shows in the object itself is told by the object, not by a number.
"""

from functools import partial
from importlib.metadata import version
from typing import Any

# Oldest and newest minor version whose tests have passed (docs/compatibility.md).
OLDEST, NEWEST = (0, 16), (0, 19)


def untested_version() -> str | None:
    """One line for the log if megatron-core is newer than what was tested, else None."""
    found = version("megatron-core")
    if _minor(found) <= NEWEST:
        return None
    return (
        f"megatron-core {found} is newer than {_dotted(NEWEST)}, the newest this version was tested with: "
        f"install megatron-core<{_dotted((NEWEST[0], NEWEST[1] + 1))} if anything is amiss"
    )


def submodules_of(spec: Any) -> Any:
    """The submodules of a layer's part: of a ``ModuleSpec``, or, from 0.17 on for the MLP, of a ``partial``."""
    return spec.keywords["submodules"] if isinstance(spec, partial) else spec.submodules


def _minor(found: str) -> tuple[int, int]:
    major, minor = found.split(".")[:2]
    return int(major), int(minor)


def _dotted(minor: tuple[int, int]) -> str:
    return ".".join(map(str, minor))
