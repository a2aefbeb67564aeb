"""How a step's kernels get to a GPU: recorded once as a CUDA graph and replayed, fused by torch.compile, or one by one.

Nothing here knows what a step does: `CapturedFunction` takes any function of tensors. What such a function may do is in
PyTorch's note "CUDA semantics", section "CUDA graphs": no reading of numbers from the device, the same shapes and the
same memory each time, nothing on the CPU that matters. Random choices are drawn on the CPU, per shard and epoch, and
are inputs; learning rates are numbers in the device's memory.
"""

from __future__ import annotations

import gc
import os
import shutil
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from cifar_fast.files import cache_folder
from cifar_fast.recipe import Recipe

WARM_UPS = 3
"""Times that a function is called before it is recorded, so that all it loads, chooses or allocates once is there."""
COMPILATIONS = 64
"""Networks, each with and without a frozen bias, that one process may compile: a series of ablations has dozens."""
COMPILERS = ("gcc", "clang", "cc")
"""Triton builds the launcher of each kernel with one of these, or with what CC names."""


@dataclass(frozen=True)
class StepMode:
    """How a step gets to the device: eager (kernel by kernel), compiled, captured, or both; and why it is not more."""

    cuda_graph: bool = False
    """Captured: recorded once as a CUDA graph, then replayed."""
    compile: bool = False
    """Compiled: torch.compile has fused its kernels."""
    reasons: tuple[str, ...] = ()
    """Why not, for what the recipe leaves to `auto` or asks for and does not get."""

    def describe(self) -> dict[str, str]:
        """Return it as plain words, for results."""
        words = ["compiled"] * self.compile + ["captured"] * self.cuda_graph
        return {"step_mode": " and ".join(words) or "eager", "step_mode_reason": "; ".join(self.reasons)}

    def without(self, field: str, why: str) -> StepMode:
        """Return it with `cuda_graph` or `compile` given up, and the reason added."""
        return replace(self, **{field: False}, reasons=(*self.reasons, f"no {field}: {why}"))  # type: ignore[arg-type]


EAGER = StepMode()


def choose_step_mode(recipe: Recipe, device: torch.device, backend: str | None = None) -> StepMode:
    """Return how `recipe`'s step runs on `device`; `backend` connects the processes, None for a single one."""
    mode = StepMode(recipe.cuda_graph != "off", recipe.compile != "off")
    against_both = None
    if device.type != "cuda":
        against_both = "the device is no CUDA GPU"
    elif recipe.resolutions:
        against_both = f"resolutions={recipe.resolutions} changes the images' size, and a recorded step has one"
    against_graph = against_compile = against_both
    if not against_both and CapturedFunction.refused:
        against_graph = f"this process could not record a step before ({CapturedFunction.refused}); start it again"
    elif not against_both and backend == "gloo":
        against_graph = "gloo averages gradients on the CPU, which no graph records; use NCCL"
    if not against_both and mode.compile:
        against_compile = _no_compiler()
    if mode.cuda_graph and against_graph:
        mode = mode.without("cuda_graph", against_graph)
    if mode.compile and against_compile:
        mode = mode.without("compile", against_compile)
    return mode


def _no_compiler() -> str | None:
    """Return what torch.compile lacks for a GPU, if anything."""
    from torch.utils._triton import has_triton  # the question that torch.compile itself asks

    if not has_triton():
        return "Triton is missing (pip install triton), or does not know this GPU"
    named = os.environ.get("CC")
    if not any(shutil.which(name) for name in ([named] if named else COMPILERS)):
        return f"Triton needs a C compiler, and there is no {named or ' or '.join(COMPILERS)} on the path: install gcc"
    return None


def compiled(function: Callable[..., Any], backend: str = "inductor") -> Callable[..., Any]:
    """Return `function` compiled on its first call, with what has been compiled kept on disk for later processes.

    Fixed shapes, and no part left uncompiled: what cannot be compiled as a whole raises on the first call.
    """
    # Inductor and Triton both look there. Whoever has set it already has a place of their own.
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(cache_folder() / "compiled"))
    # Each recipe that a process trains is compiled anew, and beyond this number would be refused.
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, COMPILATIONS)
    return torch.compile(function, fullgraph=True, dynamic=False, backend=backend)


class CapturedFunction:
    """A function of tensors, recorded as a CUDA graph; a call copies its arguments in, and replays.

    It returns the same tensors each time, with new content: whoever keeps a result keeps a copy of it.
    """

    refused: ClassVar[str] = ""
    """Why recording has failed in this process, if it has: torch's allocator may then refuse any other."""
    alive: ClassVar[weakref.WeakSet[CapturedFunction]] = weakref.WeakSet()

    def __init__(self, function: Callable[..., Any], *inputs: Tensor) -> None:
        """Call `function` a few times with `inputs`, on whose device it works, then record it.

        `inputs` are what it reads from then on; a call with these very tensors copies nothing. All that the function
        changes is changed by the calls, not by the recording.
        """
        self.inputs = inputs
        with torch.cuda.device(inputs[0].device):
            # The same side stream for both, so that what libraries keep for each stream is there when it is recorded.
            stream, before = torch.cuda.Stream(), torch.cuda.current_stream()
            stream.wait_stream(before)
            gc.collect()  # what an earlier backward pass has left belongs to other streams
            with measured_convolutions():
                try:
                    with torch.cuda.stream(stream):
                        for _ in range(WARM_UPS):
                            function(*inputs)
                finally:  # whoever takes back what an unfinished call has done comes after it, too
                    before.wait_stream(stream)
                self.graph = torch.cuda.CUDAGraph()
                # Other threads may go on: NCCL's watchdog asks after events meanwhile.
                try:
                    with torch.cuda.graph(self.graph, stream=stream, capture_error_mode="thread_local"):
                        self.outputs = function(*inputs)
                except BaseException as error:
                    torch.cuda.set_stream(before)  # before torch 2.15 the recording's stays the current one
                    CapturedFunction.refused = f"{type(error).__name__}: {error}".partition("\n")[0]
                    raise
        CapturedFunction.alive.add(self)

    def __call__(self, *arguments: Tensor) -> Any:
        """Run it once more, on the current stream."""
        for own, given in zip(self.inputs, arguments, strict=True):
            if given is not own:
                own.copy_(given)
        self.graph.replay()
        return self.outputs


def release_captures() -> None:
    """Give up every recording of this process: NCCL waits without end for those that hold one of its operations."""
    for recorded in list(CapturedFunction.alive):
        recorded.graph.reset()
    CapturedFunction.alive.clear()


@contextmanager
def measured_convolutions() -> Iterator[None]:
    """Have cuDNN measure which of its algorithms is fastest when it meets a convolution for the first time.

    Only then: a process keeps what was chosen first, measured or guessed, for each shape.
    """
    before = torch.backends.cudnn.benchmark
    torch.backends.cudnn.benchmark = True
    try:
        yield
    finally:
        torch.backends.cudnn.benchmark = before
