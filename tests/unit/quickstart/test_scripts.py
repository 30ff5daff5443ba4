"""The launch scripts stop with one clear line where they cannot go on, before they change anything."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.launch import PATIENCE, ROOT


def run(script: str, *arguments: str, path: str | None = None) -> subprocess.CompletedProcess[str]:
    bash = shutil.which("bash")
    assert bash is not None
    environment = {**os.environ, "PATH": path or os.environ["PATH"]}
    command = [bash, str(ROOT / "launch" / script), *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=PATIENCE, check=False)


@pytest.fixture
def path_without_python(tmp_path: Path) -> str:
    programs = tmp_path / "programs"
    programs.mkdir()
    for name in ("dirname", "grep", "cat"):
        found = shutil.which(name)
        assert found is not None
        (programs / name).symlink_to(found)
    # A launcher that is there and does not run anything, as version managers leave them.
    (programs / "python3.12").write_text("#!/bin/sh\nexit 127\n")
    (programs / "python3.12").chmod(0o755)
    return str(programs)


def test_setup_needs_a_python(path_without_python: str, tmp_path: Path) -> None:
    result = run("setup_env.sh", str(tmp_path / "venv"), path=path_without_python)
    assert result.returncode == 1
    assert result.stderr.splitlines() == [
        "setup_env.sh: no Python 3.10 to 3.13 with the venv module found: install one (Debian: python3.11-venv)"
    ]
    assert not (tmp_path / "venv").exists()


def test_setup_spares_what_is_not_an_environment(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("keep")
    result = run("setup_env.sh", str(tmp_path))
    assert result.returncode == 1
    assert "is not a virtual environment: move it away or name another directory" in result.stderr
    assert (tmp_path / "notes.txt").read_text() == "keep"


def test_setup_checks_its_arguments() -> None:
    result = run("setup_env.sh")
    assert result.returncode == 1
    assert result.stderr.startswith("setup_env.sh: usage: bash launch/setup_env.sh VENV_DIR [EXTRAS]")


def test_quickstart_spares_an_older_run(tmp_path: Path) -> None:
    (tmp_path / "results.json").write_text("{}")
    result = run("quickstart.sh", str(tmp_path))
    assert result.returncode == 1
    expected = f"quickstart.sh: {tmp_path} is not empty: remove it or name another directory\n"
    assert result.stderr == expected
    assert (tmp_path / "results.json").read_text() == "{}"
