"""The page in a real browser: it loads cleanly, shows the right numbers, sorts, and draws only what is seen."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.browser import CHROMIUM, NO_CHROMIUM, Page, chromium
from tests.unit.reporting.example import ALPHA, BETA, MARKUP, PLACE, make_pairs, metrics_of, render
from tgdpo.reporting.render import ReportPair, render_page

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason=NO_CHROMIUM)
PAIRS = 200
TOKENS = 300
ARTICLE = f"[aria-label='pair {PLACE.format(1)}']"
FIRST = f"{ARTICLE} .chosen .token"
GUIDES = ("guide 1", "guide 2")


@pytest.fixture(scope="module")
def pairs() -> list[ReportPair]:
    return make_pairs(PAIRS, TOKENS)


@pytest.fixture(scope="module")
def page(pairs: list[ReportPair], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Page]:
    directory = tmp_path_factory.mktemp("chromium")
    (directory / "report.html").write_text(render(pairs), encoding="utf-8")
    with chromium(directory / "profile") as page:
        page.colour_scheme("light")
        page.open((directory / "report.html").as_uri())
        yield page


@pytest.fixture
def small(tmp_path: Path) -> Iterator[Page]:
    """Two guides whose rewards are thousandths."""
    (tmp_path / "report.html").write_text(render(make_pairs(24, 30, GUIDES, size=0.004), GUIDES), encoding="utf-8")
    with chromium(tmp_path / "profile") as page:
        page.colour_scheme("light")
        page.open((tmp_path / "report.html").as_uri())
        yield page


def set_control(page: Page, name: str, value: Any) -> None:
    page.evaluate(
        f"(() => {{ const node = document.getElementById('{name}'); node.value = {json.dumps(value)};"
        f"node.dispatchEvent(new Event('{'change' if name == 'sort' else 'input'}')); }})()"
    )


def show_first(page: Page) -> None:
    """Brings the first pair of the data onto the screen."""
    set_control(page, "sort", "dataset")
    page.evaluate("document.getElementById('pairs').scrollIntoView()")
    page.wait_for(f"document.querySelector({json.dumps(FIRST)})")


def tip(page: Page) -> dict[str, str]:
    return page.evaluate(
        "Object.fromEntries([...document.querySelectorAll('#tip:not([hidden]) > div')]"
        ".map((row) => [...row.children].map((cell) => cell.textContent)))"
    )


def shown_pairs(page: Page) -> list[int]:
    return page.evaluate("[...document.querySelectorAll('article:not([hidden])')].map((node) => node.pair.order)")


def test_loads_without_problems_and_draws_little(page: Page) -> None:
    timing = page.evaluate("performance.getEntriesByType('navigation')[0].loadEventEnd")
    print(f"{PAIRS} pairs of {TOKENS} and 6 tokens: loaded after {timing:.0f} ms")
    page.wait_for("document.querySelector('.token')")
    assert page.problems == []
    assert page.evaluate("document.querySelectorAll('#pairs .token').length") < PAIRS * TOKENS / 4
    assert page.evaluate("document.querySelectorAll('article').length") == PAIRS


def test_summary_is_pythons_at_any_alpha_and_beta(page: Page, pairs: list[ReportPair]) -> None:
    metrics = metrics_of(pairs)
    for alpha, beta in ((ALPHA, BETA), (7.5, 0.1)):
        set_control(page, "alpha", alpha)
        set_control(page, "beta", beta)
        text = page.evaluate("document.getElementById('tiles').innerText")
        assert f"{metrics.accuracy:.1%}".replace("%", " %") in text
        assert f"{metrics.negative_fraction(alpha, beta):.2%}".replace("%", " %") in text
        assert f"{beta * metrics.margins.mean():+.3f}".replace("-", "\u2212") in text
        assert f"at most 1 %\t{metrics.alpha_limit(0.01, beta):.2f}" in text
    set_control(page, "alpha", ALPHA)
    set_control(page, "beta", BETA)


def test_hover_and_keyboard_show_the_metrics(page: Page) -> None:
    show_first(page)
    page.hover(FIRST)
    page.wait_for("!document.getElementById('tip').hidden")
    # x = 0.5: reward 0.5 * 0.5, weight 1 + 2 * 0.25.
    shown = tip(page)
    assert (shown["token"], shown["position"]) == (json.dumps(MARKUP[0]), "1 of 4, chosen")
    assert (shown["reward"], shown["weight"]) == ("+0.2500", "1.5000")
    assert (shown["log \u03c0 guide"], shown["log \u03c0 reference"]) == ("\u22121.5000", "\u22122.0000")
    page.evaluate(f"document.querySelector({json.dumps(FIRST)}).focus()")
    page.press("ArrowRight")
    shown = tip(page)
    # x = -0.25: reward 0.5 * -0.25, weight 1 - 2 * 0.125.
    assert (shown["reward"], shown["weight"]) == ("\u22120.1250", "0.7500")
    page.press("Escape")
    assert tip(page) == {}
    # On a rejected token the sign turns: x = -3, so the weight is 1 + 2 * 1.5.
    page.hover(f"{ARTICLE} .rejected .token")
    page.wait_for("!document.getElementById('tip').hidden")
    assert (tip(page)["reward"], tip(page)["weight"]) == ("\u22121.5000", "4.0000")


def test_markup_is_text(page: Page) -> None:
    show_first(page)
    texts = page.evaluate(f"[...document.querySelectorAll({json.dumps(FIRST)})].map((node) => node.textContent)")
    assert texts == MARKUP
    assert page.evaluate("typeof window.pwned") == "undefined"


def test_sorts_and_filters(page: Page, pairs: list[ReportPair]) -> None:
    margins = metrics_of(pairs).margins
    against = sorted(range(PAIRS), key=lambda k: margins[k])
    set_control(page, "sort", "disagreement")
    assert shown_pairs(page) == against
    set_control(page, "sort", "agreement")
    assert shown_pairs(page) == against[::-1]
    page.evaluate("document.getElementById('only').click()")
    assert shown_pairs(page) == [k for k in against[::-1] if margins[k] <= 0]
    page.evaluate("document.getElementById('only').click()")
    set_control(page, "sort", "dataset")
    assert shown_pairs(page) == list(range(PAIRS))


def test_searches(page: Page, pairs: list[ReportPair]) -> None:
    set_control(page, "sort", "dataset")
    # In a response across tokens, in any case; in what a record is called; in a prompt.
    set_control(page, "search", "</SCRIPT><script>window.pwned = 1")
    assert shown_pairs(page) == [0]
    set_control(page, "search", PLACE.format(2 * PAIRS - 1))
    assert shown_pairs(page) == [PAIRS - 1]
    assert page.evaluate("document.getElementById('count').textContent") == f"1 of {PAIRS} pairs \u2193"
    set_control(page, "search", "why <u>so")
    assert len(shown_pairs(page)) == PAIRS
    set_control(page, "search", "nowhere at all")
    assert shown_pairs(page) == []
    set_control(page, "search", "")
    assert len(shown_pairs(page)) == PAIRS


# In each picture: texts that are equal, outside it, or over another.
BAD_LABELS = """[...document.querySelectorAll('figure svg')].flatMap((picture) => {
  const frame = picture.getBoundingClientRect();
  const boxes = [...picture.querySelectorAll('text')].map((text) => [text, text.getBoundingClientRect()]);
  const bad = boxes.filter(([, a]) => a.left < frame.left - 1 || a.right > frame.right + 1 || a.height < 11);
  for (const [x, a] of boxes) for (const [y, b] of boxes)
    if (x !== y && (x.getAttribute('text-anchor') === y.getAttribute('text-anchor') && x.textContent === y.textContent
      || a.left < b.right && b.left < a.right && a.top < b.bottom - 4 && b.top < a.bottom - 4)) bad.push([x]);
  return bad.map(([text]) => picture.getAttribute('aria-label') + ': ' + text.textContent);
})"""


@pytest.mark.parametrize("width", [1440, 420])
def test_small_numbers_stay_apart_and_charts_fit(small: Page, width: int) -> None:
    small.resize(width, 900)
    # Until all is drawn again: a picture of another width would be scaled down.
    small.wait_for(
        f"innerWidth === {width} && [...document.querySelectorAll('figure svg')].every((picture) =>"
        "Math.abs(picture.getBoundingClientRect().width - picture.getAttribute('width')) < 1)"
    )
    assert small.evaluate("document.querySelectorAll('figure svg').length") == 2 * 6
    assert small.evaluate(BAD_LABELS) == []
    assert small.evaluate("document.documentElement.scrollWidth <= document.documentElement.clientWidth")
    legend = small.evaluate(
        "[...document.querySelectorAll('#legend > span:first-child .token')].map((n) => n.textContent)"
    )
    assert len(set(legend)) == 5
    weights = small.evaluate(
        "[...document.querySelectorAll('.tile')].filter((n) => n.innerText.includes('deviation'))"
        ".map((n) => n.innerText.match(/\\d+\\.\\d+/g))"
    )
    assert [len(set(numbers)) for numbers in weights] == [4, 4]
    assert small.problems == []


def test_two_guides_side_by_side(small: Page) -> None:
    tiles = small.evaluate("[...document.querySelectorAll('.guide')].map((node) => node.innerText)")
    pairs = make_pairs(24, 30, GUIDES, size=0.004)
    for guide, text in zip(GUIDES, tiles, strict=True):
        metrics = metrics_of(pairs, guide)
        low, high = metrics.interval
        assert f"<em>{guide}'s model</em>" in text
        assert f"{metrics.correct} of 24 pairs; 95 % interval {100 * low:.1f} % to {100 * high:.1f} %" in text
    # The second guide's x is -1/2 of the first's: in the other order, and each pair has both weightings.
    set_control(small, "sort", "disagreement")
    first = shown_pairs(small)
    small.evaluate(
        "(() => { const node = document.getElementById('guide'); node.value = 1;"
        "node.dispatchEvent(new Event('change')); })()"
    )
    assert shown_pairs(small) == first[::-1]
    show_first(small)
    places = small.evaluate(
        f"[...document.querySelectorAll({json.dumps(ARTICLE + ' .responses')})]"
        ".map((node) => node.getBoundingClientRect().top)"
    )
    assert len(places) == 2
    assert places[0] < places[1]
    small.hover(FIRST)
    small.wait_for("!document.getElementById('tip').hidden")
    shown = tip(small)
    assert (shown["reward, guide 1"], shown["reward, guide 2"]) == ("+0.0010", "\u22120.0005")
    assert (shown["weight, guide 1"], shown["weight, guide 2"]) == ("1.0020", "0.9990")


def test_selected_tokens_and_a_beta_of_the_guide(tmp_path: Path) -> None:
    pairs = make_pairs(4, 30)
    weights = [(np.arange(sum(map(len, pair.texts))) % 2).astype(np.float32) for pair in pairs]
    shown = render_page(
        pairs, {"guide": metrics_of(pairs)}, alpha=0.0, beta=0.5, guide_beta=2.0, facts={"guide": "g"},
        weights={"guide": weights},
    )  # fmt: skip
    (tmp_path / "report.html").write_text(shown, encoding="utf-8")
    with chromium(tmp_path / "profile") as page:
        page.open((tmp_path / "report.html").as_uri())
        count, tokens = sum(int(one.sum()) for one in weights), sum(map(len, weights))
        tiles = page.evaluate("document.getElementById('tiles').innerText")
        assert f"{count} of {tokens} tokens count" in tiles
        assert "Negative" not in tiles
        assert page.evaluate("document.getElementById('alpha').parentElement.hidden")
        assert page.evaluate("document.querySelectorAll('figure svg').length") == 4
        show_first(page)
        page.hover(FIRST)
        page.wait_for("!document.getElementById('tip').hidden")
        # x = 0.5, with the guide's own beta; the first of the weights.
        assert (tip(page)["reward"], tip(page)["weight"]) == ("+1.0000", "0.0000")
        assert page.problems == []


def test_light_and_dark(page: Page, tmp_path: Path) -> None:
    def paper() -> str:
        return page.evaluate("getComputedStyle(document.body).backgroundColor")

    light = paper()
    page.screenshot(tmp_path / "light.png")
    page.colour_scheme("dark")
    page.wait_for(f"getComputedStyle(document.body).backgroundColor !== {json.dumps(light)}")
    dark = paper()
    page.screenshot(tmp_path / "dark.png")
    assert light != dark
    assert (tmp_path / "light.png").read_bytes() != (tmp_path / "dark.png").read_bytes()
    page.evaluate("document.getElementById('theme').click()")  # from the system's to light
    assert paper() == light
    assert page.problems == []
