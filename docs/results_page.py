"""The page of results: benchmarks/results/README.md, whose links to other files lead to the repository."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

LINK = re.compile(r"(?P<picture>!?)\[(?P<text>[^\]]*)\]\((?P<target>[^)\s]+)\)")


def write(readme: Path, page: Path, repository: str) -> None:
    """Write the page, with its pictures beside it."""
    pictures = page.parent / "pictures"
    shutil.rmtree(pictures, ignore_errors=True)
    root = readme.parents[2]

    def moved(link: re.Match[str]) -> str:
        target, _, anchor = link["target"].partition("#")
        if "://" in target or not target:
            return link[0]
        file = (readme.parent / target).resolve().relative_to(root)
        if link["picture"]:
            pictures.mkdir(exist_ok=True)
            name = "-".join(file.parts[-2:])
            shutil.copy(root / file, pictures / name)
            return f"![{link['text']}](pictures/{name})"
        if file.suffix == ".ipynb" and file.parent == Path("notebooks"):
            return f"[{link['text']}]({file.as_posix()}{'#' + anchor if anchor else ''})"
        return f"[{link['text']}]({repository}/blob/main/{file.as_posix()})" if repository else link["text"]

    text = LINK.sub(moved, readme.read_text())
    if not page.exists() or page.read_text() != text:  # else Sphinx reads it again
        page.write_text(text)
