"""Which folder may import which: the table is the architecture, and it has no circle."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.launch import ROOT, environment

# A folder of megatron_tgdpo, a module of it that stands alone, or another package; and what each may import of the
# project. Nothing imports what stands below it.
TABLE = """
errors
signals
intervals
mcore_compat
console
loss
distributed     errors signals
storage         errors distributed
data            errors signals console storage
checkpoints     errors distributed storage
batching        errors data
config          errors loss storage data
models          errors mcore_compat loss distributed storage checkpoints batching
planning        errors loss distributed config models
output          errors loss storage checkpoints config models
frozen          loss distributed batching config models planning
gpu             errors distributed config models planning
setup           errors signals console distributed storage data checkpoints batching config models planning output \
                frozen gpu
resilience      errors signals mcore_compat console distributed storage checkpoints config models output setup
guidance        errors intervals console loss distributed storage data checkpoints batching config models output \
                frozen gpu setup resilience
training        errors signals console loss distributed storage data checkpoints batching config models planning \
                output frozen gpu setup resilience guidance
train           errors signals distributed config setup resilience training
checkpoints_convert     megatron_tgdpo
tgdpo                   megatron_tgdpo checkpoints_convert
tools                   megatron_tgdpo checkpoints_convert tgdpo
"""
PACKAGES = ("megatron_tgdpo", "checkpoints_convert", "tgdpo", "tools")


def modules() -> dict[str, Path]:
    """Every module of the project by its dotted name."""
    found = {}
    for package in PACKAGES:
        for file in sorted((ROOT / package).rglob("*.py")):
            parts = file.relative_to(ROOT).with_suffix("").parts
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = file
    return found


MODULES = modules()
LAYERS = {
    name: set(allowed) for name, *allowed in (line.split() for line in TABLE.replace("\\\n", " ").strip().splitlines())
}


def imported(file: Path) -> Iterator[str]:
    """The project's modules that a file imports anywhere, inside functions and for the type checker too."""
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in MODULES)
        elif isinstance(node, ast.ImportFrom) and node.module:
            assert node.level == 0, f"{file}:{node.lineno}: relative import"
            for alias in node.names:
                name = f"{node.module}.{alias.name}"
                if name in MODULES or node.module in MODULES:
                    yield name if name in MODULES else node.module
                else:
                    ours = node.module.split(".")[0] in PACKAGES
                    assert not ours, f"{file}:{node.lineno}: there is no module {node.module}"


def layer_of(module: str) -> str:
    """The row of the table that a module belongs to; empty for the library's own ``__init__``."""
    package, *names = module.split(".")
    return package if package != "megatron_tgdpo" else names[0] if names else ""


def test_the_table_has_every_folder_and_no_circle() -> None:
    above = {"megatron_tgdpo"}
    for layer, allowed in LAYERS.items():
        assert allowed <= above, f"{layer} may import what stands below it: {allowed - above}"
        above.add(layer)
    assert {layer_of(module) for module in MODULES} - {""} == set(LAYERS)


@pytest.mark.parametrize("module", MODULES)
def test_imports_are_those_of_the_table(module: str) -> None:
    layer = layer_of(module)
    allowed = LAYERS.get(layer, set())
    for other in imported(MODULES[module]):
        assert layer_of(other) in {layer, *allowed} or other.split(".")[0] in allowed, (
            f"{module} imports {other}, which the table above does not allow"
        )


def test_no_module_imports_itself_by_others() -> None:
    graph = {module: set(imported(file)) - {module} for module, file in MODULES.items()}
    while free := [module for module, names in graph.items() if not names & graph.keys()]:
        for module in free:
            del graph[module]
    assert not graph, f"these import each other in circles: {sorted(graph)}"


def test_the_library_stands_alone() -> None:
    """Every module of megatron_tgdpo can be imported where the packages that are built on it are absent."""
    code = f"""
import importlib, sys
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("checkpoints_convert", "tgdpo", "tools"):
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Absent())
for name in {[name for name in MODULES if name.startswith("megatron_tgdpo")]!r}:
    importlib.import_module(name)
print("all")
"""
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment(), cwd=ROOT, capture_output=True, text=True, timeout=600
    )
    assert done.stdout.strip() == "all", done.stderr


@pytest.mark.parametrize(
    "module",
    [
        "megatron_tgdpo.config.resume_compatibility",
        "megatron_tgdpo.data.encode",
        "megatron_tgdpo.setup.trained_guide",
        "tgdpo.__main__",
    ],
)
def test_what_starts_often_is_without_torch(module: str) -> None:
    """A config is read and checked, and a record encoded in a worker, without the seconds that torch's import takes."""
    heavy = ("torch", "megatron.core", "transformers")
    code = f"import {module}, sys; print([name for name in {heavy} if name in sys.modules])"
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment(), cwd=ROOT, capture_output=True, text=True, timeout=600
    )
    assert done.stdout.strip() == "[]", done.stderr


def test_a_plan_is_made_without_megatron_core() -> None:
    """Its import takes as long as those of torch and transformers together, and a plan needs sizes only."""
    code = "import tgdpo.planning, sys; print([name for name in sys.modules if name.startswith('megatron.')])"
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment(), cwd=ROOT, capture_output=True, text=True, timeout=600
    )
    assert done.stdout.strip() == "[]", done.stderr


def test_ranks_start_without_what_few_of_them_use() -> None:
    """nltk imports scipy, a second's work; only those who split sentences need it."""
    modules = ("megatron_tgdpo.training.run", "megatron_tgdpo.guidance.precompute", "tgdpo.reporting.build")
    code = f"import {', '.join(modules)}, sys; print([name for name in ('nltk', 'scipy') if name in sys.modules])"
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment(), cwd=ROOT, capture_output=True, text=True, timeout=600
    )
    assert done.stdout.strip().splitlines()[-1] == "[]", done.stderr
