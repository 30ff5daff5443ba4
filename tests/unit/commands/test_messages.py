"""Options and config keys that messages name are there, in the command that says so."""

import argparse
import ast
import contextlib
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from megatron_tgdpo import signals
from megatron_tgdpo.config.schema import Config
from megatron_tgdpo.config.values import _all_keys
from tests.unit.test_layering import MODULES, ROOT, imported
from tgdpo import __main__
from tgdpo.commands import COMMANDS, CONVERSIONS

KEYS = set(_all_keys(Config))
KEYS |= {key.rpartition(".")[0] for key in KEYS if key.count(".") > 1}
SECTIONS = "|".join({key.split(".")[0] for key in KEYS if "." in key})
KEY = re.compile(rf"(?<![\w./-])((?:{SECTIONS})\.[a-z_0-9]+)\b(?!\.?[\w*]*[/(])")
ASSIGNED = re.compile(r"\bset ([a-z][a-z_0-9.]*)=")
# Names of files and tensors that look like keys.
NO_KEYS = re.compile(r"model\.(safetensors|layers|norm|embed_tokens)|optimizer\.(state|fp8)|data\.js")
OPTION = re.compile(r"(?<![\w-])--[a-z][a-z0-9-]*")
# Of other programs, of tgdpo itself, and what a module adds to parsers.
THEIRS = {
    "megatron_tgdpo.resilience.preflight_facts": {"--query-gpu", "--format", "--shm-size", "--ipc"},
    "megatron_tgdpo.resilience.launch": {"--nproc"},
    "tgdpo.commands": {"--version"},
    "megatron_tgdpo.storage.hub": {"--repo-type", "--revision"},
}
ROWS = {
    **{(row.name,): row.module for row in COMMANDS if row.name != "convert"},
    **{("convert", row.name): row.module for row in CONVERSIONS},
}


GRAPH = {name: set(imported(file)) for name, file in MODULES.items() if not name.startswith("megatron_tgdpo")}


class Parsed(BaseException):
    """The options are known; nothing else is to happen."""


@pytest.fixture(scope="module")
def options() -> dict[tuple[str, ...], set[str]]:
    """By command, its options."""
    found: list[set[str]] = []

    def stop(self: argparse.ArgumentParser, *_: Any, **__: Any) -> None:
        found.append({name for action in self._actions for name in action.option_strings})
        raise Parsed

    with pytest.MonkeyPatch.context() as patched:
        for name in ("parse_args", "parse_intermixed_args"):
            patched.setattr(argparse.ArgumentParser, name, stop)
        patched.setattr(signals, "listen", lambda: None)
        patched.setattr(sys, "argv", ["tgdpo"])
        for words in ROWS:
            with contextlib.suppress(Parsed):
                __main__.main([*words])
    assert len(found) == len(ROWS)
    return dict(zip(ROWS, found, strict=True))


def messages(file: Path) -> Iterator[tuple[int, str]]:
    """Texts of a module that are more than a word, with their lines; no docstrings, and no help of options.

    What an f-string computes is ``{}``.
    """
    tree = ast.parse(file.read_text(encoding="utf-8"))
    skipped: set[int] = set()
    for node in ast.walk(tree):
        if id(node) in skipped:
            skipped |= {id(child) for child in ast.iter_child_nodes(node)}
        elif isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            skipped.add(id(node.value))
        elif isinstance(node, ast.Call) and getattr(node.func, "attr", "") == "add_argument":
            skipped |= {id(child) for child in ast.iter_child_nodes(node)}
        elif isinstance(node, ast.JoinedStr):
            skipped |= {id(child) for child in node.values if isinstance(child, ast.Constant)}
            parts = [part.value if isinstance(part, ast.Constant) else "{}" for part in node.values]
            yield node.lineno, "".join(map(str, parts))
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and " " in node.value:
            yield node.lineno, node.value


def reaching(module: str) -> list[tuple[str, ...]]:
    """The commands that import a module of ``tgdpo`` or ``checkpoints_convert``, directly or not."""

    seen, todo = set(), [module]
    while todo:
        name = todo.pop()
        if name not in seen:
            seen.add(name)
            todo += [other for other, names in GRAPH.items() if name in names]
    return [words for words, start in ROWS.items() if start in seen] or list(ROWS)


def wrong_options(module: str, text: str, options: dict[tuple[str, ...], set[str]]) -> set[str]:
    """Options in a message of a module that its reader does not have."""
    named = [words for words in options if f"tgdpo {' '.join(words)} " in f"{text} "]
    found = set(OPTION.findall(text)) - THEIRS.get(module, set())
    if named:
        return found - set.union(*(options[words] for words in named))
    if module == "megatron_tgdpo.train":
        return found - options[("train",)]
    if module.startswith("megatron_tgdpo"):
        # Read in training, which has keys, and in commands that have options.
        known = set.union(*options.values()) if KEY.search(text) else set()
        return found - known
    return found - set.union(*(options[words] for words in reaching(module)))


@pytest.mark.parametrize("module", [module for module in MODULES if not module.startswith("tools")])
def test_messages_name_what_is_there(module: str, options: dict[tuple[str, ...], set[str]]) -> None:
    for line, text in messages(MODULES[module]):
        place = f"{MODULES[module].relative_to(ROOT)}:{line}: {text!r}"
        assert not wrong_options(module, text, options), place
        keys = {key for key in KEY.findall(text) if not NO_KEYS.match(key)}
        assert keys <= KEYS, f"{place}: {keys - KEYS}"
        assert set(ASSIGNED.findall(text)) <= KEYS, place


@pytest.mark.parametrize(
    ("module", "text"),
    [
        ("megatron_tgdpo.data.chat", "give a template (--chat-template)"),
        ("megatron_tgdpo.data.dataset", "tgdpo preprocess --chosen: do it again"),
        ("tgdpo.plan", "--chat-template is not there"),
    ],
)
def test_a_wrong_option_is_found(module: str, text: str, options: dict[tuple[str, ...], set[str]]) -> None:
    assert wrong_options(module, text, options)
