"""A real browser shows the notebooks in a real JupyterLab: stored pictures, sliders, a training run, an interrupt.

Needs Debian's Chromium (or another one that the variable CHROMIUM names) and Playwright for Python; nothing is
downloaded. One page of one JupyterLab opens a notebook after the other. The lessons are only looked at (nbval runs
them); a small notebook of our own runs cells and moves sliders.

`SCREENSHOTS=1 pytest tests/browser` also saves pictures of every notebook in both themes, to tests/browser/screenshots.
"""

from __future__ import annotations

import json
import os
import re
import secrets
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
from chromium import NEEDS_CHROMIUM, WAIT_SECONDS

from cifar_fast.teaching.notebooks import METADATA

ROOT = Path(__file__).resolve().parents[2]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("[0-9][0-9]_*.ipynb"))
SCREENSHOTS = Path(__file__).parent / "screenshots"
THEMES = {"light": "JupyterLab Light", "dark": "JupyterLab Dark"}

pytestmark = [
    pytest.mark.browser,
    pytest.mark.timeout(1800),
    *NEEDS_CHROMIUM,
    pytest.mark.skipif(find_spec("jupyterlab") is None, reason="needs JupyterLab: pip install -e '.[notebooks]'"),
]


def until(page: Any, holds: Callable[[], Any], what: str) -> Any:
    """Wait until `holds()` is true, and return it; if it never is, a screenshot shows what was there instead."""
    deadline = time.monotonic() + WAIT_SECONDS
    while not (value := holds()):
        if time.monotonic() > deadline:
            SCREENSHOTS.mkdir(exist_ok=True)
            page.screenshot(path=SCREENSHOTS / "in_vain.png")
            pytest.fail(f"waited {WAIT_SECONDS} s in vain until {what}; see {SCREENSHOTS / 'in_vain.png'}")
        page.wait_for_timeout(100)
    return value


# --- JupyterLab and the browser ---


@dataclass(frozen=True)
class Lab:
    """A JupyterLab that runs."""

    url: str
    token: str

    def kernels(self, page: Any) -> list[dict[str, Any]]:
        """What the server tells of its kernels."""
        return page.request.get(f"{self.url}api/kernels", headers=self.headers(), timeout=1000 * WAIT_SECONDS).json()

    def headers(self) -> dict[str, str]:
        return {"Authorization": f"token {self.token}"}


def address(runtime: Path) -> str:
    """Where the server of this folder of JupyterLab's listens, on a port that it found free; empty while it starts."""
    for file in runtime.glob("jpserver-*.json"):
        with suppress(json.JSONDecodeError):  # half written
            return json.loads(file.read_text())["url"]
    return ""


@contextmanager
def lab_over(folder: Path, private: Path, data: Path | None) -> Iterator[Lab]:
    """JupyterLab over the notebooks in `folder`; whatever it writes of its own goes to `private`."""
    hidden = ("JUPYTER", "IPYTHON", "MPLBACKEND")  # somebody's own settings, and what is not so in a reader's kernel
    env = {name: value for name, value in os.environ.items() if not name.startswith(hidden)}
    for name in ("JUPYTER_CONFIG_DIR", "JUPYTER_DATA_DIR", "JUPYTER_RUNTIME_DIR", "IPYTHONDIR"):
        env[name] = str(private / name.lower())
    for name in ("JUPYTERLAB_SETTINGS_DIR", "JUPYTERLAB_WORKSPACES_DIR"):
        env[name] = str(private / name.lower())
    token = secrets.token_hex(16)
    env |= {"JUPYTER_TOKEN": token, "CIFAR_FAST_SCALE": "smoke"} | ({"CIFAR_FAST_DATA": str(data)} if data else {})
    settings = private / "jupyterlab_settings_dir" / "@jupyterlab" / "apputils-extension"
    settings.mkdir(parents=True)
    # Otherwise JupyterLab asks the network for news and for newer versions of itself.
    (settings / "notification.jupyterlab-settings").write_text('{"checkForUpdates": false, "fetchNews": "false"}')
    options = ["--no-browser", "--allow-root", f"--ServerApp.root_dir={folder}", "--ServerApp.ip=127.0.0.1"]
    options += ["--LabApp.extension_manager=readonly", "--LabApp.news_url=None"]
    options += ["--LabApp.check_for_updates_class=jupyterlab.NeverCheckForUpdate"]
    options += ["--LabApp.expose_app_in_browser=True"]  # as window.jupyterapp
    with open(private / "log", "w") as log:
        server = subprocess.Popen(
            [sys.executable, "-m", "jupyterlab", *options],
            env=env, cwd=folder, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True,
        )  # fmt: skip
    try:
        deadline = time.monotonic() + WAIT_SECONDS
        while not (url := address(private / "jupyter_runtime_dir")):
            assert server.poll() is None and time.monotonic() < deadline, (private / "log").read_text()
            time.sleep(0.1)
        yield Lab(url, token)
    finally:
        server.send_signal(signal.SIGTERM)
        with suppress(subprocess.TimeoutExpired):
            server.wait(30)  # it ends its kernels first
        with suppress(ProcessLookupError):
            os.killpg(server.pid, signal.SIGKILL)
        server.wait()


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory, user_data_root: Path | None) -> Iterator[Lab]:
    folder = tmp_path_factory.mktemp("notebooks")
    for notebook in NOTEBOOKS:
        shutil.copy(notebook, folder)
    cells = [{"cell_type": "code", "source": source, "metadata": {}, "outputs": []} for source in LIVE]
    cells = [cell | {"id": f"cell-{i}", "execution_count": None} for i, cell in enumerate(cells)]
    live = {"cells": cells, "metadata": METADATA, "nbformat": 4, "nbformat_minor": 5}
    (folder / "live.ipynb").write_text(json.dumps(live))
    with lab_over(folder, tmp_path_factory.mktemp("lab"), user_data_root) as running:
        yield running


@pytest.fixture(scope="module")
def page(browser: Any, lab: Lab) -> Iterator[Any]:
    """A page of JupyterLab that reaches the server and nothing else, and that fails if it asks for anything else."""
    asked: list[str] = []
    context = browser.new_context(viewport={"width": 1400, "height": 1600})

    def only_here(route: Any) -> None:
        if urlsplit(route.request.url).hostname in ("127.0.0.1", "localhost"):
            route.continue_()
        else:
            asked.append(route.request.url)
            route.abort()

    context.route(re.compile("^https?:"), only_here)
    page = context.new_page()
    page.set_default_timeout(1000 * WAIT_SECONDS)
    page.goto(f"{lab.url}lab?token={lab.token}")
    page.locator(".jp-Launcher").wait_for()
    yield page
    context.close()
    assert not asked, f"JupyterLab asked the network for {asked}"


# --- what a reader does ---


@contextmanager
def opened(page: Any, name: str, *, kernel: bool) -> Iterator[None]:
    """Open a notebook, with a kernel or without, and close it again."""
    page.evaluate(
        """async ([path, kernel]) => {
            const kernelPreference = {shouldStart: kernel, canStart: kernel, autoStartDefault: kernel};
            await window.jupyterapp.commands.execute("docmanager:open", {path, kernelPreference});
        }""",
        [name, kernel],
    )
    page.locator(".jp-Notebook .jp-CodeCell").first.wait_for()
    yield
    page.evaluate("window.jupyterapp.shell.currentWidget.dispose()")  # which, unlike `close`, never asks
    page.locator(".jp-Notebook").wait_for(state="detached")


def menu(page: Any, *entries: str) -> None:
    """Choose an entry of the menu bar: the menu, its submenus, the entry."""
    page.locator(".lm-MenuBar-item").get_by_text(entries[0], exact=True).click()
    for entry in entries[1:]:
        page.locator(".lm-Menu-itemLabel").get_by_text(entry, exact=True).last.click()


def cell(page: Any, index: int) -> Any:
    return page.locator(".jp-CodeCell").nth(index)


def prompt(page: Any, index: int) -> str:
    """What stands before a code cell: `[3]:` has been run, `[*]:` waits or runs, `[ ]:` has not."""
    return cell(page, index).locator(".jp-InputPrompt").text_content()


def said(page: Any, index: int) -> str:
    return "".join(cell(page, index).locator(".jp-OutputArea").all_text_contents())


def run(page: Any, index: int) -> None:
    """Click into a code cell and run it."""
    cell(page, index).locator(".cm-content").first.click()
    page.keyboard.press("Control+Enter")


def pixels(explorer: Any) -> str:
    """The picture that an explorer shows at this moment; empty while there is none."""
    return explorer.locator("img").first.evaluate(
        """image => {
            if (!image.complete || !image.naturalWidth) return "";
            const canvas = document.createElement("canvas");
            [canvas.width, canvas.height] = [image.naturalWidth, image.naturalHeight];
            canvas.getContext("2d").drawImage(image, 0, 0);
            return canvas.toDataURL();
        }"""
    )


def photograph(page: Any, name: str, theme: str) -> None:
    """Save screenshots of the whole notebook in one of the themes, a screenful a file, if anybody wants them."""
    if not os.environ.get("SCREENSHOTS"):
        return
    SCREENSHOTS.mkdir(exist_ok=True)
    wanted = "true" if theme == "light" else "false"
    if page.locator("body").get_attribute("data-jp-theme-light") != wanted:
        menu(page, "Settings", "Theme", THEMES[theme])
        page.locator(f"body[data-jp-theme-light={wanted}]").wait_for(state="attached")  # of no size of its own
    for old in SCREENSHOTS.glob(f"{name}_{theme}_*.png"):
        old.unlink()
    panel = page.locator(".jp-Notebook .jp-WindowedPanel-outer")
    height = panel.evaluate("panel => panel.clientHeight")
    panel.evaluate("panel => panel.scrollTop = 0")
    for number in range(1, 40):
        page.wait_for_timeout(200)  # a cell is drawn when it comes into view
        page.screenshot(path=SCREENSHOTS / f"{name}_{theme}_{number:02d}.png")
        before = panel.evaluate("panel => panel.scrollTop")
        panel.evaluate(f"panel => panel.scrollTop += {height - 60}")
        if panel.evaluate("panel => panel.scrollTop") == before:
            break


# --- the lessons as they are stored ---


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_every_stored_picture_is_shown(page, lab, path):
    outputs = [output for cell in json.loads(path.read_text())["cells"] for output in cell.get("outputs", [])]
    stored = sum("image/png" in output.get("data", {}) for output in outputs)
    with opened(page, path.name, kernel=False):
        shown = "images => images.filter(image => image.complete && image.naturalWidth).length"
        images = page.locator(".jp-RenderedImage img")
        until(page, lambda: images.evaluate_all(shown) == stored, f"{stored} stored pictures are shown")
        for theme in THEMES:
            photograph(page, path.stem, theme)
    assert lab.kernels(page) == []


# --- cells that run ---

# Explorers with a control of every kind, each with how a reader moves it.
CONTROLS = {
    "cf.widgets.augmentation(data.test_images[:2], dataset=data.name)": "slider",  # of whole numbers
    "cf.widgets.activations()": "slider",  # of real numbers
    "cf.widgets.number_formats()": "slider",  # of powers
    "cf.widgets.loss_scale({'a': torch.tensor([1e-9, 1.0])})": "slider",  # of choices
    "cf.widgets.newton_schulz({'a': torch.eye(4), 'b': torch.ones(4, 6)})": "menu",
    "cf.widgets.augmentation(data.test_images[:2], dataset='another')": "checkbox",
}
TRAIN = "curve = cf.widgets.LiveCurve()\ndisplay(curve)\nresult = cf.train({recipe}, data, on_epoch=curve.add)"
LIVE = [
    "import torch\nimport cifar_fast as cf\ndata = cf.synthetic(320, 100)\nprint(cf.scales.here())",
    "short = cf.replace(cf.recipes.smoke(), widths=(8, 8, 8), precision='float32', convolution='direct')",
    *CONTROLS,
    TRAIN.format(recipe="short"),
    "1 / 0",
    TRAIN.format(recipe="cf.replace(short, epochs=2000.0)"),
]
TRAINS, FAILS, TRAINS_LONG = range(len(LIVE) - 3, len(LIVE))


def move(explorer: Any, how: str) -> None:
    """Move a control of an explorer to a value that it does not start with."""
    if how == "checkbox":
        explorer.locator("input[type=checkbox]").check()
    elif how == "menu":
        explorer.locator("select").select_option(index=1)
    else:
        explorer.locator(".noUi-handle").first.focus()
        explorer.page.keyboard.press("End")


def test_a_reader_runs_cells_moves_controls_and_interrupts_a_training_run(page, lab):
    with opened(page, "live.ipynb", kernel=True):
        # What is run before the kernel answers is lost; the indicator is idle from the first.
        until(page, lambda: [k["execution_state"] for k in lab.kernels(page)] == ["idle"], "the kernel waits")
        page.locator(".jp-Notebook-ExecutionIndicator[data-status=idle]").wait_for()
        menu(page, "Run", "Run All Cells")

        until(page, lambda: prompt(page, FAILS) == f"[{FAILS + 1}]:", "all cells up to the one that fails have run")
        assert "scale: smoke" in said(page, 0) and "ZeroDivisionError" in said(page, FAILS)
        assert re.search(r"on synthetic, seed 0: [\d.]+ % after [\d.]+ s of training", said(page, TRAINS))
        assert cell(page, TRAINS).locator("img").count() == 1  # the curve, of which only the last form is left
        errors = [index for index in range(FAILS) if "Traceback" in said(page, index)]
        assert not errors, said(page, errors[0])

        for index, how in enumerate(CONTROLS.values(), start=2):
            explorer = cell(page, index).locator(".widget-vbox")
            explorer.scroll_into_view_if_needed()
            before = until(page, lambda e=explorer: pixels(e), "the explorer shows a picture")
            move(explorer, how)
            until(page, lambda e=explorer, b=before: pixels(e) not in ("", b), f"the picture follows {LIVE[index]}")
            explorer.get_by_role("button", name="start values").click()
            until(page, lambda e=explorer, b=before: pixels(e) == b, "the button brings the first picture back")
        photograph(page, "live", "light")

        run(page, TRAINS_LONG)
        until(page, lambda: "test accuracy" in said(page, TRAINS_LONG), "the bar says how far it is")
        growing = cell(page, TRAINS_LONG).locator("img")
        before = growing.get_attribute("src")
        until(page, lambda: growing.get_attribute("src") != before, "the curve grows while it trains")
        page.locator("[data-command='notebook:interrupt-kernel'], [data-jp-item-name=interrupt]").first.click()
        until(page, lambda: prompt(page, TRAINS_LONG) != "[*]:", "the training run is interrupted")
        assert "KeyboardInterrupt" in said(page, TRAINS_LONG) and "stopped in epoch" in said(page, TRAINS_LONG)

        before = prompt(page, 0)
        run(page, 0)
        until(page, lambda: prompt(page, 0) not in (before, "[*]:"), "another cell runs in the same kernel")
