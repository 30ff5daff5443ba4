"""The pages that users read, and what is in them."""

import re
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[3]
PAGES = sorted(
    [
        *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "launch/README.md")),
        *(ROOT / "docs").rglob("*.md"),
        *(ROOT / "examples").rglob("*.md"),
    ]
)
_FENCE = re.compile(r"^( *)```.*?^\1```$", re.MULTILINE | re.DOTALL)
_SPAN = re.compile(r"`([^`\n]+)`")
_LINK = re.compile(r"(?<!\\)\]\(([^)\s]+)\)|\b(?:src|srcset|href)=\"([^\"]+)\"")
_HEADING = re.compile(r"^#+ +(.+?)\s*$", re.MULTILINE)


@dataclass(frozen=True)
class Page:
    """A page's parts.

    Attributes:
        path: The file.
        blocks: Text of its code blocks.
        spans: Text of its inline code.
        links: Targets of its links and images.
        anchors: Names of its headings, as GitHub and mkdocs make them.
    """

    path: Path
    blocks: tuple[str, ...]
    spans: tuple[str, ...]
    links: tuple[str, ...]
    anchors: frozenset[str]


def read_page(path: Path) -> Page:
    """Reads a Markdown file."""
    text = path.read_text(encoding="utf-8")
    prose = _FENCE.sub("", text)
    links = [markdown or html for markdown, html in _LINK.findall(_SPAN.sub("", prose))]
    anchors = frozenset(_anchor(heading) for heading in _HEADING.findall(prose))
    return Page(
        path, tuple(match[0] for match in _FENCE.finditer(text)), tuple(_SPAN.findall(prose)), tuple(links), anchors
    )


def _anchor(heading: str) -> str:
    plain = re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", heading).replace("`", "")
    return re.sub(r"[^\w\- ]", "", plain.lower()).strip().replace(" ", "-")
