"""A real browser opens the notebooks in a real JupyterLab, as a reader does: runs all, moves a slider, interrupts.

Needs Debian's Chromium (or another one that the variable CHROMIUM names) and Playwright for Python; nothing is
downloaded. Screenshots go to tests/browser/screenshots: what was run in the light theme, what is stored in the dark.
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

sync_api = pytest.importorskip("playwright.sync_api", reason="needs Playwright: pip install -e '.[test]'")

ROOT = Path(__file__).resolve().parents[2]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("[0-9][0-9]_*.ipynb"))
SCREENSHOTS = Path(__file__).parent / "screenshots"
STORED = "stored"  # a folder of copies that nobody runs: JupyterLab saves those that somebody does, every two minutes
THEMES = {"light": "JupyterLab Light", "dark": "JupyterLab Dark"}
CHROMIUM = os.environ.get("CHROMIUM") or next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)
WAIT_SECONDS = 400  # most that may pass: a machine may be slow and busy with other tests, but never stand still

pytestmark = [
    pytest.mark.browser,
    pytest.mark.timeout(1500),
    pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium: apt-get install chromium, or set CHROMIUM to one"),
    pytest.mark.skipif(find_spec("jupyterlab") is None, reason="needs JupyterLab: pip install -e '.[notebooks]'"),
]


def until(page: Any, holds: Callable[[], Any], what: str) -> Any:
    """Wait until `holds()` is true, and return it; a picture of what was there instead stays with the screenshots."""
    deadline = time.monotonic() + WAIT_SECONDS
    while not (value := holds()):
        if time.monotonic() > deadline:
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

    def end_kernels(self, page: Any) -> None:
        for kernel in self.kernels(page):
            this = f"{self.url}api/kernels/{kernel['id']}"
            page.request.delete(this, headers=self.headers(), timeout=1000 * WAIT_SECONDS)

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
    (folder / STORED).mkdir()
    for notebook in NOTEBOOKS:
        shutil.copy(notebook, folder)
        shutil.copy(notebook, folder / STORED)
    with lab_over(folder, tmp_path_factory.mktemp("lab"), user_data_root) as running:
        yield running


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            timeout=1000 * WAIT_SECONDS,
            executable_path=CHROMIUM,
            args=["--disable-dev-shm-usage"],  # containers have a small one
            chromium_sandbox=False,  # which root cannot have
        )
        yield browser
        browser.close()


@contextmanager
def new_page(browser: Any, lab: Lab) -> Iterator[Any]:
    """A page that reaches the server and nothing else, and that fails when it asks for anything else."""
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
    yield page
    lab.end_kernels(page)
    context.close()
    assert not asked, f"JupyterLab asked the network for {asked}"


@pytest.fixture
def page(browser: Any, lab: Lab) -> Iterator[Any]:
    with new_page(browser, lab) as page:
        yield page


@pytest.fixture(scope="module")
def one_page(browser: Any, lab: Lab) -> Iterator[Any]:
    """A page of JupyterLab in which one test after another opens a notebook: each load anew would take seconds."""
    with new_page(browser, lab) as page:
        page.goto(f"{lab.url}lab/workspaces/one?token={lab.token}")
        page.locator(".jp-Launcher").wait_for()
        yield page


# --- what a reader does ---


def notebook(number: str) -> Path:
    found = [path for path in NOTEBOOKS if path.name.startswith(number)]
    assert len(found) == 1, f"notebook {number}: {found}"
    return found[0]


def open_notebook(page: Any, lab: Lab, path: Path) -> None:
    # A workspace of its own: JupyterLab opens what was open when the last one was left.
    page.goto(f"{lab.url}lab/workspaces/n{path.name[:2]}/tree/{path.name}?token={lab.token}")
    page.locator(".jp-Notebook .jp-CodeCell").first.wait_for()


@contextmanager
def only_look_at(page: Any, path: Path) -> Iterator[None]:
    """Open a notebook without a kernel, and leave it again."""
    page.evaluate(
        """async path => {
            const kernelPreference = {shouldStart: false, canStart: false, autoStartDefault: false};
            await window.jupyterapp.commands.execute("docmanager:open", {path, kernelPreference});
        }""",
        f"{STORED}/{path.name}",
    )
    page.locator(".jp-Notebook .jp-CodeCell").first.wait_for()
    yield
    page.evaluate("window.jupyterapp.shell.currentWidget.dispose()")  # which, unlike `close`, never asks
    page.locator(".jp-Notebook").wait_for(state="detached")


def await_kernel(page: Any, lab: Lab) -> None:
    # What is run before the kernel answers is lost; the indicator is idle from the first.
    until(page, lambda: [kernel["execution_state"] for kernel in lab.kernels(page)] == ["idle"], "the kernel waits")
    page.locator(".jp-Notebook-ExecutionIndicator[data-status=idle]").wait_for()


def menu(page: Any, *entries: str) -> None:
    """Choose an entry of the menu bar: the menu, its submenus, the entry."""
    page.locator(".lm-MenuBar-item").get_by_text(entries[0], exact=True).click()
    for entry in entries[1:]:
        page.locator(".lm-Menu-itemLabel").get_by_text(entry, exact=True).last.click()


def prompts(page: Any) -> list[str]:
    """What stands before the code cells: `[3]:` has been run, `[*]:` waits or runs, `[ ]:` has not."""
    return page.locator(".jp-CodeCell .jp-InputPrompt").all_text_contents()


def run_all(page: Any, n: int) -> None:
    """Choose `Run All Cells`, and wait until all `n` code cells have run."""
    until(page, lambda: len(prompts(page)) == n, f"all {n} code cells are there")
    menu(page, "Run", "Run All Cells")
    done = [f"[{number}]:" for number in range(1, n + 1)]
    until(page, lambda: prompts(page) == done, f"all {n} cells have run")


def errors(page: Any) -> list[str]:
    """The tracebacks that stand below cells; JupyterLab shows them as it shows stderr."""
    said = page.locator("[data-mime-type='application/vnd.jupyter.stderr']").all_text_contents()
    return [each for each in said if "Traceback (most recent call last)" in each or "KeyboardInterrupt" in each]


def explorers(page: Any) -> Any:
    return page.locator(".widget-vbox").filter(has=page.get_by_role("button", name="start values"))


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


def choose_theme(page: Any, theme: str) -> None:
    wanted = "true" if theme == "light" else "false"
    if page.locator("body").get_attribute("data-jp-theme-light") != wanted:
        menu(page, "Settings", "Theme", THEMES[theme])
        page.locator(f"body[data-jp-theme-light={wanted}]").wait_for(state="attached")  # of no size of its own


def photograph(page: Any, name: str, theme: str) -> None:
    """Save screenshots of the whole notebook in one of the themes, a screenful a file."""
    SCREENSHOTS.mkdir(exist_ok=True)
    choose_theme(page, theme)
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


# --- the tests ---


def code_cells(path: Path) -> list[tuple[str, list[str]]]:
    """Source and tags of each code cell, as stored."""
    cells = [cell for cell in json.loads(path.read_text())["cells"] if cell["cell_type"] == "code"]
    return [("".join(cell["source"]), cell["metadata"].get("tags", [])) for cell in cells]


def press_in_cell(page: Any, index: int, keys: str) -> Any:
    """Click into a code cell and press keys there; return the cell."""
    cell = page.locator(".jp-CodeCell").nth(index)
    cell.locator(".cm-content").first.click()
    page.keyboard.press(keys)
    return cell


def prompt(cell: Any) -> str:
    return cell.locator(".jp-InputPrompt").text_content()


@pytest.mark.parametrize("number", ["04", "08", "11"])
def test_a_reader_runs_all_moves_a_slider_and_interrupts_a_training(page, lab, number):
    path = notebook(number)
    cells = code_cells(path)
    open_notebook(page, lab, path)
    await_kernel(page, lab)

    run_all(page, len(cells))
    on_purpose = sum("raises-exception" in tags for _, tags in cells)
    assert len(errors(page)) == on_purpose, errors(page)

    explorer = explorers(page).first
    explorer.scroll_into_view_if_needed()
    before = until(page, lambda: pixels(explorer), "the explorer shows a picture")
    explorer.locator(".noUi-handle").first.focus()
    page.keyboard.press("Home")  # of the slider: the smallest value, which none starts with
    until(page, lambda: pixels(explorer) not in ("", before), "the picture follows the slider")
    photograph(page, path.stem, "light")
    explorer.get_by_role("button", name="start values").click()
    until(page, lambda: pixels(explorer) == before, "the button brings the first picture back")

    shows_progress = re.compile(r"cf\.ablation\(|\.train\(.*on_epoch=curve\.add")
    trainings = [index for index, (source, _) in enumerate(cells) if shows_progress.search(source)]
    training = press_in_cell(page, trainings[-1], "Control+Enter")
    until(page, lambda: prompt(training) == "[*]:", "the training cell runs")
    until(page, lambda: training.locator(".jp-OutputArea-child").count(), "its progress shows")
    page.locator("[data-command='notebook:interrupt-kernel'], [data-jp-item-name=interrupt]").first.click()
    until(page, lambda: prompt(training) != "[*]:", "the training is interrupted")
    assert "KeyboardInterrupt" in "".join(training.locator(".jp-OutputArea").all_text_contents())

    shows_scale = next(index for index, (source, _) in enumerate(cells) if "print(scale)" in source)
    before = prompt(page.locator(".jp-CodeCell").nth(shows_scale))
    again = press_in_cell(page, shows_scale, "Control+Enter")
    until(page, lambda: prompt(again) not in (before, "[*]:"), "another cell runs in the same kernel")
    assert "scale: smoke" in again.locator(".jp-OutputArea").first.text_content()
    assert len(errors(page)) == on_purpose + 1


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_every_stored_picture_is_shown(one_page, lab, path):
    outputs = [output for cell in json.loads(path.read_text())["cells"] for output in cell.get("outputs", [])]
    stored = sum("image/png" in output.get("data", {}) for output in outputs)
    with only_look_at(one_page, path):
        shown = "images => images.filter(image => image.complete && image.naturalWidth).length"
        images = one_page.locator(".jp-RenderedImage img")
        until(one_page, lambda: images.evaluate_all(shown) == stored, f"{stored} stored pictures are shown")
        photograph(one_page, f"{path.stem}_stored", "dark")  # where a picture without a ground of its own shows it
    assert lab.kernels(one_page) == []
