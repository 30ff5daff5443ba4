"""What the pages name exists: links, anchors, files, modules, commands."""

import importlib.util
import re

import pytest

from tests.unit.docs.pages import PAGES, ROOT, Page, read_page
from tgdpo.commands import COMMANDS, CONVERSIONS

OURS = ("megatron_tgdpo", "checkpoints_convert", "tgdpo", "tools", "tests")
TOP = tuple(f"{path.name}/" for path in ROOT.iterdir() if path.is_dir() and not path.name.startswith("."))

pages = pytest.mark.parametrize(
    "page", [read_page(path) for path in PAGES], ids=lambda page: str(page.path.relative_to(ROOT))
)


@pages
def test_links_lead_somewhere(page: Page) -> None:
    broken = []
    for link in page.links:
        if re.match(r"(https?|mailto):", link):
            continue
        name, _, anchor = link.partition("#")
        target = page.path.parent / name if name else page.path
        if not target.exists() or (anchor and anchor not in read_page(target).anchors):
            broken.append(link)
    assert broken == []


@pages
def test_pages_of_the_site_link_within_it(page: Page) -> None:
    docs = ROOT / "docs"
    if docs in page.path.parents:
        relative = [link.partition("#")[0] for link in page.links if not re.match(r"https?:", link)]
        assert [link for link in relative if docs not in (page.path.parent / link).resolve().parents and link] == []


def exists(name: str) -> bool:
    """A path from the repository's root, or, as in docs/design.md, from the package's."""
    return any(any(root.glob(name)) for root in (ROOT, ROOT / "megatron_tgdpo"))


@pages
def test_files_exist(page: Page) -> None:
    words = [word for text in (*page.spans, *page.blocks) for word in re.findall(r"[\w./*-]+", text)]
    ours = {word.rstrip(".") for word in words if word.startswith(TOP) or re.fullmatch(r"[a-z_]+(/\w+)+\.py", word)}
    # Not placeholders (NAME), and not what runs write.
    named = {word for word in ours if not re.search(r"[A-Z]{4}", word) and not word.startswith("docs/images")}
    # A block with a file's name as its title is that file, for the reader to make.
    made = {name for block in page.blocks for name in re.findall(r"```\w+ title=\"([^\":]+)\"", block)}
    assert sorted(word for word in named - made if not exists(word)) == []


@pages
def test_names_beside_a_file_are_in_it(page: Page) -> None:
    missing = []
    for span in page.spans:
        if match := re.fullmatch(r"([\w/]+\.py): (\w+)", span):
            files = [path for root in (ROOT, ROOT / "megatron_tgdpo") for path in root.glob(match[1])]
            if not any(re.search(rf"\b{match[2]}\b", path.read_text()) for path in files):
                missing.append(span)
    assert missing == []


def is_module(name: str) -> bool:
    path = ROOT / name.replace(".", "/")
    return path.with_suffix(".py").is_file() or (path / "__main__.py").is_file()


@pages
def test_modules_can_be_run(page: Page) -> None:
    names = {name for text in (*page.spans, *page.blocks) for name in re.findall(r"-m ([a-z_][\w.]*)", text)}
    ours = {name for name in names if name.partition(".")[0] in OURS}
    assert sorted(name for name in ours if not is_module(name)) == []
    assert sorted(name for name in names - ours if importlib.util.find_spec(name.partition(".")[0]) is None) == []


@pages
def test_commands_exist(page: Page) -> None:
    table = {command.name for command in COMMANDS}
    unknown = []
    for text in (*page.spans, *page.blocks):
        # At the beginning of a line or span, or behind torchrun's -m.
        for command, second in re.findall(r"(?:^|\n|-m )(?:\$ )?tgdpo ([a-z][a-z-]*)(?: ([a-z][a-z-]*))?", text):
            if command not in table:
                unknown.append(command)
            elif command == "convert" and second and second not in {conversion.name for conversion in CONVERSIONS}:
                unknown.append(f"convert {second}")
    assert unknown == []


@pytest.fixture(scope="module")
def options() -> set[str]:
    sources = (path for folder in OURS for path in (ROOT / folder).rglob("*.py"))
    return {
        option
        for path in sources
        for option in re.findall(r"\"(--[a-z][a-z0-9-]+)\"", path.read_text(encoding="utf-8"))
    }


@pages
def test_options_of_our_commands_exist(page: Page, options: set[str]) -> None:
    unknown = []
    for block in page.blocks:
        for line in block.replace("\\\n", " ").splitlines():
            ours = re.search(rf"(?:^|-m )(?:\$ )?(?:tgdpo|{'|'.join(OURS)})\b(.*)", line)
            words = ours[1].partition(" #")[0] if ours else ""
            unknown += [option for option in re.findall(r"(?<!\S)(--[a-z][\w-]*)", words) if option not in options]
    assert unknown == []


@pages
def test_pages_are_text_as_editors_leave_it(page: Page) -> None:
    """What the hooks of .pre-commit-config.yaml would change in the next commit, whoever makes it."""
    text = page.path.read_text(encoding="utf-8")
    assert text == "\n".join(line.rstrip() for line in text.splitlines()).rstrip("\n") + "\n"


def test_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text(encoding="utf-8").split()) < 1500
