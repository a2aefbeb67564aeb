"""What a reader's own function consists of: its source, a fingerprint of it, and the bytes that other processes load.

A function that is defined in a notebook cell or a script cannot be imported elsewhere. It travels with all that it
refers to by name: other functions, classes, constants. The fingerprint covers the same things.
"""

from __future__ import annotations

import ast
import dataclasses
import dis
import functools
import hashlib
import inspect
import io
import linecache
import pickle
import sys
import sysconfig
import textwrap
import threading
import traceback
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import CodeType, FunctionType, MethodType, ModuleType
from typing import Any

import cloudpickle
import numpy as np
import torch
from torch import Tensor, nn

PLAIN = (bool, int, float, complex, str, bytes, type(None), type(Ellipsis))
GLOBALS = ("LOAD_GLOBAL", "LOAD_NAME")
"""Instructions of Python's byte code that look up a global name."""


def name_of(function: object) -> str:
    """Return the name of a function or class, or of the class of any other object."""
    return getattr(function, "__qualname__", None) or type(function).__qualname__


# --- what it refers to ---


@functools.cache
def is_installed(module: str) -> bool:
    """Return whether `module` came with Python, with this package or with another installed one.

    Such code is known by its name; everything else, a notebook's cells above all, is the reader's own.
    """
    if module == "__main__":
        return False
    if module.partition(".")[0] in ("cifar_fast", "torch", "builtins"):
        return True
    loaded = sys.modules.get(module)
    if loaded is None:
        return False
    file = getattr(loaded, "__file__", None)
    if file is None:
        return not hasattr(loaded, "__path__")  # a namespace package is the reader's own folder
    path = Path(file).resolve()
    standard = (Path(sysconfig.get_path(name)).resolve() for name in ("stdlib", "platstdlib"))
    return {"site-packages", "dist-packages"} & set(path.parts) != set() or any(
        path.is_relative_to(folder) for folder in standard
    )


def unwrapped(function: FunctionType) -> FunctionType:
    """Return what an installed package's wrapper wraps: torch puts one around every optimiser's step on first use."""
    while is_installed(function.__globals__.get("__name__", "")) and hasattr(function, "__wrapped__"):
        function = function.__wrapped__
    return function


def references(function: FunctionType) -> Iterator[tuple[str, Any]]:
    """Yield what a function refers to, by name: globals, variables of the functions around it, default values."""
    for name in sorted(_global_names(function.__code__)):
        if name in function.__globals__:
            yield name, function.__globals__[name]
    for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
        try:
            yield name, cell.cell_contents
        except ValueError:  # still empty
            continue
    for number, value in enumerate(function.__defaults__ or ()):
        yield f"default {number}", value
    yield from sorted((function.__kwdefaults__ or {}).items())


def _global_names(code: CodeType) -> set[str]:
    names = {each.argval for each in dis.get_instructions(code) if each.opname in GLOBALS}
    return names.union(*(_global_names(inner) for inner in code.co_consts if isinstance(inner, CodeType)))


def _members(cls: type) -> Iterator[tuple[str, Any]]:
    """Yield what a class defines, by name: its methods, as functions, and its constants."""
    for name, value in sorted(vars(cls).items()):
        if isinstance(value, staticmethod | classmethod):
            value = value.__func__
        if isinstance(value, property):
            yield from ((name, each) for each in (value.fget, value.fset, value.fdel) if each is not None)
        elif isinstance(value, FunctionType) or not (name.startswith("__") or name == "_abc_impl"):
            yield name, value


def _parts(value: object) -> Iterator[tuple[str, Any]]:
    """Yield what any object consists of, by name; nothing for one whose insides are not known."""
    if isinstance(value, FunctionType):
        if not is_installed(value.__module__ or "__main__"):
            yield from references(unwrapped(value))
    elif isinstance(value, MethodType):
        yield from (("self", value.__self__), ("function", value.__func__))
    elif isinstance(value, functools.partial):
        yield from (("function", value.func), *enumerate_names(value.args), *sorted(value.keywords.items()))
    elif isinstance(value, type):
        if not is_installed(value.__module__):
            yield from (("base class", base) for base in value.__bases__)
            yield from _members(value)
    elif isinstance(value, Mapping):
        yield from ((repr(key), each) for key, each in value.items())
    elif isinstance(value, list | tuple):
        yield from enumerate_names(value)
    elif isinstance(value, set | frozenset):
        yield from enumerate_names(sorted(value, key=repr))
    elif _is_open(value):
        yield "class", type(value)
        yield from sorted(vars(value).items())


def enumerate_names(values: Any) -> Iterator[tuple[str, Any]]:
    """Yield each of `values` after its position, as a name."""
    yield from ((f"[{number}]", value) for number, value in enumerate(values))


def _is_open(value: object) -> bool:
    """Return whether an object's fields are all there is to it."""
    if not hasattr(value, "__dict__") or isinstance(value, Tensor | ModuleType):
        return False
    return isinstance(value, nn.Module) or dataclasses.is_dataclass(value) or not is_installed(type(value).__module__)


# --- its source and fingerprint ---


@dataclass(frozen=True)
class Code:
    """A function as text: what a result keeps of it."""

    function: str
    """Its name."""
    fingerprint: str
    """Sixteen hexadecimal digits; another source, or another constant that it refers to, gives other digits."""
    source: str
    """The source of the function, and of all of the reader's own functions and classes that it refers to."""

    def to_dict(self) -> dict[str, str]:
        """Return the fields as plain values."""
        return dataclasses.asdict(self)


def read_code(function: Callable[..., Any]) -> Code:
    """Return the source and the fingerprint of `function`, which are the same in every process.

    Code of installed packages counts by its name alone. Where the source cannot be found, Python's byte code stands in
    for it, and where an object's insides are unknown, its pickled bytes.
    """
    reader = _Reader()
    reader.add(function)
    return Code(name_of(function), reader.hash.hexdigest()[:16], "\n\n".join(reader.sources))


class _Reader:
    """Walks through a function and all that it refers to."""

    def __init__(self) -> None:
        self.hash = hashlib.sha256()
        self.sources: list[str] = []
        self._seen: dict[int, int] = {}
        self._kept: list[object] = []  # an object that is gone could leave its id to another

    def _feed(self, *words: object) -> None:
        for word in words:
            self.hash.update(f"{word}\0".encode(errors="surrogatepass"))

    def add(self, value: object, name: str = "", *, with_source: bool = True) -> None:
        """Add one object; without `with_source` a function's text is that of its class, which is there already."""
        if isinstance(value, PLAIN):
            self._feed(type(value).__name__, repr(value))
            return
        if isinstance(value, FunctionType):
            value = unwrapped(value)
        if id(value) in self._seen:
            self._feed("again", self._seen[id(value)])
            return
        self._seen[id(value)] = len(self._seen)
        self._kept.append(value)
        self._feed(type(value).__qualname__)
        if isinstance(value, ModuleType):
            self._add_module(value)
        elif isinstance(value, FunctionType | type) and is_installed(value.__module__ or "__main__"):
            self._feed(value.__module__, value.__qualname__)
        elif isinstance(value, FunctionType):
            if with_source:
                self._add_text(value, lambda: _code_words(value.__code__))
            self._add_references(value)
        elif isinstance(value, type):
            self._add_class(value)
        elif isinstance(value, Tensor | np.ndarray):
            self._add_numbers(value)
        else:
            parts = list(_parts(value))
            for each, part in parts:
                self._feed(each)
                self.add(part, each)
            if not parts and not isinstance(value, Mapping | list | tuple | set | frozenset):
                self._add_pickled(value)

    def _add_text(self, value: FunctionType | type, instead: Callable[[], list[object]]) -> bool:
        """Add the source of a function or a class, or what stands in for it; return whether there is a source."""
        source = _source(value)
        self._feed(*([source] if source else instead()))
        self.sources.append(source or f"# The source of {value.__qualname__} cannot be found.")
        return source is not None

    def _add_references(self, function: FunctionType) -> None:
        for name, part in references(function):
            self._feed(name)
            if isinstance(part, bool | int | float | str) and not name.startswith("default"):
                self.sources.append(f"{name} = {part!r}")
            self.add(part, name)

    def _add_class(self, cls: type) -> None:
        found = self._add_text(cls, lambda: [cls.__qualname__])
        for name, part in _parts(cls):
            self._feed(name)
            self.add(part, name, with_source=not found)

    def _add_module(self, module: ModuleType) -> None:
        self._feed(module.__name__)
        if not is_installed(module.__name__):
            try:
                self._feed(inspect.getsource(module))
            except (OSError, TypeError):
                return

    def _add_numbers(self, value: Tensor | np.ndarray) -> None:
        self._feed(value.dtype, tuple(value.shape))
        if isinstance(value, Tensor):
            if value.is_meta:
                return
            value = value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()
        self.hash.update(value.tobytes())

    def _add_pickled(self, value: object) -> None:
        self._feed(type(value).__module__)
        try:
            self.hash.update(cloudpickle.dumps(value))
        except Exception:  # it cannot travel either, which is reported where it has to
            return


def _source(value: FunctionType | type) -> str | None:
    """Return the source without its indentation, or None where it cannot be found."""
    try:
        return textwrap.dedent(inspect.getsource(value)).strip()
    except (OSError, TypeError, SyntaxError):
        return _source_by_methods(value) if isinstance(value, type) else None


def _source_by_methods(cls: type) -> str | None:
    """Return the source of a class whose module has no file, such as a notebook, from where its methods are."""
    for _, method in _members(cls):
        code = getattr(inspect.unwrap(method), "__code__", None) if callable(method) else None
        if code is None:
            continue
        lines = linecache.getlines(code.co_filename)
        try:
            nodes = list(ast.walk(ast.parse("".join(lines))))
        except SyntaxError:
            continue
        for node in nodes:
            if isinstance(node, ast.ClassDef) and node.name == cls.__name__:
                first, last = min([node.lineno, *(each.lineno for each in node.decorator_list)]), node.end_lineno
                if first <= code.co_firstlineno <= (last or 0):
                    return textwrap.dedent("".join(lines[first - 1 : last])).strip()
    return None


def _code_words(code: CodeType) -> list[object]:
    """Return what a function's byte code does, without the names of files and the numbers of lines."""
    words: list[object] = [code.co_code.hex(), code.co_names, code.co_varnames]
    for constant in code.co_consts:
        words += _code_words(constant) if isinstance(constant, CodeType) else [repr(constant)]
    return words


# --- how it travels ---


class _Pickler(cloudpickle.Pickler):
    """Refuses what another process would unpickle to something else."""

    def reducer_override(self, obj: Any) -> Any:
        if isinstance(obj, Tensor) and obj.device.type != "cpu":
            raise pickle.PicklingError(f"a tensor on {obj.device} would land on the same device in every process")
        if isinstance(obj, io.FileIO | io.BufferedReader | io.BufferedWriter | io.BufferedRandom | io.TextIOWrapper):
            raise pickle.PicklingError("a file that is open here is not open there")
        return super().reducer_override(obj)


def pack(value: object) -> bytes:
    """Return `value` as bytes for `pickle.loads` in another process, with the code that it could not import there.

    Raises whatever an object that cannot be pickled raises; `obstacle` says which object that is.
    """
    with io.BytesIO() as file:
        _Pickler(file).dump(value)
        return file.getvalue()


def obstacle(value: object) -> str | None:
    """Return in words what keeps `value` from travelling to another process: the innermost object; None if nothing."""
    return _obstacle("", value, set())


def _obstacle(name: str, value: object, seen: set[int]) -> str | None:
    if id(value) in seen:
        return None
    seen.add(id(value))
    try:
        pack(value)
        return None
    except Exception as error:
        for part, inner in _parts(value):
            if found := _obstacle(part, inner, seen):
                return found
        called = f"{name!r}, " if name else ""
        return f"{called}{_in_words(value)} ({error})"


def _in_words(value: object) -> str:
    if isinstance(value, Tensor):
        return f"a tensor on {value.device}"
    if isinstance(value, io.IOBase):
        return f"the open file {getattr(value, 'name', '')!r}"
    if isinstance(value, type(threading.Lock()) | type(threading.RLock())):
        return "a lock"
    return f"an object of type {type(value).__qualname__}"


# --- where it failed ---


def raised_by(error: BaseException) -> CodeType | None:
    """Return the code of the reader's own function in which `error` was raised, or None if none took part."""
    own = [frame.f_code for frame, _ in traceback.walk_tb(error.__traceback__) if _is_own(frame.f_globals)]
    return own[-1] if own else None


def _is_own(variables: Mapping[str, Any]) -> bool:
    return not is_installed(variables.get("__name__") or "__main__")
