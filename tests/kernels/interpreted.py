"""Runs the Triton kernels in Triton's interpreter beside PyTorch in double precision; prints how far apart they are.

Triton chooses its interpreter when it is imported, so this is a process of its own, with TRITON_INTERPRET=1. The output
is JSON: for each case, the largest relative error of each result.
"""

from __future__ import annotations

import itertools
import json
import sys
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

import cifar_fast.training.model  # noqa: F401  # everything that uses the kernels

TRITON_CAME_WITH_IT = "triton" in sys.modules
from cifar_fast.kernels import fused_triton  # noqa: E402

FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "silu": F.silu,
    "gelu": F.gelu,
    "celu": lambda t: F.celu(t, 0.3),
}
SHAPES = [(1, 5, 21, 7, 6), (4, 2, 20, 5, 5), (3, 1, 16, 6, 8)]
"""Groups, images in a group, channels, height, width."""
EPS = 1e-3


def images(*shape: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    """Return channels-last images whose channels have means far from 0, which a careless variance would drown in."""
    generator = torch.Generator().manual_seed(seed)
    x = 2 * torch.randn(shape, generator=generator) + 20 * torch.randn(1, shape[1], 1, 1, generator=generator)
    return x.to(dtype).contiguous(memory_format=torch.channels_last)


def reference(x: Tensor, weight: Tensor, bias: Tensor, activation: str, group_size: int, pool: bool) -> tuple:
    """Return y, and mean and unbiased variance averaged over the groups, from torch's own layers."""
    if pool:
        x = F.max_pool2d(x, 2)
    mean, variance = torch.zeros(2, x.shape[1], dtype=x.dtype)
    normalised = []
    parts = x.split(group_size)
    for part in parts:
        m, v = torch.zeros(2, x.shape[1], dtype=x.dtype)
        normalised.append(F.batch_norm(part, m, v, weight, bias, training=True, momentum=1.0, eps=EPS))
        mean, variance = mean + m / len(parts), variance + v / len(parts)
    return FUNCTIONS[activation](torch.cat(normalised)), mean, variance


def relative_error(a: Tensor, b: Tensor) -> float:
    assert a.shape == b.shape
    return ((a.double() - b).abs().max() / b.abs().max().clamp(min=0.1)).item()


def errors(x: Tensor, activation: str, group_size: int, pool: bool) -> dict[str, float]:
    """Return the relative error of each result of the kernels."""
    sums = torch.float64 if x.dtype == torch.float64 else torch.float32
    channels, (height, width) = x.shape[1], x.shape[2:]
    weight, bias = torch.linspace(0.5, 2, channels, dtype=sums), torch.linspace(-2, 2, channels, dtype=sums)
    y, pooled, winner, mean, variance, statistics = fused_triton.forward(
        x, weight, bias, activation, 0.3, group_size, EPS, pool
    )
    dy = images(*y.shape, dtype=x.dtype, seed=1)
    values = pooled if pool else x
    dx, (db, dw) = fused_triton.backward(
        dy, values, winner, mean, variance, weight, bias, activation, 0.3, EPS, height, width
    )
    assert y.is_contiguous(memory_format=torch.channels_last) and dx.is_contiguous(memory_format=torch.channels_last)
    assert y.dtype == dx.dtype == x.dtype
    inputs = [each.double().requires_grad_() for each in (x, weight, bias)]
    expected, *moved = reference(*inputs, activation, group_size, pool)
    gradients = torch.autograd.grad(expected, inputs, dy.double())
    pairs = {
        "y": (y, expected),
        "mean": (statistics[0], moved[0]),
        "variance": (statistics[1], moved[1]),
        "dx": (dx, gradients[0]),
        "dw": (dw, gradients[1]),
        "db": (db, gradients[2]),
    }
    return {name: relative_error(a.detach(), b.detach()) for name, (a, b) in pairs.items()}


def ties() -> dict[str, float]:
    """Return the errors for images of few different values, in whose windows the maximum is often there twice."""
    x = images(4, 20, 6, 7, dtype=torch.float64).sign() * 2
    return errors(x, "silu", 2, True)


def main() -> None:
    found: dict[str, object] = {"imported before it is needed": TRITON_CAME_WITH_IT}
    # Small tiles make small images need several, and so every loop runs more than once.
    for name, size in {"ROWS": 32, "CHANNELS": 16, "PARTS": 2, "FEW_CHANNELS": 8, "GROUPS": 2, "PROGRAMS": 4}.items():
        setattr(fused_triton, name, size)
    for (activation, pool), shape in zip(itertools.product(FUNCTIONS, (False, True)), itertools.cycle(SHAPES)):
        groups, group_size, *image = shape
        x = images(groups * group_size, *image, dtype=torch.float32)
        found[f"{activation}, {'pooled' if pool else 'not pooled'}"] = errors(x, activation, group_size, pool)
    for dtype in (torch.float16, torch.bfloat16):
        found[str(dtype)] = errors(images(6, 20, 6, 4, dtype=dtype), "silu", 3, True)
    found["ties"] = ties()
    print(json.dumps(found))


if __name__ == "__main__":
    main()
