"""The page in a real browser: it loads cleanly, shows the right numbers, sorts, and draws only what is seen."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.browser import CHROMIUM, NO_CHROMIUM, Page, chromium
from tests.unit.reporting.example import ALPHA, BETA, MARKUP, make_pairs, metrics_of, render
from tgdpo.reporting.render import ReportPair

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason=NO_CHROMIUM)
PAIRS = 200
TOKENS = 300
FIRST = "[aria-label='pair 0'] .chosen .token"


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


def set_control(page: Page, name: str, value: Any) -> None:
    page.evaluate(
        f"(() => {{ const node = document.getElementById('{name}'); node.value = {json.dumps(value)};"
        f"node.dispatchEvent(new Event('{'change' if name == 'sort' else 'input'}')); }})()"
    )


def tip(page: Page) -> dict[str, str]:
    return page.evaluate(
        "Object.fromEntries([...document.querySelectorAll('#tip:not([hidden]) > div')]"
        ".map((row) => [...row.children].map((cell) => cell.textContent)))"
    )


def shown_pairs(page: Page) -> list[int]:
    return page.evaluate("[...document.querySelectorAll('article:not([hidden])')].map((node) => node.pair.index)")


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
        assert f"{metrics.alpha_limit(0.01, beta):.3g}" in text
    set_control(page, "alpha", ALPHA)
    set_control(page, "beta", BETA)


def test_hover_and_keyboard_show_the_metrics(page: Page) -> None:
    set_control(page, "sort", "dataset")
    page.wait_for(f"document.querySelector({json.dumps(FIRST)})")
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
    page.hover("[aria-label='pair 0'] .rejected .token")
    page.wait_for("!document.getElementById('tip').hidden")
    assert (tip(page)["reward"], tip(page)["weight"]) == ("\u22121.5000", "4.0000")


def test_markup_is_text(page: Page) -> None:
    set_control(page, "sort", "dataset")
    page.wait_for(f"document.querySelector({json.dumps(FIRST)})")
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
