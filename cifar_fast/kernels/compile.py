"""The package's C files as libraries: this machine's compiler builds each once, on first use."""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from cifar_fast.files import cache_folder

FILES = ("winograd.c", "fused.c", "amx.c")
FLAGS = ("-O3", "-march=native", "-fopenmp", "-fPIC")

# The types of C that the signatures of a `Library` name.
POINTER, INT, LONG, FLOAT = ctypes.c_void_p, ctypes.c_int, ctypes.c_long, ctypes.c_float


@dataclass(frozen=True, eq=False)
class Library:
    """A C file of the package, compiled and loaded when it is first needed."""

    source: str
    """Name of the file, one of `FILES`."""
    signatures: Mapping[str, tuple[Any, Sequence[Any]]]
    """For each function, the type that it returns (None for void) and the types of its arguments."""
    not_permitted: str | None = None
    """Reason to give where the file's function `permit` returns anything but 0; None: the file has no such function."""

    def available(self) -> tuple[bool, str]:
        """Say whether this machine can run the compiled code.

        Returns:
            (True, path of the library) or (False, the reason).
        """
        return (False, self._loaded) if isinstance(self._loaded, str) else (True, self._loaded._name)

    @property
    def functions(self) -> ctypes.CDLL:
        """The compiled functions; raises `OSError` with the reason where this machine cannot run them."""
        if isinstance(self._loaded, str):
            raise OSError(self._loaded)
        return self._loaded

    @functools.cached_property
    def _loaded(self) -> ctypes.CDLL | str:
        """The library, or the reason why there is none."""
        try:
            library = load(self.source)
        except OSError as error:
            return str(error)
        if self.not_permitted is not None and library.permit():
            return self.not_permitted
        for name, (returns, arguments) in self.signatures.items():
            function = getattr(library, name)
            function.restype, function.argtypes = returns, arguments
        return library


def address(tensor: Tensor | None) -> int | None:
    """Return where the tensor's values begin in memory, for a `POINTER` argument; None is C's NULL."""
    return None if tensor is None else tensor.data_ptr()


def load(name: str) -> ctypes.CDLL:
    """Load the C file `name`, one of `FILES`; raise `OSError` with the reason where it cannot be compiled or loaded.

    On first use all files are compiled in parallel, so that the first training run waits for the slowest of them, not
    for one after another.
    """
    with ThreadPoolExecutor(len(FILES)) as pool:
        compiled = {file: pool.submit(_compiled, file) for file in FILES}
    return ctypes.CDLL(str(compiled[name].result()))


def _compiled(name: str) -> Path:
    """Return the path of the compiled file; compile it unless this source, compiler and processor were seen before."""
    source = Path(__file__).with_name(name)
    command = os.environ.get("CC", "cc")
    compiler = shutil.which(command)
    if compiler is None:
        raise OSError(f"no C compiler `{command}` on the path: install gcc, or set CC to its name")
    runtime = _openmp_runtime()
    version = subprocess.run([compiler, "--version"], capture_output=True, text=True).stdout
    parts = [source.read_text(), version, _processor(), runtime, *FLAGS]
    key = hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]
    folder = cache_folder()
    target = folder / f"{source.stem}-{key}.so"
    if not target.exists():
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            compiled, built = Path(scratch) / f"{source.stem}.o", Path(scratch) / target.name
            _run(compiler, *FLAGS, "-c", "-o", str(compiled), str(source))
            _run(compiler, "-shared", "-o", str(built), str(compiled), runtime)
            built.replace(target)
    return target


def _run(*command: str) -> None:
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode:
        raise OSError(f"`{' '.join(command)}` failed: {result.stderr.strip()[-500:]}")


def _openmp_runtime() -> str:
    """Return the path of the OpenMP library that torch has loaded: another one would start a second set of threads."""
    try:
        loaded = Path("/proc/self/maps").read_text().split()
    except OSError:
        raise OSError("cannot find torch's OpenMP library: no /proc/self/maps on this system") from None
    for path in loaded:
        if Path(path).name.startswith(("libgomp", "libiomp5", "libomp")):
            return path
    raise OSError("this build of torch has no OpenMP library")


def _processor() -> str:
    """Return a text that names the processor and its instructions, which `-march=native` depends on."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() + platform.machine()
    return "".join(line for line in dict.fromkeys(lines) if line.startswith(("model name", "flags", "Features")))
