"""Builds the fake CUDA runtime, and runs tasks and tests in processes that have it preloaded."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import IO, Any

HERE = Path(__file__).resolve().parent
REPOSITORY = HERE.parents[1]
LIBRARY = "libfakecuda.so"
SECONDS = 300.0
"""After which a task counts as hung."""


class CannotBuild(Exception):
    """The fake runtime cannot be built here; the message says what is missing."""


def build(folder: Path) -> Path:
    """Compile the fake runtime into `folder`, also under the driver's name, and return that folder.

    The headers are those that torch's CUDA wheels bring along. Raises `CannotBuild`.
    """
    import torch

    if sys.platform != "linux":
        raise CannotBuild("the fake CUDA runtime needs Linux")
    if torch.version.cuda is None:
        raise CannotBuild(f"torch {torch.__version__} is built without CUDA; install torch's CUDA build")
    if shutil.which("gcc") is None:
        raise CannotBuild("gcc is missing: install it to build the fake CUDA runtime")
    headers = _headers(torch.version.cuda.partition(".")[0])
    sources = [HERE / "fakecuda.c", HERE / "fakenccl.c"]
    command = ["gcc", "-O2", "-Wall", "-fvisibility=hidden", "-shared", "-fPIC", *(f"-I{path}" for path in headers)]
    libraries = ["-ldl", "-lpthread", "-lrt"]
    done = subprocess.run([*command, "-o", folder / LIBRARY, *sources, *libraries], capture_output=True, text=True)
    if done.returncode:
        raise CannotBuild(f"gcc cannot compile the fake CUDA runtime:\n{done.stderr}")
    for name in ("libcuda.so.1", "libcuda.so"):
        (folder / name).symlink_to(LIBRARY)
    return folder


def _headers(cuda: str) -> list[Path]:
    """Return the folders with the headers of the runtime, from NVIDIA's wheels, and of the driver, from Triton's."""
    runtime = [Path(place) / "nvidia" / f"cu{cuda}" / "include" for place in sys.path]
    triton = find_spec("triton")
    driver = (
        [Path(place) / "backends/nvidia/include" for place in (triton.submodule_search_locations or ())]
        if triton
        else []
    )
    found = [folder for folder in (*runtime, *driver) if folder.is_dir()]
    for header in ("cuda_runtime_api.h", "cuda.h"):
        if not any((folder / header).is_file() for folder in found):
            raise CannotBuild(f"{header} is missing: torch was installed without NVIDIA's or Triton's wheels")
    return found


def environment(runtime: Path, *, n_gpus: int = 1, mode: str = "") -> dict[str, str]:
    """Return the environment of a process on the fake runtime.

    Args:
        runtime: what `build` returned.
        n_gpus: how many GPUs the process sees.
        mode: `numeric` or `launches`, for the processes that it starts in turn; empty: they compute nothing.
    """
    kept = runtime / "cache"
    return os.environ | {
        "LD_PRELOAD": str(runtime / LIBRARY),
        "LD_LIBRARY_PATH": os.pathsep.join(filter(None, (str(runtime), os.environ.get("LD_LIBRARY_PATH")))),
        "FAKE_CUDA_DEVICES": str(n_gpus),
        "REHEARSAL_MODE": mode,
        "PYTHONPATH": os.pathsep.join(map(str, (HERE / "start", REPOSITORY, HERE.parent))),
        # A process that computes on one thread can be forked.
        "OMP_NUM_THREADS": "1",
        "CIFAR_FAST_CACHE": str(kept / "cifar_fast"),
        "TRITON_LIBCUDA_PATH": str(runtime),
        "TRITON_HOME": str(kept / "triton"),
        "TORCHINDUCTOR_CACHE_DIR": str(kept / "inductor"),
        "TORCHINDUCTOR_COMPILE_THREADS": "1",
    }


class Rehearsal:
    """A process on the fake runtime that imports torch once, and does each task in a fork of its own.

    So a task that leaves CUDA's state broken, as a failed capture does, harms no other. A context manager.
    """

    def __init__(self, runtime: Path) -> None:
        """Start the process."""
        self.runtime = runtime
        self._process = subprocess.Popen(
            [sys.executable, "-m", "gpu_rehearsal.tasks"],
            env=environment(runtime),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def run(self, task: str, *, n_gpus: int = 1, mode: str = "", seconds: float = SECONDS, **arguments: Any) -> Any:
        """Return what the function `task` of tasks.py returns; `arguments` and results are JSON.

        Raises `AssertionError` with the task's own traceback when it fails.
        """
        variables = {"FAKE_CUDA_DEVICES": str(n_gpus), "REHEARSAL_MODE": mode}
        order = {"task": task, "arguments": arguments, "environment": variables, "seconds": seconds}
        to, answers = self._pipes()
        to.write(json.dumps(order) + "\n")
        to.flush()
        answer = answers.readline()
        assert answer, f"the process that rehearses has ended with status {self._process.wait()}"
        result = json.loads(answer)
        assert "failure" not in result, f"{task}: {result['failure']}"
        return result["value"]

    def _pipes(self) -> tuple[IO[str], IO[str]]:
        assert self._process.stdin is not None and self._process.stdout is not None
        return self._process.stdin, self._process.stdout

    def close(self) -> None:
        """End the process."""
        for pipe in self._pipes():
            pipe.close()
        self._process.wait()

    def __enter__(self) -> Rehearsal:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def run_pytest(
    runtime: Path, arguments: Sequence[str], *, n_gpus: int, seconds: float
) -> subprocess.CompletedProcess[str]:
    """Run pytest, from the repository's root, with the simulated GPU in numeric mode for the tests marked `gpu`.

    The options of the project's own test run, which are about notebooks, are left out.
    """
    return subprocess.run(
        [sys.executable, "-m", "pytest", "-o", "addopts=-q", "-p", "gpu_rehearsal.plugin", *arguments],
        cwd=REPOSITORY,
        env=environment(runtime, n_gpus=n_gpus, mode="numeric"),
        capture_output=True,
        text=True,
        timeout=seconds,
    )
