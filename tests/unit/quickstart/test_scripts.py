"""The launch scripts stop with one clear line where they cannot go on, before they change anything."""

import importlib
import importlib.util
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from megatron_tgdpo.training.export import export_path
from tests.launch import PATIENCE, ROOT
from tgdpo.commands import COMMANDS, CONVERSIONS

LAUNCH = [path for path in (ROOT / "launch").rglob("*") if path.suffix in (".sh", ".sbatch", ".yaml", ".def", "")]
TEXTS = {str(path.relative_to(ROOT)): path.read_text() for path in sorted(LAUNCH) if path.is_file()}
OURS = "megatron_tgdpo|checkpoints_convert|tgdpo|tools"


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


@pytest.mark.parametrize("environment", [False, True])
def test_setup_spares_what_it_has_not_made(tmp_path: Path, environment: bool) -> None:
    if environment:
        (tmp_path / "pyvenv.cfg").touch()
    (tmp_path / "notes.txt").write_text("keep")
    result = run("setup_env.sh", str(tmp_path))
    assert result.returncode == 1
    assert "was not made by this script: move it away or name another directory" in result.stderr
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


@pytest.mark.parametrize("script", TEXTS)
def test_what_a_script_names_is_there(script: str) -> None:
    """Modules that it runs, names that it imports, commands, and files of this project."""
    text = TEXTS[script]
    for module in re.findall(rf"-m ((?:{OURS})[\w.]*)", text):
        assert importlib.util.find_spec(module) is not None, module
    for module, names in re.findall(rf"^ *from ((?:{OURS})[\w.]*) import (.+)$", text, re.M):
        assert not set(re.split(r",\s*", names)) - set(vars(importlib.import_module(module))), module
    conversions = {command.name for command in CONVERSIONS}
    for name, word in re.findall(r"(?:-m|#  ) tgdpo ([a-z][a-z-]+)(?: ([a-z-]+))?", text):
        assert name in {command.name for command in COMMANDS}
        assert name != "convert" or word in conversions
    for file in re.findall(r"(?<![\w/.])(?:tools|launch)/[\w./-]+\.(?:yaml|sh|sbatch)\b", text):
        assert (ROOT / file).is_file(), file


def test_the_quickstart_has_its_configs() -> None:
    text = TEXTS["launch/quickstart.sh"]
    (folder,) = re.findall(r'train "(tools/[\w/]+)/\$name\.yaml"', text)
    names = re.findall(r"^stage .* train (\w+) ", text, re.M)
    assert names == ["dpo", "tgdpo"]
    assert all((ROOT / folder / f"{name}.yaml").is_file() for name in names)


def test_the_quickstart_finds_what_the_pipeline_exports() -> None:
    (pattern,) = re.findall(r'hf=\$\(echo "\$out"/(\S+)\)', TEXTS["launch/quickstart.sh"])
    exported = export_path(Path("run"), Path("run/checkpoints/step_00000012"))
    assert exported.match(pattern)
    assert len(re.findall(r"run/hf\b", TEXTS["launch/quickstart.sh"])) == 1


def test_containers_hold_every_package() -> None:
    for name in ("launch/container/Dockerfile", "launch/container/apptainer.def"):
        for package in ("megatron_tgdpo", "checkpoints_convert", "tgdpo", "tools", "tests", "launch"):
            assert re.search(rf"^(?:COPY|   ) {package} /opt/megatron-tgdpo/{package}$", TEXTS[name], re.M), package


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--model", "m"], "--model and --pairs go together"),
        (["--pairs", "p.json", "--model"], "usage: "),
        (["--steps", "3"], "usage: "),
        (["a", "b"], "usage: "),
        (["--model", "m", "--pairs", "/none/p.json"], "--pairs /none/p.json: no such file"),
    ],
)
def test_quickstart_refuses_what_it_cannot_use(arguments: list[str], said: str) -> None:
    result = run("quickstart.sh", *arguments)
    assert result.returncode == 1
    assert said in result.stderr
    assert len(result.stderr.splitlines()) == 1
