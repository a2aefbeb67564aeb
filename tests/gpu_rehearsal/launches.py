"""Launch mode: nothing is computed, and every kernel is counted, at full size.

torch's own kernels launch themselves on the fake runtime. The libraries that are not there (cuDNN, cuBLAS, cuSOLVER)
are replaced by operations that return an empty tensor of the right shape and layout and launch one named kernel.
"""

from __future__ import annotations

import re
import subprocess
import warnings
from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from cifar_fast.kernels import fused_gpu
from gpu_rehearsal.calls import WORK, Call, launch
from gpu_rehearsal.conversions import conversion

# Operations stay replaced for as long as this object lives.
_library = torch.library.Library("aten", "IMPL")


def enter(*, watched: bool = True) -> Watch:
    """Put this process into launch mode for good; return what counts its conversions, if it is `watched`.

    torch.compile compiles nothing while it is: it gives way to what watches each operation.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # some take the place of a kernel, as they should
        for name, function in _REPLACED.items():
            _library.impl(name, function, "CUDA")
    # Where nothing is computed, the fused kernels have no results to compare with the CPU's.
    fused_gpu.failure = lambda *kind: ""  # type: ignore[assignment]
    watch = Watch()
    if watched:
        watch.__enter__()
    return watch


class Watch(TorchDispatchMode):
    """Counts changes of dtype and layout, apart for what is executed and for each capture."""

    def __init__(self) -> None:
        super().__init__()
        self.executed: Counter[str] = Counter()
        self.captured: list[Counter[str]] = []
        self._was_capturing = False

    def __torch_dispatch__(self, operation: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        if any(isinstance(value, Tensor) and value.is_cuda for value in args):
            is_capturing = torch.cuda.is_current_stream_capturing()
            if is_capturing and not self._was_capturing:
                self.captured.append(Counter())
            self._was_capturing = is_capturing
            if change := conversion(operation, args, kwargs):
                (self.captured[-1] if is_capturing else self.executed)[change] += 1
        return operation(*args, **kwargs)


# ---- cuDNN ----


def _layout(*tensors: Tensor) -> torch.memory_format:
    """Return the layout that cuDNN computes in: channels last as soon as one of its tensors is."""
    last = any(
        t.dim() == 4 and (t.stride(1) == 1 or t.is_contiguous(memory_format=torch.channels_last)) for t in tensors
    )
    return torch.channels_last if last else torch.contiguous_format


def _bring_to(layout: torch.memory_format, tensor: Tensor, name: str) -> None:
    if not tensor.is_contiguous(memory_format=layout):
        launch(f"cudnn converts the layout of {name}")


def _convolution(
    x: Tensor, weight: Tensor, bias: Any, stride: Any, padding: Any, dilation: Any, *others: Any
) -> Tensor:
    if x.dtype != weight.dtype:
        raise RuntimeError(f"Input type ({x.dtype}) and weight type ({weight.dtype}) should be the same")
    layout = _layout(x, weight)
    _bring_to(layout, x, "a convolution's input")
    launch(f"cudnn convolution {x.dtype} {tuple(x.shape)} * {tuple(weight.shape)}")
    if bias is not None:
        launch("cudnn bias")
    sides = [
        (x.shape[2 + i] + 2 * padding[i] - dilation[i] * (weight.shape[2 + i] - 1) - 1) // stride[i] + 1 for i in (0, 1)
    ]
    return torch.empty(len(x), len(weight), *sides, dtype=x.dtype, device=x.device, memory_format=layout)


def _convolution_backward(gradient: Tensor, x: Tensor, weight: Tensor, *others: Any) -> tuple[Tensor | None, ...]:
    wanted, shapes = others[-1], f"{x.dtype} {tuple(x.shape)} * {tuple(weight.shape)}"
    layout = _layout(x, weight)
    _bring_to(layout, gradient, "a convolution's gradient")
    found: list[Tensor | None] = [None, None, None]
    if wanted[0]:
        launch(f"cudnn convolution, gradient of the input {shapes}")
        found[0] = torch.empty_like(x, memory_format=layout)
    if wanted[1]:
        launch(f"cudnn convolution, gradient of the weights {shapes}")
        found[1] = torch.empty_like(weight, memory_format=layout)
    if wanted[2]:
        launch("cudnn bias, gradient")
        found[2] = gradient.new_empty(len(weight))
    return tuple(found)


def _batch_norm(x: Tensor, *others: Any) -> tuple[Tensor, ...]:
    launch("cudnn batch norm")
    statistics = [torch.empty(x.shape[1], dtype=torch.float32, device=x.device) for _ in range(2)]
    return torch.empty_like(x), *statistics, torch.empty(0, dtype=torch.uint8, device=x.device)


def _batch_norm_backward(x: Tensor, gradient: Tensor, weight: Tensor, *others: Any) -> tuple[Tensor, ...]:
    launch("cudnn batch norm, gradient")
    return torch.empty_like(x), torch.empty_like(weight), torch.empty_like(weight)


# ---- cuBLAS and cuSOLVER ----


def _product(name: str, shape: Callable[..., tuple[int, ...]]) -> Callable[..., Tensor]:
    def multiply(*factors: Tensor, out: Tensor | None = None, **kwargs: Any) -> Tensor:
        dtypes = {factor.dtype for factor in factors}
        if len(dtypes) > 1:
            raise RuntimeError(f"{name}: expected factors of one dtype, got {dtypes}")
        shapes = " * ".join(str(tuple(factor.shape)) for factor in factors[-2:])
        if name == "baddbmm" and kwargs.get("beta", 1) != 0:
            launch("copy of what is added")  # cuBLAS adds to what already lies where its result goes
        launch(f"cublas {name} {factors[0].dtype} {shapes}")
        return factors[0].new_empty(shape(*factors[-2:])) if out is None else out

    return multiply


def _of_matrices(a: Tensor, b: Tensor) -> tuple[int, ...]:
    return (a.shape[0], b.shape[1])


def _of_batches(a: Tensor, b: Tensor) -> tuple[int, ...]:
    return (a.shape[0], a.shape[1], b.shape[2])


def _eigh(matrix: Tensor, uplo: str = "L", compute_v: bool = True) -> tuple[Tensor, Tensor]:
    launch("cusolver eigh")
    torch.cuda.current_stream().synchronize()  # it reads whether it has converged
    return matrix.new_ones(matrix.shape[-1]), torch.empty_like(matrix)


# ---- What reads numbers, of which there are none ----


def _bincount(values: Tensor, weights: Tensor | None = None, minlength: int = 0) -> Tensor:
    launch("minimum and maximum")
    launch("histogram")
    torch.cuda.current_stream().synchronize()
    return torch.zeros(minlength, dtype=torch.long, device=values.device)


def _nonzero(mask: Tensor) -> Tensor:
    """Find a fifth of a mask set."""
    launch("nonzero")
    torch.cuda.current_stream().synchronize()
    return torch.zeros(max(1, mask.numel() // 5), mask.dim(), dtype=torch.long, device=mask.device)


_REPLACED: dict[str, Callable[..., Any]] = {
    "convolution": _convolution,
    "convolution_backward": _convolution_backward,
    "cudnn_batch_norm": _batch_norm,
    "cudnn_batch_norm_backward": _batch_norm_backward,
    "mm": _product("mm", _of_matrices),
    "mm.out": _product("mm", _of_matrices),
    "addmm": _product("addmm", _of_matrices),
    "addmm.out": _product("addmm", _of_matrices),
    "bmm": _product("bmm", _of_batches),
    "bmm.out": _product("bmm", _of_batches),
    "baddbmm": _product("baddbmm", _of_batches),
    "baddbmm.out": _product("baddbmm", _of_batches),
    "_linalg_eigh": _eigh,
    "bincount": _bincount,
    "nonzero": _nonzero,
}


# ---- Names ----

FAMILIES = (
    ("copy in memory", r"^copy"),
    ("fill with zeros", r"^memset"),
    ("compiled by Triton", r"^triton_"),
    ("norm, activation and pool by our kernels", r"^norm_"),
    ("layout conversion", r"converts the layout"),
    ("convolution", r"^cudnn (convolution|bias)"),
    ("batch norm", r"^cudnn batch norm|batch_norm"),
    ("matrix product", r"^cublas"),
    ("collective", r"^nccl"),
    ("moving averages over many tensors", r"LerpFunctor"),
    ("copy of many tensors", r"multi_tensor_apply.* Copy<"),
    ("optimiser over many tensors", r"multi_tensor_apply|lpnorm_cleanup"),
    ("copy or cast", r"copy_kernel|CatArrayBatchedCopy"),
    ("fill", r"FillFunctor"),
    ("max-pool", r"max_?pool|adaptivemax"),
    ("resize", r"upsample"),
    ("loss and softmax", r"softmax|nll_loss|SoftMax"),
    ("gather or scatter", r"index_|gather|scatter|flip"),
    ("reduction", r"reduce_kernel"),
    ("arithmetic, element by element", r"elementwise_kernel"),
)
"""Families of kernels, by a pattern of their names; the first that fits counts."""


def readable(names: Iterable[str]) -> dict[str, str]:
    """Return C++ kernels' names as a person writes them, by the linker's names."""
    mangled = sorted({name for name in names if name.startswith("_Z")})
    done = subprocess.run(["c++filt"], input="\n".join(mangled), capture_output=True, text=True, check=True)
    plain = (
        re.sub(r"at::native::|\(anonymous namespace\)::|void |std::", "", name) for name in done.stdout.splitlines()
    )
    return dict(zip(mangled, plain, strict=True))


def family(name: str) -> str:
    """Return the family of a kernel with a readable name."""
    return next((title for title, pattern in FAMILIES if re.search(pattern, name)), "other")


def work_by_name(some: Iterable[Call]) -> Counter[str]:
    """Count what the device is told to do, by readable name."""
    work = [call for call in some if call.kind in WORK]
    names = readable(call.name for call in work)
    return Counter(names.get(call.name, call.name) for call in work)
