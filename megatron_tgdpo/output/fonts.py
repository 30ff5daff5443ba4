"""Text of pictures in fonts that have its characters, whatever the script of the names in it."""

import functools
import unicodedata
from typing import Any

# Draws a box for any character.
_LAST_RESORT = "Last Resort High-Efficiency"


def make_legible(figure: Any) -> None:
    """Has the text of a matplotlib figure drawn in the installed fonts that it takes; what none has is escaped."""
    from matplotlib.font_manager import FontProperties
    from matplotlib.text import Text

    texts = [text for text in figure.findobj(Text) if _lacking(text.get_text())]
    for text in texts:
        text.set_text(escaped(text.get_text()))
    left = set().union(*(_lacking(text.get_text()) for text in texts))
    families = [FontProperties().get_name()]
    while left:
        # As few as have all of it: a word in two fonts looks torn.
        family, has = max(_fonts(), key=lambda font: len(left & font[1]))
        families.append(family)
        left -= has
    for text in texts:
        text.set_fontfamily(families)


def escaped(text: str) -> str:
    """The text with every character that no installed font has as Python writes its code, such as ``\\u6a21``."""
    lacking = _lacking(text)
    none = lacking.difference(*(has for _, has in _fonts())) if lacking else lacking
    return "".join(c.encode("unicode_escape").decode("ascii") if ord(c) in none else c for c in text)


def columns(text: str) -> int:
    """How many Latin letters it is about as wide as."""
    return sum(2 if unicodedata.east_asian_width(c) in "WF" else 1 for c in escaped(text))


def _lacking(text: str) -> set[int]:
    """Characters of a text that the default font has not."""
    from matplotlib.font_manager import FontProperties, findfont

    return set(map(ord, text)) - _characters(findfont(FontProperties())) - {ord("\n")}


def _fonts() -> list[tuple[str, frozenset[int]]]:
    """Installed families by name, with the characters that each has."""
    from matplotlib.font_manager import fontManager

    regular = sorted(
        fontManager.ttflist, key=lambda font: (font.style != "normal", str(font.weight) not in ("400", "normal"))
    )
    files = {font.name: font.fname for font in reversed(regular)}
    return [(name, _characters(file)) for name, file in sorted(files.items()) if name != _LAST_RESORT]


@functools.cache
def _characters(file: str) -> frozenset[int]:
    from matplotlib.ft2font import FT2Font

    try:
        return frozenset(FT2Font(file).get_charmap())
    except (OSError, RuntimeError):  # gone, or no font
        return frozenset()
