"""The manual builds as a site, strictly and without the network."""

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.unit.docs.pages import ROOT

pytestmark = pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ("mkdocs", "material", "mkdocstrings")),
    reason="the extra docs is not installed",
)
NOWHERE = "http://127.0.0.1:9"
OFFLINE = {name: NOWHERE for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY")}


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(out)]
    built = subprocess.run(command, cwd=ROOT, env=os.environ | OFFLINE, capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    return out


def test_every_page_is_in_the_navigation(site: Path) -> None:
    home = (site / "index.html").read_text()
    for page in (ROOT / "docs").rglob("*.md"):
        name = page.relative_to(ROOT / "docs").with_suffix("")
        assert str(name) == "index" or f'href="{name}/"' in home, page


def test_the_reference_shows_docstrings(site: Path) -> None:
    page = (site / "api" / "megatron_tgdpo.loss" / "index.html").read_text()
    assert "megatron_tgdpo.loss.preference" in page
    assert "<code>" in page
    for page_of_api in (site / "api").rglob("index.html"):
        assert not re.search(r":(class|func|mod|meth):", page_of_api.read_text()), page_of_api


def test_a_page_loads_nothing_from_elsewhere(site: Path) -> None:
    for page in site.rglob("*.html"):
        loaded = re.findall(r"<(?:script|img|iframe)[^>]* src=\"?(http[^\" >]*)", page.read_text())
        loaded += re.findall(
            r"<link[^>]*rel=\"?(?:stylesheet|preconnect)\"?[^>]*href=\"?(http[^\" >]*)", page.read_text()
        )
        assert loaded == [], page
