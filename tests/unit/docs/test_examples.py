"""Every example is a valid config, and the packages say which version they are."""

import os
import re
import subprocess
import sys
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
        re.findall(r"python(3\.\d+)", re.search(r"^candidates=\((.*)\)", setup, re.MULTILINE)[1])
    )
    assert any(step.get("run") == "bash tests/run.sh" for step in job["steps"])


def test_hosted_tests_leave_one_python(tmp_path: Path) -> None:
    """The step that hides the others from launch/setup_env.sh, run as the runner does."""
    workflow = yaml.safe_load((ROOT / ".github" / "workflows" / "tests.yml").read_text())
    (step,) = [step for step in workflow["jobs"]["tests"]["steps"] if "GITHUB_PATH" in step.get("run", "")]
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    # What actions/setup-python puts on the path.
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "python").symlink_to(sys.executable)
    runner = {"PATH": f"{tmp_path}/bin:{os.environ['PATH']}", "RUNNER_TEMP": str(tmp_path)}
    script = step["run"].replace("${{ matrix.python }}", version)
    subprocess.run(["bash", "-e", "-c", script], env={**runner, "GITHUB_PATH": f"{tmp_path}/path"}, check=True)
    hidden = (tmp_path / "path").read_text().strip()
    runs = {
        name: subprocess.run(
            [f"{hidden}/python{name}", "-c", "import sys; print(sys.version)"], capture_output=True
        ).stdout
        for name in workflow["jobs"]["tests"]["strategy"]["matrix"]["python"]
    }
    assert {name for name, printed in runs.items() if printed} == {version}
    assert runs[version].decode().startswith(version)
