"""The API's pages: the public names with their homes, and a page for each room of the package."""

from __future__ import annotations

import dataclasses
import inspect
import pkgutil
import re
import typing
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any, get_args, get_origin

import cifar_fast
from cifar_fast.recipe import Bounds, Recipe

ROOMS = ("data", "kernels", "hardware", "training", "distributed", "experiments", "teaching")
TOP = ("recipe", "recipes", "errors", "files", "shown")
NOT_SHOWN = {"fused_triton"}
"""Modules that the build cannot import: torch for CPUs comes without Triton."""


def write(folder: Path) -> None:
    """Write `index.rst` and a page for each room to `folder`."""
    folder.mkdir(exist_ok=True)
    Recipe.__annotations__ = typing.get_type_hints(Recipe)  # without the limits, which Sphinx would write out as code
    pages = {"recipes": _top_page()} | {room: _room_page(room) for room in ROOMS}
    pages["index"] = _index(list(pages))
    for old in folder.glob("*.rst"):
        if old.stem not in pages:
            old.unlink()
    for name, text in pages.items():
        page = folder / f"{name}.rst"
        if not page.exists() or page.read_text() != text:  # else Sphinx reads it again
            page.write_text(text)


def first_sentence(docstring: str | None) -> str:
    """Return a docstring's first sentence, in one line; "" without a docstring."""
    paragraph = " ".join(inspect.cleandoc(docstring or "").split("\n\n")[0].split())
    return re.split(r"(?<=[.!?])\s+(?=[A-Z`])", paragraph)[0]


def escape_substitutions(app: Any, what: str, name: str, value: Any, options: Any, lines: list[str]) -> None:
    """Keep docutils from reading `|x|` in a docstring as a substitution."""
    for number, line in enumerate(lines):
        parts = re.split(r"(`[^`]*`)", line)  # every second part is code
        parts[::2] = [part.replace("|", r"\|") for part in parts[::2]]
        lines[number] = "".join(parts)


def hide_colons(app: Any, what: str, name: str, value: Any, options: Any, lines: list[str]) -> None:
    """Keep Napoleon from reading "Initial filters: random" as a field's type and its docstring."""
    if what in ("attribute", "data", "property"):
        lines[:] = [line.replace(":", "\0") for line in lines]


def show_colons(app: Any, what: str, name: str, value: Any, options: Any, lines: list[str]) -> None:
    """Undo what `hide_colons` did."""
    lines[:] = [line.replace("\0", ":") for line in lines]


def limits(annotation: Any) -> str:
    """Return the limits within an annotation in words; "" without any."""
    found = [str(part) for part in getattr(annotation, "__metadata__", ()) if isinstance(part, Bounds)]
    return next(filter(None, [*found, *map(limits, get_args(annotation))]), "")


LIMITS = {name: limits(hint) for name, hint in typing.get_type_hints(Recipe, include_extras=True).items()}


def say_limits_in_words(app: Any, what: str, name: str, value: Any, options: Any, lines: list[str]) -> None:
    """Add a field's limits to its docstring."""
    field = name.removeprefix("cifar_fast.recipe.Recipe.")
    if what == "attribute" and (words := LIMITS.get(field, "")):
        number = "Numbers" if get_origin(typing.get_type_hints(Recipe)[field]) is tuple else "A number"
        lines[:] = [*lines, "", f"{number} {words}.", ""]


def hide_fields(app: Any, what: str, name: str, value: Any, *signature: Any) -> tuple[str, str | None] | None:
    """Leave a dataclass without a signature, since its fields follow; None means that autodoc decides."""
    return ("", None) if what == "class" and dataclasses.is_dataclass(value) else None


def skip_foreign(app: Any, what: str, name: str, value: Any, skip: bool, options: Any) -> bool | None:
    """Leave out what matplotlib adds to its subclasses; None means that autodoc decides."""
    return True if (getattr(value, "__module__", None) or "").startswith("matplotlib.") else None


def _heading(text: str, underline: str) -> str:
    return f"{text}\n{underline * len(text)}\n\n"


def _module(name: str) -> str:
    return _heading(name.removeprefix("cifar_fast."), "-") + f".. automodule:: {name}\n\n"


def _top_page() -> str:
    intro = "A recipe holds every setting of a training run; the modules beside it are what all rooms share.\n\n"
    return _heading("Recipes", "=") + intro + "".join(_module(f"cifar_fast.{name}") for name in TOP)


def _room_page(room: str) -> str:
    package = import_module(f"cifar_fast.{room}")
    modules = sorted({module.name for module in pkgutil.iter_modules(package.__path__)} - NOT_SHOWN)
    text = _heading(room, "=") + f"{inspect.getdoc(package)}\n\n"
    return text + "".join(_module(f"cifar_fast.{room}.{name}") for name in modules)


def _index(pages: list[str]) -> str:
    text = _heading("API", "=")
    text += "These names are ``cf.NAME`` after ``import cifar_fast as cf``; each links to its module.\n\n"
    text += ".. list-table::\n   :widths: 30 70\n   :class: names\n\n"
    for name in sorted({*cifar_fast.__all__, "widgets"} - {"__version__"}, key=str.lower):
        value = getattr(cifar_fast, name)
        text += f"   * - {_link(name, value)}\n     - {_summary(value)}\n"
    text += "\n.. toctree::\n   :hidden:\n\n"
    return text + "".join(f"   {page}\n" for page in pages)


def _link(name: str, value: Any) -> str:
    if value is dataclasses.replace:
        return f"``{name}``"
    if isinstance(value, ModuleType):
        return f":py:mod:`{name} <{value.__name__}>`"
    role = "class" if isinstance(value, type) else "func"
    return f":py:{role}:`{name} <{value.__module__}.{value.__qualname__}>`"


def _summary(value: Any) -> str:
    if value is dataclasses.replace:
        return "Return a copy of a recipe with some fields changed (Python's `dataclasses.replace`)."
    return first_sentence(value.__doc__)
