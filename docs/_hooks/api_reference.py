"""Makes the API reference: a page for each package, and on it every public module with a docstring."""

import ast
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

PACKAGES = ("megatron_tgdpo", "checkpoints_convert", "tgdpo")
ROOT = Path(__file__).parents[2]


def _modules() -> dict[str, list[str]]:
    """Names of modules by package, nearest package first."""
    found: dict[str, list[str]] = {}
    for package in PACKAGES:
        for path in sorted((ROOT / package).rglob("*.py")):
            if path.name.startswith("_") or not ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))):
                continue
            folder = path.parent.relative_to(ROOT)
            found.setdefault(".".join(folder.parts), []).append(".".join((*folder.parts, path.stem)))
    return dict(sorted(found.items()))


def on_config(config: Any) -> Any:
    """Adds the pages to the navigation."""
    config.nav.append({"API reference": [{package: f"api/{package}.md"} for package in _modules()]})
    return config


def on_files(files: Files, config: Any) -> Files:
    """Adds the pages."""
    for package, modules in _modules().items():
        text = f"# {package}\n\n" + "\n\n".join(f"::: {module}" for module in modules) + "\n"
        files.append(File.generated(config, f"api/{package}.md", content=text))
    return files


def on_page_content(html: str, page: Any, **_: Any) -> str:
    """Takes the roles (``:class:`` and the like) out of docstrings, which are reStructuredText's."""
    return re.sub(r":(?:attr|class|data|func|meth|mod):(?=<code)", "", html) if page.url.startswith("api/") else html
