"""Checks that an image holds what this project and megatron-core ask for; stops its build otherwise.

Every distribution that pyproject.toml or megatron-core requires must be installed in a version that both take, and
Transformer Engine in one that is not too old. Needs no GPU: nothing is imported.
"""

import sys
from importlib.metadata import PackageNotFoundError, requires, version

from packaging.requirements import Requirement

# pyproject.toml and megatron-core name it in an extra only.
TRANSFORMER_ENGINE = "transformer-engine>=2.9.0a0"


def problems() -> list[str]:
    """What is missing or of another version."""
    wanted = [TRANSFORMER_ENGINE, *(requires("megatron-tgdpo") or []), *(requires("megatron-core") or [])]
    found = []
    for text in wanted:
        requirement = Requirement(text)
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
            continue
        try:
            installed = version(requirement.name)
        except PackageNotFoundError:
            found.append(f"{requirement}: not installed")
            continue
        # An image's torch is a pre-release of its version.
        if not requirement.specifier.contains(installed, prereleases=True):
            found.append(f"{requirement}: {installed} is installed")
    return found


if __name__ == "__main__":
    for problem in problems():
        print(problem, file=sys.stderr)
    sys.exit(1 if problems() else 0)
