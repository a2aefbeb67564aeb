"""Finds the notebooks, executes them from top to bottom, and stores them so that a diff shows only what changed."""

from __future__ import annotations

import os
import shutil
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cifar_fast.errors import UserError
from cifar_fast.files import written_whole

PACKAGED = Path(__file__).parents[1] / "notebooks"
"""Where an installed package has them."""
FOLDER = PACKAGED if PACKAGED.is_dir() else Path(__file__).parents[2] / "notebooks"
"""Where they are: in a clone, beside the package."""
COPY = Path("cifar_fast_notebooks")
"""Where those of an installed package are copied to, in the current folder."""
METADATA = {
    "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
    "language_info": {"name": "python"},
}
SOURCE = "CIFAR_FAST_SOURCE"
"""The environment variable that says where to install the package from."""
INSTALL_MARK = "except ModuleNotFoundError"
"""Text that only the cell that installs the package contains."""
CELL_SECONDS = 3600  # of one cell: at the scale `laptop` an ablation takes a quarter of an hour


def repository_address(project: Path | None = None) -> str:
    """Return the repository's address from a clone's `pyproject.toml`, the one place where it stands; "" if unset."""
    path = project or FOLDER.parent / "pyproject.toml"
    values = tomllib.loads(path.read_text()) if path.exists() else {}
    return str(values.get("project", {}).get("urls", {}).get("Repository", "")).removesuffix("/")


def install_cell(address: str) -> str:
    """Return the first code cell of every notebook, which installs the package where it is missing, as in Colab.

    It takes what `CIFAR_FAST_SOURCE` names, else the clone that the notebook is in, else the repository at `address`.
    """
    otherwise = f"git+{address}" if address else ""
    lines = [
        "try:",
        "    import cifar_fast as cf",
        f"{INSTALL_MARK}:  # in Colab, for instance",
        "    import os",
        "    import pathlib",
        "",
        '    clone = pathlib.Path("..").resolve()',
        f'    beside = f"file://{{clone}}" if (clone / "cifar_fast").is_dir() else "{otherwise}"',
        f'    source = os.environ.get("{SOURCE}", beside)',
        *([] if address else [f'    assert source, "set {SOURCE} to the repository\'s address, git+https://..."']),
        '    %pip install -q "cifar_fast[notebooks] @ {source}"',
        "    import cifar_fast as cf",
    ]
    return "\n".join(lines)


def to_work_in() -> Path:
    """Return the folder whose notebooks can be edited: a clone's own, or `COPY` with a copy of the installed ones.

    A file that `COPY` has already stays as it is. Raises `UserError` if a copy cannot be written.
    """
    if FOLDER != PACKAGED:
        return FOLDER
    for source in (*find(), *sorted((FOLDER / "solutions").glob("*.py"))):
        target = COPY / source.relative_to(FOLDER)
        if target.exists():
            continue
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            with written_whole(target) as temporary:
                shutil.copyfile(source, temporary)
        except OSError as error:
            reason = error.strerror or error
            raise UserError(f"the notebooks cannot be copied to {COPY.absolute()}: {reason}") from error
    return COPY.absolute()


def find(names: Sequence[str] = (), folder: Path | None = None) -> list[Path]:
    """Return the notebooks whose file name starts with one of `names`, or all, in order; `folder` is `FOLDER` if None.

    Raises `UserError` where there are none, and for a name that none starts with.
    """
    folder = folder or FOLDER
    there = sorted(folder.glob("[0-9][0-9]_*.ipynb"))
    if not there:
        raise UserError(f"there are no notebooks in {folder}; install the package again, or clone the repository")
    for name in names:
        if not any(path.name.startswith(name) for path in there):
            raise UserError(f"no notebook starts with {name!r}; there are {', '.join(path.stem for path in there)}")
    return [path for path in there if not names or path.name.startswith(tuple(names))]


def execute(path: Path, scale: str = "classroom") -> None:
    """Run a notebook from top to bottom in a kernel of its own, at `scale`, and store it with its outputs.

    Raises `UserError` if a cell that is not tagged `raises-exception` fails; the file then stays as it was.
    """
    try:
        import nbformat
        from nbclient import NotebookClient
        from nbclient.exceptions import CellExecutionError
    except ImportError as error:
        raise UserError(
            "executing notebooks needs JupyterLab's packages, which are not installed: "
            "pip install 'cifar_fast[notebooks]'"
        ) from error
    notebook = nbformat.read(path, as_version=4)
    tidy(notebook)
    before = os.environ.get("CIFAR_FAST_SCALE")
    os.environ["CIFAR_FAST_SCALE"] = scale  # which the kernel inherits
    try:
        NotebookClient(
            notebook,
            timeout=CELL_SECONDS,
            kernel_name="python3",
            resources={"metadata": {"path": str(path.parent)}},
            store_widget_state=False,  # megabytes, and a static page cannot draw them anyway
        ).execute()
    except CellExecutionError as error:
        raise UserError(f"{path.name} failed, and is not stored:\n{error}") from error
    finally:
        del os.environ["CIFAR_FAST_SCALE"]
        if before is not None:
            os.environ["CIFAR_FAST_SCALE"] = before
    tidy(notebook)
    with written_whole(path) as temporary:
        nbformat.write(notebook, temporary)


def tidy(notebook: Any) -> None:
    """Leave in a notebook only what a reader or a comparison needs: no times, no identifiers of one session.

    The cell that installs the package becomes that of `install_cell`.
    """
    notebook.metadata = METADATA
    notebook.nbformat_minor = 5
    address = repository_address()
    for number, cell in enumerate(notebook.cells):
        cell.id = f"cell-{number:02d}"
        cell.metadata = {"tags": cell.metadata["tags"]} if cell.metadata.get("tags") else {}
        if cell.cell_type != "code":
            continue
        if INSTALL_MARK in cell.source:
            cell.source = install_cell(address)
        joined: list[Any] = []
        for output in cell.outputs:
            output.get("data", {}).pop("application/vnd.jupyter.widget-view+json", None)
            last: Any = joined[-1] if joined else {}
            if output.output_type == "stream" and last.get("name") == output.name:
                last.text += output.text  # where a stream was cut differs from run to run
            else:
                joined.append(output)
        cell.outputs = joined
