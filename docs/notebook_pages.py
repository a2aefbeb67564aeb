"""The notebooks as pages, with their stored outputs, and the solutions of their exercises."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any


def write(notebooks: Path, folder: Path) -> None:
    """Write a copy of each notebook for Sphinx to `folder`, and remove copies of notebooks that are gone."""
    folder.mkdir(exist_ok=True)
    there = {path.name: path for path in notebooks.glob("[0-9][0-9]_*.ipynb")}
    for old in folder.glob("*.ipynb"):
        if old.name not in there:
            old.unlink()
    solutions = folder / "solutions"  # to which the notebooks link
    shutil.rmtree(solutions, ignore_errors=True)
    if (notebooks / "solutions").is_dir():
        shutil.copytree(notebooks / "solutions", solutions, ignore=shutil.ignore_patterns("__pycache__"))
    for name, path in there.items():
        text = json.dumps(prepared(json.loads(path.read_text())), ensure_ascii=False)
        copy = folder / name
        if not copy.exists() or copy.read_text() != text:  # else Sphinx reads it again
            copy.write_text(text)


def prepared(notebook: dict[str, Any]) -> dict[str, Any]:
    """Return the notebook with alternative texts where MyST-NB looks for them."""
    for cell in notebook["cells"]:
        source = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            # JupyterLab's anchors keep capitals, the site's do not.
            cell["source"] = re.sub(r"\]\((#[^)]+)\)", lambda link: f"]({link[1].lower()})", source)
        elif cell["cell_type"] == "code":
            if "except ModuleNotFoundError" in source:  # what installs the package
                cell["metadata"].setdefault("tags", []).append("hide-input")
            alts = [alt for output in cell["outputs"] if (alt := alternative_text(output))]
            if alts:
                assert len(alts) == 1, f"MyST-NB takes one alternative text for a cell, and this one has more: {source}"
                cell["metadata"]["mystnb"] = {"image": {"alt": alts[0]}}
    return notebook


def alternative_text(output: dict[str, Any]) -> str:
    """Return the alternative text of an output that is a picture, in one line."""
    return " ".join(output.get("metadata", {}).get("image/png", {}).get("alt", "").split())


def add_to_context(app: Any, page: str, template: str, context: dict[str, Any], doctree: Any) -> None:
    """Tell the template which pages are notebooks, and where Colab finds them."""
    if not page.startswith("notebooks/"):
        return
    context["notebook"] = f"{Path(page).name}.ipynb"
    host, _, name = context["repository"].removeprefix("https://").partition("/")
    if host == "github.com":
        context["colab"] = f"https://colab.research.google.com/github/{name}/blob/main/{page}.ipynb"


def offer_originals(app: Any, error: Exception | None) -> None:
    """Put the notebooks as they are stored beside their pages, to download."""
    if error is None and app.builder.format == "html":
        for path in (Path(app.srcdir).parent / "notebooks").glob("[0-9][0-9]_*.ipynb"):
            shutil.copy(path, Path(app.outdir) / "notebooks" / path.name)
