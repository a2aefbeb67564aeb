"""The site, built from the stored outputs: complete, without dead links, and readable in Chromium on a phone.

`SCREENSHOTS=1 pytest tests/browser` also saves pictures of its pages, to tests/browser/screenshots.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import threading
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from html.parser import HTMLParser
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import pytest
from chromium import NEEDS_CHROMIUM, WAIT_SECONDS

import cifar_fast

ROOT = Path(__file__).resolve().parents[2]
NOTEBOOKS = sorted(path.stem for path in (ROOT / "notebooks").glob("[0-9][0-9]_*.ipynb"))
SCREENSHOTS = Path(__file__).parent / "screenshots"
# pyproject's address wins; without one it is the repository that GitHub builds.
URLS = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"].get("urls", {})
REPOSITORY = urlsplit(URLS.get("Repository", "https://github.com/somebody/cifar_fast")).path.strip("/")
LOADS = {"script": "src", "img": "src", "link": "href", "source": "src", "iframe": "src", "object": "data"}

pytestmark = [
    pytest.mark.timeout(1800),
    pytest.mark.skipif(
        not all(map(find_spec, ("sphinx", "myst_nb", "furo", "latex2mathml", "ipywidgets"))),
        reason="needs the extra `docs`: pip install -e '.[docs]'",
    ),
]


@dataclass
class Page(HTMLParser):
    """What a page has and asks for."""

    text: str
    ids: set[str] = field(default_factory=set)
    links: list[str] = field(default_factory=list)
    loads: list[str] = field(default_factory=list)
    alts: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        super().__init__()
        self.feed(self.text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = {name: value or "" for name, value in attrs}
        if "id" in found:
            self.ids.add(found["id"])
        if tag == "a" and "href" in found:
            self.links.append(found["href"])
        if tag == "img":
            self.alts.append(found.get("alt", ""))
        if LOADS.get(tag) in found and found.get("rel") not in ("search", "index", "next", "prev"):
            self.loads.append(found[LOADS[tag]])


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the built site; a warning fails the build."""
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "sphinx", "-M", "html", "docs", str(folder), "-W", "--keep-going", "-q"]
    environment = os.environ | {"GITHUB_REPOSITORY": REPOSITORY, "PYTHONPATH": str(ROOT)}
    built = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert built.returncode == 0, built.stdout + built.stderr
    return folder / "html"


@pytest.fixture(scope="module")
def pages(site: Path) -> dict[str, Page]:
    return {path.relative_to(site).as_posix(): Page(path.read_text()) for path in site.rglob("*.html")}


def test_no_internal_link_is_dead(site, pages):
    dead, checked = [], 0
    for name, page in pages.items():
        for link in [*page.links, *page.loads]:
            to = urlsplit(link)
            if to.scheme in ("http", "https", "data") or link == "#":
                continue
            target = ((site / name).parent / unquote(to.path)).resolve() if to.path else site / name
            checked += 1
            if not target.is_file():
                dead.append(f"{name}: {link}")
            elif to.fragment and target.suffix == ".html":
                other = pages[target.relative_to(site.resolve()).as_posix()] if to.path else page
                if unquote(to.fragment) not in other.ids:
                    dead.append(f"{name}: {link}")
    assert checked > 1000 and not dead, dead


def test_nothing_is_loaded_from_another_host(site, pages):
    loads = [load for page in pages.values() for load in page.loads]
    assert len(loads) > 100
    assert not [load for load in loads if urlsplit(load).netloc]
    for style in site.rglob("*.css"):
        assert not re.findall(r"(?:@import|url\()\s*[\"']?(?:https?:)?//[^)]*", style.read_text()), style


def test_every_picture_says_what_it_shows_and_no_output_needs_a_kernel(pages):
    explorers = 0
    for stem in NOTEBOOKS:
        page = pages[f"notebooks/{stem}.html"]
        assert page.alts and all(len(alt.split()) >= 4 for alt in page.alts), stem
        bars = r"\d%\||\[\d\d:\d\d(,|&lt;)"
        for dead in (
            r"Explorer\(\w+=",
            r"LiveCurve\(\)\s*</",
            "appears after the first epoch",
            bars,
            "vnd.jupyter",
            "MathJax",
            r"require\.js",
        ):
            assert not re.search(dead, page.text), f"{stem} shows {dead}"
        explorers += sum("Run this notebook to move " in alt for alt in page.alts)
    assert explorers, "no notebook has sliders any more, or they look otherwise"


def test_each_notebook_can_be_downloaded_and_opened_in_colab(site, pages):
    for stem in NOTEBOOKS:
        links = pages[f"notebooks/{stem}.html"].links
        assert f"https://colab.research.google.com/github/{REPOSITORY}/blob/main/notebooks/{stem}.ipynb" in links
        assert f"{stem}.ipynb" in links
        stored = (ROOT / "notebooks" / f"{stem}.ipynb").read_bytes()
        assert (site / "notebooks" / f"{stem}.ipynb").read_bytes() == stored


def test_every_public_name_has_its_place_in_the_api(pages):
    index, ids = pages["api/index.html"], set().union(*(page.ids for page in pages.values()))
    for name in set(cifar_fast.__all__) - {"__version__"}:
        value = getattr(cifar_fast, name)
        assert f">{name}</span>" in index.text, name
        if getattr(value, "__module__", "").startswith("cifar_fast"):
            assert f"{value.__module__}.{value.__qualname__}" in ids, name
    recipe = pages["api/recipes.html"].text  # a field's colon is no type, its limits are in words
    assert "Initial filters: random" in recipe and "A number of at least 0 and at most 7." in recipe


def test_a_formula_without_mathml_is_refused():
    sys.path.insert(0, str(ROOT / "docs"))
    try:
        from mathml import from_latex
    finally:
        sys.path.remove(str(ROOT / "docs"))
    assert "<mfrac>" in from_latex(r"\frac12", block=False) and "<mtable" in from_latex(
        r"\begin{aligned} a &= b \end{aligned}", block=True
    )
    for formula in (r"\nosuch x", "a & b"):
        with pytest.raises(ValueError, match="no MathML"):
            from_latex(formula, block=False)


# --- in a browser ---


def in_chromium(test: Any) -> Any:
    for mark in (pytest.mark.browser, *NEEDS_CHROMIUM):
        test = mark(test)
    return test


class Quiet(SimpleHTTPRequestHandler):
    """A server of files that prints nothing."""

    def log_message(self, *args: Any) -> None:
        pass


@pytest.fixture(scope="module")
def address(site: Path) -> Iterator[str]:
    """Where the site is served, below a folder as on GitHub Pages."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=site.parent))
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_address[1]}/html/"
    server.shutdown()
    thread.join()
    server.server_close()


def opened(browser: Any, width: int, scheme: str, problems: list[str], address: str) -> Any:
    """A page of that width that notes what goes wrong."""
    page = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme).new_page()
    page.set_default_timeout(1000 * WAIT_SECONDS)
    page.on("console", lambda said: problems.append(said.text) if said.type in ("error", "warning") else None)
    page.on("pageerror", lambda error: problems.append(str(error)))
    page.on("response", lambda got: problems.append(f"{got.status} {got.url}") if got.status >= 400 else None)
    ours = (address, "data:")
    page.on("request", lambda asked: None if asked.url.startswith(ours) else problems.append(f"asked for {asked.url}"))
    return page


LUMINANCE = """() => {
    const [r, g, b] = getComputedStyle(document.body).backgroundColor.match(/\\d+/g).map(Number);
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
}"""
TOO_WIDE = """() => document.documentElement.scrollWidth - document.documentElement.clientWidth"""


@in_chromium
def test_pages_are_readable_on_a_phone_and_a_desk_in_the_light_and_in_the_dark(browser, address, pages):
    problems: list[str] = []
    desk = ["index.html", "notebooks/08_patch_whitening.html", "api/training.html", "results.html"]
    for width, scheme, names in ((390, "light", sorted(pages)), (1280, "dark", desk)):
        page = opened(browser, width, scheme, problems, address)
        for name in names:
            page.goto(address + name)
            assert page.evaluate(TOO_WIDE) <= 0, f"{name} is wider than {width} pixels"
            assert (page.evaluate(LUMINANCE) > 128) == (scheme == "light"), name
            if os.environ.get("SCREENSHOTS"):
                SCREENSHOTS.mkdir(exist_ok=True)
                file = f"site_{name.removesuffix('.html').replace('/', '_')}_{width}_{scheme}.png"
                page.screenshot(path=SCREENSHOTS / file, full_page=True)
        page.context.close()
    assert not problems, problems


@in_chromium
def test_the_search_finds_whitening_and_formulas_have_their_font(browser, address):
    problems: list[str] = []
    page = opened(browser, 390, "dark", problems, address)
    page.goto(address + "search.html?q=whitening")
    page.locator("ul.search a[href*='08_patch_whitening']").first.click()
    page.wait_for_url("**/notebooks/08_patch_whitening.html*")
    page.evaluate("document.fonts.ready")
    assert page.evaluate(
        "[...document.fonts].some(font => font.family.includes('Site Math') && font.status == 'loaded')"
    )
    assert page.locator("math mfrac").first.bounding_box()["height"] > 10
    with page.expect_download() as download:
        page.get_by_role("link", name="Download notebook").click()
    assert download.value.suggested_filename == "08_patch_whitening.ipynb"
    page.context.close()
    assert not problems, problems
