"""Modules import from the rooms above theirs in the list, never from a room below."""

from __future__ import annotations

import ast
from pathlib import Path

PACKAGE = Path(__file__).resolve().parents[1] / "cifar_fast"
ROOMS = (
    ("errors",),
    ("files",),
    ("shown",),
    ("recipe",),
    ("recipes",),
    ("data", "kernels"),
    ("hardware",),
    ("training",),
    ("distributed",),
    ("experiments",),
    ("teaching",),
    ("cli",),
    ("__main__", "__init__"),
)
FLOOR = {room: floor for floor, rooms in enumerate(ROOMS) for room in rooms}


def imported_rooms(path: Path) -> set[str]:
    """The rooms of the package that a module imports from, wherever in the file the import stands."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module == "cifar_fast":
            found |= {alias.name if alias.name in FLOOR else "__init__" for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("cifar_fast."):
            found.add(str(node.module).split(".")[1])
        elif isinstance(node, ast.Import):
            found |= {alias.name.split(".")[1] for alias in node.names if alias.name.startswith("cifar_fast.")}
    return found


def test_imports_only_go_to_rooms_above() -> None:
    wrong = []
    for path in sorted(PACKAGE.rglob("*.py")):
        room = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
        for other in imported_rooms(path) - {room}:
            # The version is the one thing that modules ask of the package itself.
            if FLOOR[other] >= FLOOR[room] and other != "__init__":
                wrong.append(f"{path.relative_to(PACKAGE)} imports from {other}")
    assert not wrong, wrong
