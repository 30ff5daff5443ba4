"""The container's pins are what this project and megatron-core ask for, and both recipes make the same image."""

import re
from importlib.metadata import requires
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from launch.container.check_image import TRANSFORMER_ENGINE, problems
from megatron_tgdpo.gpu.capabilities import parse_version, supported_engine

ROOT = Path(__file__).parents[2]
CONTAINER = ROOT / "launch" / "container"
# The base image's own, in versions that must not be replaced.
OF_THE_IMAGE = {"torch", "triton"}


def pins() -> dict[str, str]:
    found = {}
    for line in (CONTAINER / "requirements.txt").read_text().splitlines():
        if line and not line.startswith("#"):
            name, version = line.split("==")
            found[canonicalize_name(name)] = version
    return found


def wanted() -> list[Requirement]:
    """Of pyproject.toml (Python 3.10 has no TOML reader) and of megatron-core, without extras."""
    text = (ROOT / "pyproject.toml").read_text()
    block = re.search(r"^dependencies = \[\n(.*?)^\]", text, re.S | re.M)
    assert block is not None
    ours = [Requirement(line) for line in re.findall(r'^\s*"([^"]+)"', block[1], re.M)]
    theirs = [Requirement(text) for text in requires("megatron-core") or []]
    return ours + [r for r in theirs if r.marker is None or r.marker.evaluate({"extra": ""})]


@pytest.mark.parametrize("requirement", wanted(), ids=str)
def test_every_requirement_is_pinned_to_a_version_it_takes(requirement: Requirement) -> None:
    name = canonicalize_name(requirement.name)
    if name in OF_THE_IMAGE:
        assert name not in pins()
        return
    assert requirement.specifier.contains(pins()[name]), f"{requirement}: {pins()[name]}"


def test_nothing_else_is_pinned() -> None:
    assert pins().keys() == {canonicalize_name(r.name) for r in wanted()} - OF_THE_IMAGE


def test_transformer_engine_is_no_older_than_what_is_used() -> None:
    extra = re.search(r'"(transformer-engine[^"]*)"', (ROOT / "pyproject.toml").read_text())
    assert extra is not None
    for version, accepted in (("2.8.0", False), ("2.9.0", True), ("2.11.0", True)):
        assert Requirement(TRANSFORMER_ENGINE).specifier.contains(version) is accepted
        assert Requirement(extra[1]).specifier.contains(version) is accepted
        assert supported_engine(parse_version(version)) is accepted


def test_both_recipes_start_from_the_same_image_and_are_checked() -> None:
    docker, apptainer = ((CONTAINER / name).read_text() for name in ("Dockerfile", "apptainer.def"))
    image = re.search(r"^FROM (nvcr\.io/nvidia/pytorch:\d\d\.\d\d-py3)$", docker, re.M)
    assert image is not None
    assert f"From: {image[1]}\n" in apptainer
    for text in (docker, apptainer):
        assert "-r" in text
        assert "launch/container/requirements.txt" in text
        assert "python launch/container/check_image.py" in text


def test_what_the_image_check_says_here() -> None:
    found = problems()
    assert all(": not installed" in line or " is installed" in line for line in found)
    # This environment has everything but, on a CPU, Transformer Engine.
    assert [line for line in found if not line.startswith("transformer-engine")] == []
