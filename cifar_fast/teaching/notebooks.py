"""Find the notebooks, execute them from top to bottom, and store them so that a diff shows only what changed."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cifar_fast.errors import UserError
from cifar_fast.files import written_whole

FOLDER = Path(__file__).parents[2] / "notebooks"
"""Where a clone has them; an installed package has none."""
METADATA = {
    "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
    "language_info": {"name": "python"},
}
CELL_SECONDS = 3600  # of one cell: at the scale `laptop` an ablation takes a quarter of an hour


def find(names: Sequence[str] = ()) -> list[Path]:
    """Return the notebooks whose file name starts with one of `names`, or all, in order.

    Raises `UserError` where there are none, and for a name that none starts with.
    """
    there = sorted(FOLDER.glob("[0-9][0-9]_*.ipynb"))
    if not there:
        raise UserError(
            f"there are no notebooks in {FOLDER}: they come with a checkout of the repository, not with the package"
        )
    for name in names:
        if not any(path.name.startswith(name) for path in there):
            raise UserError(f"no notebook starts with {name!r}; there are {', '.join(path.stem for path in there)}")
    return [path for path in there if not names or path.name.startswith(tuple(names))]


def execute(path: Path, scale: str = "smoke") -> None:
    """Run a notebook from top to bottom in a kernel of its own, at `scale`, and store it with its outputs.

    A cell that fails, and is not tagged `raises-exception`, is a `UserError`, and the file stays as it was.
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
    """Leave in a notebook only what a reader or a comparison needs: no times, no identifiers of one session."""
    notebook.metadata = METADATA
    notebook.nbformat_minor = 5
    for number, cell in enumerate(notebook.cells):
        cell.id = f"cell-{number:02d}"
        cell.metadata = {"tags": cell.metadata["tags"]} if cell.metadata.get("tags") else {}
        if cell.cell_type != "code":
            continue
        joined: list[Any] = []
        for output in cell.outputs:
            output.get("data", {}).pop("application/vnd.jupyter.widget-view+json", None)
            last: Any = joined[-1] if joined else {}
            if output.output_type == "stream" and last.get("name") == output.name:
                last.text += output.text  # where a stream was cut differs from run to run
            else:
                joined.append(output)
        cell.outputs = joined
