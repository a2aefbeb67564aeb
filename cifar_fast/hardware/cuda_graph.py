"""How a step's kernels reach a GPU: captured once as a CUDA graph and replayed, fused by torch.compile, or one by one.

Nothing here knows what a step does: `CapturedFunction` takes any function of tensors. PyTorch's note "CUDA semantics",
section "CUDA graphs", says what such a function may do. It must not read numbers from the device, it uses the same
shapes and the same memory each time, and whatever it does on the CPU happens only once. That is why random choices are
drawn on the CPU and passed in, and why learning rates are numbers in the device's memory.
"""

from __future__ import annotations

import gc
import os
import shutil
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache
from typing import Any, ClassVar

import torch
from torch import Tensor

from cifar_fast.files import cache_folder
from cifar_fast.recipe import Recipe

WARM_UPS = 3
"""Calls of a function before its capture: what it loads, chooses or allocates once is then in place."""
COMPILATIONS = 64
"""Networks, each with and without a frozen bias, that one process may compile: a series of ablations needs dozens."""
COMPILERS = ("gcc", "clang", "cc")
"""Triton builds the launcher of each kernel with one of these, or with the compiler that CC names."""

CACHE_VARIABLE = "TORCHINDUCTOR_CACHE_DIR"
"""Names the folder where Inductor and Triton keep compiled code."""


@dataclass(frozen=True)
class StepMode:
    """How a step runs: eager (kernel by kernel), compiled, captured, or compiled and captured."""

    cuda_graph: bool = False
    """Captured once as a CUDA graph, then replayed."""
    compile: bool = False
    """Compiled: torch.compile has fused its kernels."""
    reasons: tuple[str, ...] = ()
    """Why the step is not compiled or not captured, where the recipe asked for it or left it to `auto`."""

    def describe(self) -> dict[str, str]:
        """Return the mode and its reasons as plain words, for results."""
        words = ["compiled"] * self.compile + ["captured"] * self.cuda_graph
        return {"step_mode": " and ".join(words) or "eager", "step_mode_reason": "; ".join(self.reasons)}

    def without(self, field: str, why: str) -> StepMode:
        """Return this mode without `cuda_graph` or `compile`, with the reason added."""
        return replace(self, **{field: False}, reasons=(*self.reasons, f"no {field}: {why}"))  # type: ignore[arg-type]


EAGER = StepMode()


def choose_step_mode(recipe: Recipe, device: torch.device, backend: str | None = None) -> StepMode:
    """Return how `recipe`'s step runs on `device`.

    `backend` is what connects the processes: `nccl`, `gloo`, or None for a single process.
    """
    mode = StepMode(recipe.cuda_graph != "off", recipe.compile != "off")
    against_both = None
    if device.type != "cuda":
        against_both = "the device is not a CUDA GPU"
    against_graph = against_compile = against_both
    if not against_both and CapturedFunction.refused:
        against_graph = f"an earlier capture in this process failed ({CapturedFunction.refused}); start it again"
    elif not against_both and backend == "gloo":
        against_graph = "gloo averages gradients on the CPU, which no CUDA graph captures; use NCCL"
    if not against_both and mode.compile:
        against_compile = no_triton()
    if mode.cuda_graph and against_graph:
        mode = mode.without("cuda_graph", against_graph)
    if mode.compile and against_compile:
        mode = mode.without("compile", against_compile)
    return mode


def no_triton() -> str | None:
    """Return what Triton, and so torch.compile, needs for a GPU and cannot find, if anything."""
    from torch.utils._triton import has_triton  # torch.compile itself asks this function

    if not has_triton():
        return "Triton is missing (pip install triton) or does not support this GPU"
    named = os.environ.get("CC")
    if not any(shutil.which(name) for name in ([named] if named else COMPILERS)):
        return f"Triton needs a C compiler, and there is no {named or ' or '.join(COMPILERS)} on the PATH; install gcc"
    return None


def compiled(function: Callable[..., Any], backend: str = "inductor", variant: str = "") -> Callable[..., Any]:
    """Return `function` compiled on its first call; the compiled code stays on disk for later processes.

    Shapes are fixed and no part stays uncompiled: a function that cannot be compiled as a whole raises on its first
    call. Each `variant` is compiled by itself, for functions that differ although their arguments are alike.
    """
    _choose_cache_folder()
    # Each recipe that a process trains is compiled anew, and torch refuses after this number.
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, COMPILATIONS)
    return torch.compile(function, fullgraph=True, dynamic=False, backend=_compiler(backend, variant))


@cache
def _compiler(backend: str, variant: str) -> Callable[..., Any]:
    """Return the compiler called `backend`: always the same one for a variant, and a different one for each variant.

    Torch reuses compiled code where the arguments and the compiler are the same. It should also notice whether a
    parameter is frozen, but torch 2.11 does not (github.com/pytorch/pytorch/issues/139476).
    """
    compile_graph = torch._dynamo.lookup_backend(backend)

    def compiler(graph: Any, inputs: Any) -> Any:
        return compile_graph(graph, inputs)

    return compiler


def _choose_cache_folder() -> None:
    """Have Inductor and Triton keep their code in the package's cache, unless the user has named another folder.

    When torch imports its compiler it sets the variable to a default that a restart of the machine may empty, so a
    variable with that value is not the user's.
    """
    from torch._inductor.runtime.cache_dir_utils import default_cache_dir

    if os.environ.get(CACHE_VARIABLE) in (None, default_cache_dir()):
        os.environ[CACHE_VARIABLE] = str(cache_folder() / "compiled")


class CapturedFunction:
    """A function of tensors, captured as a CUDA graph; a call copies its arguments in and replays the graph.

    It returns the same tensors each time, with new content: copy what you keep.
    """

    refused: ClassVar[str] = ""
    """Why a capture has failed in this process, if one has: torch's allocator may then refuse every other one."""
    alive: ClassVar[weakref.WeakSet[CapturedFunction]] = weakref.WeakSet()

    def __init__(self, function: Callable[..., Any], *inputs: Tensor, other: CapturedFunction | None = None) -> None:
        """Call `function` a few times with `inputs`, then capture it on their device.

        Given an `other` captured function, the two use the same memory for all but what they return. A call of the
        other may overwrite what this one has returned: read it first.

        The graph reads `inputs` from then on, and a call with these very tensors copies nothing. The first calls
        change what the function changes; the capture itself changes nothing. If it fails, the error is the one that
        `function` raised, not the ones that follow when the broken capture ends.
        """
        self.inputs = inputs
        with torch.cuda.device(inputs[0].device):
            # One side stream for both, so that what libraries keep for each stream exists before the capture. Memory
            # goes back to the stream that had it, so functions that share memory share their stream, too.
            self.stream: torch.cuda.Stream = other.stream if other else torch.cuda.Stream()
            stream, before = self.stream, torch.cuda.current_stream()
            stream.wait_stream(before)
            gc.collect()  # remains of an earlier backward pass belong to other streams
            with measured_convolutions():
                try:
                    with torch.cuda.stream(stream):
                        for _ in range(WARM_UPS):
                            function(*inputs)
                finally:  # a rollback must not overtake a call that failed
                    before.wait_stream(stream)
                self.graph = torch.cuda.CUDAGraph()
                try:
                    self.outputs = self._capture(function, stream, other.graph.pool() if other else None)
                except BaseException as error:
                    torch.cuda.set_stream(before)  # before torch 2.15 the stream of the capture stays the current one
                    CapturedFunction.refused = first_line(error)
                    raise
        CapturedFunction.alive.add(self)

    def _capture(self, function: Callable[..., Any], stream: torch.cuda.Stream, pool: Any) -> Any:
        errors: list[BaseException] = []
        try:
            # Other threads may use the GPU meanwhile: NCCL's watchdog queries events.
            with torch.cuda.graph(self.graph, pool=pool, stream=stream, capture_error_mode="thread_local"):
                try:
                    return function(*self.inputs)
                except BaseException as error:
                    errors.append(error)
                    raise
        except BaseException as error:  # the end of a broken capture only says "due to a previous error"
            errors.append(error)
        try:
            raise errors[0]
        finally:
            del errors  # otherwise its traceback would keep the memory of the capture alive

    def __call__(self, *arguments: Tensor) -> Any:
        """Replay the function on the current stream."""
        pairs = [(own, given) for own, given in zip(self.inputs, arguments, strict=True) if given is not own]
        for dtype in {own.dtype for own, _ in pairs}:  # one kernel copies all tensors of a type
            alike = [pair for pair in pairs if pair[0].dtype == dtype]
            torch._foreach_copy_([own for own, _ in alike], [given for _, given in alike])
        self.graph.replay()
        return self.outputs


def first_line(error: BaseException) -> str:
    """Return the type of an error and the first line of its message."""
    return f"{type(error).__name__}: {error}".partition("\n")[0]


def release_captures() -> None:
    """Free every captured graph of this process: NCCL waits forever for those that hold one of its operations."""
    for captured in list(CapturedFunction.alive):
        captured.graph.reset()
    CapturedFunction.alive.clear()


@contextmanager
def measured_convolutions() -> Iterator[None]:
    """Have cuDNN measure which of its algorithms is fastest when it meets a convolution for the first time.

    Only the first time counts: for each shape a process keeps what it chose then, measured or guessed.
    """
    before = torch.backends.cudnn.benchmark
    torch.backends.cudnn.benchmark = True
    try:
        yield
    finally:
        torch.backends.cudnn.benchmark = before
