"""Every example is a valid config, and the packages say which version they are."""

import re
from pathlib import Path

import pytest
import yaml

import megatron_tgdpo
from megatron_tgdpo.config.loading import load_config
from tests.unit.docs.pages import ROOT

EXAMPLES = sorted((ROOT / "examples").glob("*/*.yaml"))


def test_there_are_three_examples_with_output() -> None:
    folders = {path.parent for path in EXAMPLES}
    assert len(folders) == 3
    for folder in folders:
        assert (folder / "output.txt").read_text().strip()


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_an_example_is_a_valid_config(path: Path) -> None:
    config = load_config(path)
    assert config.loss.method == ("dpo" if path.name == "dpo.yaml" else "tgdpo")
    for source in (config.data.train, config.data.validation):
        if isinstance(source, str):
            assert (ROOT / source).is_file()


def test_citation_has_the_version() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["version"] == megatron_tgdpo.__version__
    assert re.search(
        rf"^## {re.escape(megatron_tgdpo.__version__)}\b", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE
    )


@pytest.mark.parametrize("package", ["megatron_tgdpo", "checkpoints_convert", "tgdpo"])
def test_packages_are_typed(package: str) -> None:
    assert (ROOT / package / "py.typed").is_file()


def test_hosted_tests_run_every_python_that_is_allowed() -> None:
    workflow = yaml.safe_load((ROOT / ".github" / "workflows" / "tests.yml").read_text())
    job = workflow["jobs"]["tests"]
    versions = job["strategy"]["matrix"]["python"]
    setup = (ROOT / "launch" / "setup_env.sh").read_text()
    assert set(versions) == set(
        re.findall(r"python(3\.\d+)", re.search(r"for candidate in \$\{PYTHON:-(.*)\}; do", setup)[1])
    )
    assert any(step.get("run") == "bash tests/run.sh" for step in job["steps"])
