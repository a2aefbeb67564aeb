"""Fused max-pool, batch norm and activation on a GPU, with as few kernels and passes over memory as possible.

A GPU computes all three faster than its memory delivers the numbers, and each kernel that it starts costs microseconds.
Fused, they are three kernels forward and three backward, however many groups the batch norm has. With the normalised
u = (p - m) / sqrt(v + eps) of the pooled images p,

    y = act(t),  t = w u + b,

the first kernel reads x, writes p and which pixel of each window it came from, and sums up parts of each group; the
second joins the parts to the mean m and the variance v; the third writes y. Backward, dt = dy act'(t), and

    dp = w / sqrt(v + eps) (dt - db / n - u dw / n),  db = sum dt,  dw = sum dt u:

the first kernel sums up parts, the second joins them, and the third writes dp to the pixels that p came from, and zeros
to the others. The backward pass needs only p, a quarter of the size of x, and one byte for each of its pixels; without
a pool it needs x itself.

The parts are joined as means and squared deviations, so that a mean far from zero does not swamp the variance. Sources:
Ioffe and Szegedy, "Batch normalization", 2015, arXiv 1502.03167; Chan, Golub and LeVeque, "Algorithms for computing the
sample variance", The American Statistician 37, 1983.

Both passes are custom operators, which autograd, torch.compile and CUDA graphs can handle. The compiler cannot fuse
other work into them, but without them it needs more kernels: on the simulated GPU of `tests/gpu_rehearsal`, a compiled
and captured step of `speedrun` launches 135 kernels with the operators and 184 without.

`fused_triton` holds the kernels. The CPU versions here compute the same in plain PyTorch: for the tests, and for a
check of the kernels before they are used.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from importlib.util import find_spec
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

ACTIVATIONS: dict[type[nn.Module], str] = {nn.ReLU: "relu", nn.SiLU: "silu", nn.GELU: "gelu", nn.CELU: "celu"}
"""The activations that the kernels support, and their names in the kernels, the same as in a recipe."""

SUMS = {torch.float16: torch.float32, torch.bfloat16: torch.float32, torch.float32: torch.float32}
SUMS[torch.float64] = torch.float64
"""Number formats of the images that the kernels support, and the format of their sums, statistics and parameters.
float64 is for tests: on a real GPU cuDNN returns float64 images channels-first, which `suits` refuses."""

HAS_TRITON = find_spec("triton") is not None
TOLERANCE = 0.02
"""How far results of the kernels may be from the CPU's, as a share of their norm; bfloat16 keeps two digits."""


def suits(x: Tensor, norm: nn.BatchNorm2d, activation: nn.Module) -> bool:
    """Return whether the kernels support this: training on a GPU with Triton, channels-last images in one of the
    formats of `SUMS`, and one of `ACTIVATIONS`.

    An evaluation is not captured, and in eager mode calling the operator from Python costs more than the kernels it
    would save.
    """
    return (
        HAS_TRITON
        and x.is_cuda
        and norm.training
        and norm.weight.dtype == SUMS.get(x.dtype)
        and type(activation) in ACTIVATIONS
        and getattr(activation, "approximate", "none") == "none"
        and x.numel() > 0
        and x.is_contiguous(memory_format=torch.channels_last)
    )


def normalise_and_activate(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    activation: nn.Module,
    *,
    group_size: int,
    eps: float,
    pool: bool = False,
) -> tuple[Tensor, Tensor]:
    """Normalise each group of images by its own statistics and apply `activation`; differentiable.

    Args:
        x: images (N, C, H, W) for which `suits` is true; N must be a multiple of `group_size`.
        weight: scale (C,), in the format of `SUMS`, like `bias`.
        bias: (C,).
        activation: one of `ACTIVATIONS`.
        group_size: images in a group.
        eps: added to the variance.
        pool: max-pool `x` by 2 first.

    Returns:
        The result (N, C, H, W), or (N, C, H // 2, W // 2) if it pools, and statistics (2, C): the mean over the groups
        of their means, and of their unbiased variances.
    """
    name, alpha = ACTIVATIONS[type(activation)], getattr(activation, "alpha", 1.0)
    y, _, _, _, _, statistics = norm_activation(x, weight, bias, name, alpha, group_size, eps, pool)
    return y, statistics


@cache
def failure(device: torch.device, dtype: torch.dtype, activation: str, alpha: float, eps: float) -> str:
    """Run all kernels on `device`, for images of `dtype`, and compare with the CPU; return what is wrong, or "".

    The first call on a machine compiles them, which takes seconds; training then reuses the compiled kernels.
    """
    try:
        with torch.inference_mode(False), torch.enable_grad():
            for pool in (False, True):
                found = [_try_out(on, dtype, activation, alpha, eps, pool) for on in (torch.device("cpu"), device)]
                if not all((a - b).norm() <= TOLERANCE * a.norm() for a, b in zip(*found, strict=True)):
                    return "their results differ from those of PyTorch"
    except torch.OutOfMemoryError:  # which says nothing about the kernels
        raise
    except Exception as error:  # a compiler fails in many ways, and none need end a training run
        return f"{type(error).__name__}: {error}".partition("\n")[0]
    return ""


def _try_out(
    device: torch.device, dtype: torch.dtype, activation: str, alpha: float, eps: float, pool: bool
) -> list[Tensor]:
    """Return y, the statistics and the gradients of x, weight and bias, as `device` computes them for fixed numbers.

    They are in float64, on the CPU.
    """
    generator = torch.Generator().manual_seed(0)
    x = _channels_last(torch.randn(4, 16, 5, 6, generator=generator).to(dtype)).to(device).requires_grad_()
    weight, bias = (torch.linspace(low, 1.0, 16, dtype=SUMS[dtype]).to(device).requires_grad_() for low in (0.5, -1.0))
    y, *_, statistics = norm_activation(x, weight, bias, activation, alpha, 2, eps, pool)
    dy = _channels_last(torch.randn(y.shape, generator=generator).to(dtype)).to(device)
    gradients = torch.autograd.grad(y, (x, weight, bias), dy)
    return [each.detach().cpu().double() for each in (y, statistics, *gradients)]


# --- The operators ---

_KIND = "str activation, float alpha"


@torch.library.custom_op(
    "cifar_fast::norm_activation",
    mutates_args=(),
    device_types="cpu",
    schema=f"(Tensor x, Tensor weight, Tensor bias, {_KIND}, int group_size, float eps, bool pool) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
)
def norm_activation(
    x: Tensor, weight: Tensor, bias: Tensor, activation: str, alpha: float, group_size: int, eps: float, pool: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return y, p, the places of the maxima, each group's mean and variance, and `normalise_and_activate`'s statistics.

    p and the places (uint8; 0 and 1 are in a window's upper row, 2 and 3 in its lower) are empty without `pool`.
    """
    values, winner = x, x.new_empty(0, dtype=torch.uint8)
    if pool:
        values, index = F.max_pool2d(x, 2, return_indices=True)
        row, column = index // x.shape[3], index % x.shape[3]
        winner = _channels_last((row % 2 * 2 + column % 2).to(torch.uint8))
    groups = values.unflatten(0, (-1, group_size)).to(weight.dtype)  # (groups, g, C, H, W)
    variance, mean = torch.var_mean(groups, dim=(1, 3, 4), correction=0)  # (groups, C)
    u, _ = _normalised(groups, mean, variance, eps)
    y = _FUNCTIONS[activation][0](u * _per_channel(weight) + _per_channel(bias), alpha)
    n = groups[0].numel() / groups.shape[2]
    statistics = torch.stack([mean.mean(0), variance.mean(0) * (n / (n - 1))])
    pooled = _channels_last(values) if pool else x.new_empty(0)
    return _channels_last(y.to(x.dtype).flatten(0, 1)), pooled, winner, mean, variance, statistics


@torch.library.custom_op(
    "cifar_fast::norm_activation_backward",
    mutates_args=(),
    device_types="cpu",
    schema="(Tensor dy, Tensor values, Tensor winner, Tensor mean, Tensor variance, Tensor weight, Tensor bias, "
    f"{_KIND}, float eps, int height, int width) -> (Tensor, Tensor)",
)
def norm_activation_backward(
    dy: Tensor,
    values: Tensor,
    winner: Tensor,
    mean: Tensor,
    variance: Tensor,
    weight: Tensor,
    bias: Tensor,
    activation: str,
    alpha: float,
    eps: float,
    height: int,
    width: int,
) -> tuple[Tensor, Tensor]:
    """Return dx, of that height and width, and (2, C) the gradients of bias and weight.

    `values` are the pooled images, or x itself where `winner` is empty.
    """
    groups = values.unflatten(0, (len(mean), -1)).to(weight.dtype)  # (groups, g, C, H, W)
    u, inverse = _normalised(groups, mean, variance, eps)
    t = u * _per_channel(weight) + _per_channel(bias)
    dt = _FUNCTIONS[activation][1](dy.unflatten(0, (len(mean), -1)).to(weight.dtype), t, alpha)
    over = (1, 3, 4)
    sums, products = dt.sum(over), (dt * u).sum(over)  # (groups, C)
    n = dt[0].numel() / dt.shape[2]
    means = (each[:, None, :, None, None] / n for each in (sums, products))
    dx = (_per_channel(weight) * inverse * (dt - next(means) - u * next(means))).to(dy.dtype).flatten(0, 1)
    if winner.numel():
        high, wide = dy.shape[2:]
        row = 2 * torch.arange(high)[:, None] + winner.long() // 2  # (N, C, high, wide)
        column = 2 * torch.arange(wide) + winner.long() % 2
        full = dx.new_zeros(*dx.shape[:2], height * width)
        dx = full.scatter(2, (row * width + column).flatten(2), dx.flatten(2)).unflatten(2, (height, width))
    return _channels_last(dx), torch.stack([sums.sum(0), products.sum(0)])


def _per_channel(parameter: Tensor) -> Tensor:  # (C,) -> (C, 1, 1)
    return parameter[:, None, None]


def _normalised(groups: Tensor, mean: Tensor, variance: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Return u, and 1 / sqrt(v + eps), of (groups, g, C, H, W)."""
    m, inverse = (each[:, None, :, None, None] for each in (mean, torch.rsqrt(variance + eps)))
    return (groups - m) * inverse, inverse


def _channels_last(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last)


_aten = torch.ops.aten
_FUNCTIONS: dict[str, tuple[Callable[[Tensor, float], Tensor], Callable[[Tensor, Tensor, float], Tensor]]] = {
    "relu": (lambda t, alpha: F.relu(t), lambda dy, t, alpha: _aten.threshold_backward(dy, t, 0)),
    "silu": (lambda t, alpha: F.silu(t), lambda dy, t, alpha: _aten.silu_backward(dy, t)),
    "gelu": (lambda t, alpha: F.gelu(t), lambda dy, t, alpha: _aten.gelu_backward(dy, t)),
    "celu": (F.celu, lambda dy, t, alpha: _aten.elu_backward(dy, alpha, 1, 1 / alpha, False, t)),
}
"""Each activation of (t, alpha), and its gradient of (dy, t, alpha)."""


@norm_activation.register_kernel("cuda")
def _forward_on_gpu(x: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    from cifar_fast.kernels import fused_triton  # a machine without a GPU has no Triton

    with torch.cuda.device(x.device):
        return fused_triton.forward(x, *arguments)


@norm_activation_backward.register_kernel("cuda")
def _backward_on_gpu(dy: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    from cifar_fast.kernels import fused_triton

    with torch.cuda.device(dy.device):
        return fused_triton.backward(dy, *arguments)


@norm_activation.register_fake
def _forward_in_shape(
    x: Tensor, weight: Tensor, bias: Tensor, activation: str, alpha: float, group_size: int, eps: float, pool: bool
) -> tuple[Tensor, ...]:
    n, channels, height, width = x.shape
    y = _empty_images(x, n, channels, *((height // 2, width // 2) if pool else (height, width)))
    none = x.new_empty(0)
    of_groups = (weight.new_empty(n // group_size, channels) for _ in range(2))
    winner = y if pool else none
    return (
        y,
        torch.empty_like(y) if pool else none,
        torch.empty_like(winner, dtype=torch.uint8),
        *of_groups,
        weight.new_empty(2, channels),
    )


@norm_activation_backward.register_fake
def _backward_in_shape(
    dy: Tensor, values: Tensor, winner: Tensor, mean: Tensor, variance: Tensor, weight: Tensor, *others: Any
) -> tuple[Tensor, ...]:
    return _empty_images(dy, *dy.shape[:2], *others[-2:]), weight.new_empty(2, dy.shape[1])


def _empty_images(like: Tensor, *shape: int) -> Tensor:
    return torch.empty(shape, dtype=like.dtype, device=like.device, memory_format=torch.channels_last)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, weight, bias, activation, alpha, _, eps, pool = inputs
    _, pooled, winner, mean, variance, _ = output
    ctx.save_for_backward(pooled if pool else x, winner, mean, variance, weight, bias)
    ctx.arguments = activation, alpha, eps, *x.shape[2:]
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)  # zeros for the outputs that have no gradient would cost kernels


def _differentiate(ctx: Any, dy: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    if dy is None:
        return (None,) * 8
    values, *others = ctx.saved_tensors
    dy = _channels_last(dy.to(values.dtype))
    dx, (db, dw) = norm_activation_backward(dy, values, *others, *ctx.arguments)
    return dx, dw, db, None, None, None, None, None


norm_activation.register_autograd(_differentiate, setup_context=_keep)
