"""What is in the HTML file: the data as it is, and no markup but the page's own."""

import base64
import json
from html.parser import HTMLParser

import numpy as np

from tests.unit.reporting.example import MARKUP, make_pairs, render


class Elements(HTMLParser):
    """Collects tags and the JSON block."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.links: list[str] = []
        self.json = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.links += [value or "" for name, value in attrs if name in ("src", "href")]

    def handle_data(self, data: str) -> None:
        if self.tags[-1:] == ["script"] and not self.json:
            self.json = data


def test_markup_in_the_data_stays_text() -> None:
    pairs = make_pairs(2, 3)
    html = render(pairs)
    found = Elements(html)
    assert found.tags.count("script") == 2  # the data and the page's own
    assert not {"img", "i", "u", "em", "s"} & set(found.tags)
    assert found.tags.count("b") == 1  # the page's word before its warning
    assert found.links == ["#pairs"]  # nothing is loaded from anywhere
    data = json.loads(found.json)
    assert data["pairs"][0]["texts"][0] == MARKUP
    assert data["pairs"][0]["source"] == "<i>pairs</i>.jsonl:1"
    assert "&lt;em&gt;guide&#39;s model&lt;/em&gt;" in html
    assert "&lt;s&gt;careful&lt;/s&gt;" in html
    assert "&lt;u&gt;perhaps&lt;/u&gt;" in html


def test_log_probs_are_carried_exactly() -> None:
    guides = ("guide 1", "guide 2")
    pairs = make_pairs(3, 4, guides)
    data = json.loads(Elements(render(pairs, guides)).json)
    assert [guide["name"] for guide in data["guides"]] == list(guides)
    for model in ("reference", *guides):
        carried = np.frombuffer(base64.b64decode(data["logps"][model]), dtype="<f4")
        assert np.array_equal(carried, np.concatenate([pair.logps[model] for pair in pairs]))
