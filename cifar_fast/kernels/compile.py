"""The package's C files: this machine's compiler builds them once, on first use."""

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from cifar_fast.files import cache_folder

FILES = ("winograd.c", "fused.c", "amx.c")
FLAGS = ("-O3", "-march=native", "-fopenmp", "-fPIC")


def load(name: str) -> ctypes.CDLL:
    """Load the C file `name`, one of `FILES`, compiled; raise `OSError`, in words, where that cannot be done.

    Where it has not been compiled before all of them are, at the same time: the first training waits for the slowest,
    not for their sum.
    """
    with ThreadPoolExecutor(len(FILES)) as pool:
        compiled = {file: pool.submit(_compiled, file) for file in FILES}
    return ctypes.CDLL(str(compiled[name].result()))


def _compiled(name: str) -> Path:
    """Compile the file unless this source, compiler and processor were met before; return where the result is."""
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
    """Path of the OpenMP library that torch has loaded: linked to another, we would start a second set of threads."""
    try:
        loaded = Path("/proc/self/maps").read_text().split()
    except OSError:
        raise OSError("cannot find torch's OpenMP library: no /proc/self/maps on this system") from None
    for path in loaded:
        if Path(path).name.startswith(("libgomp", "libiomp5", "libomp")):
            return path
    raise OSError("this build of torch has no OpenMP library")


def _processor() -> str:
    """What `-march=native` depends on."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() + platform.machine()
    return "".join(line for line in dict.fromkeys(lines) if line.startswith(("model name", "flags", "Features")))
