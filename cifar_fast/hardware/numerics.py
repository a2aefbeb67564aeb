"""Which number format and which convolution algorithm are fastest on this machine."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache, partial

import torch
import torch.nn.functional as F
from torch import Tensor

from cifar_fast.kernels import amx, fused, winograd
from cifar_fast.recipe import Recipe

DTYPES = {"float64": torch.float64, "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


HALF = (torch.float16, torch.bfloat16)


WAYS = ("float32 winograd", "float32 direct", "bfloat16 direct", "bfloat16 amx")
"""The ways to compute a convolution on a CPU: precision and algorithm, in a recipe's words."""

CLEARLY = 1.25
"""How many times faster than the one before it in `WAYS` a way must be measured to be taken instead."""


@dataclass(frozen=True)
class Numerics:
    """How the convolutions are computed on a device, and why, and whether norms and activations are at once."""

    dtype: torch.dtype
    convolution: str
    reason: str
    fuse_norm: bool = False

    def describe(self) -> dict[str, str]:
        """Return them as plain words, for results."""
        return {
            "precision": str(self.dtype).removeprefix("torch."),
            "convolution": self.convolution,
            "numerics_reason": self.reason,
            "norm_and_activation": "at once" if self.fuse_norm else "apart",
        }


def choose_numerics(recipe: Recipe, device: torch.device) -> Numerics:
    """Return how `device` computes the recipe: precision, convolution, and whether norm and activation are at once."""
    numerics = choose_precision_and_convolution(recipe, device)
    fuse_norm = recipe.fuse_norm and device.type == "cpu" and numerics.dtype in fused.DTYPES and fused.available()[0]
    return replace(numerics, fuse_norm=fuse_norm)


def choose_precision_and_convolution(recipe: Recipe, device: torch.device) -> Numerics:
    """Return the recipe's precision and convolution on `device`; what it leaves to `auto` is measured on a CPU.

    A precision or a convolution that the device lacks falls back to one that it has, and the reason says so.
    """
    if recipe.precision == "float64":
        return Numerics(torch.float64, "direct", "asked for by the recipe: everything, not the convolutions alone")
    if device.type == "cuda":
        return _cuda_numerics(recipe, device)
    if recipe.precision == "float16":
        return Numerics(torch.float32, "direct", "CPUs have no fast backward pass in float16: float32 instead")
    ways = [way for way in WAYS if recipe.precision in ("auto", way.split()[0]) and can_convolve(way.split()[1])[0]]
    asked = [way for way in ways if recipe.convolution in ("auto", way.split()[1])]
    if not asked:
        can, detail = can_convolve(recipe.convolution)
        if can:
            formats = " and ".join(way.split()[0] for way in WAYS if way.split()[1] == recipe.convolution)
            detail = f"it computes in {formats} alone"
        direct = next(way for way in ways if way.split()[1] == "direct")
        return _way(direct, f"no {recipe.convolution} convolution here: {detail}; direct instead")
    if len(asked) == 1:
        return _way(asked[0], "the only way that the recipe leaves on this machine")
    rates = convolution_rates()
    best, *others = [way for way in asked if way in rates]
    for way in others:
        # A clear win or none: the same machine has to choose the same way each time, though its clock is noisy.
        if rates[way] > CLEARLY * rates[best]:
            best = way
    measured = ", ".join(f"{way} {rate:.0f}" for way, rate in rates.items())
    return _way(best, f"measured on this CPU, in GFLOP/s of direct convolution: {measured}")


def _way(way: str, reason: str) -> Numerics:
    precision, convolution = way.split()
    return Numerics(DTYPES[precision], convolution, reason)


def can_convolve(convolution: str) -> tuple[bool, str]:
    """Say whether this machine can compute a 3x3 convolution so, and else why not."""
    if convolution == "direct":
        return True, "torch's own"
    return winograd.available() if convolution == "winograd" else amx.available()


def _cuda_numerics(recipe: Recipe, device: torch.device) -> Numerics:
    has_bf16 = torch.cuda.get_device_capability(device) >= (8, 0)
    if recipe.precision == "bfloat16" and not has_bf16:
        return Numerics(
            torch.float16,
            "direct",
            "this GPU has no bfloat16 arithmetic (compute capability below 8.0): float16 instead",
        )
    if recipe.precision != "auto":
        return Numerics(DTYPES[recipe.precision], "direct", "asked for by the recipe")
    return Numerics(
        torch.float16, "direct", "half precision on the GPU's matrix units, with three bits more than bfloat16"
    )


@cache
def convolution_rates() -> dict[str, float]:
    """Measure this CPU, in about a second: GFLOP/s of one typical convolution, forward and backward, each way.

    Winograd's rate counts the multiplications of the direct algorithm, so that rates compare as speeds do. The ways
    take turns and the best time of each counts, so that another process in between disturbs them alike. Two turns on
    few images come first: a way that takes four times as long as another, as bfloat16 does where the processor has no
    instructions for it, would take many seconds for all of them, and keeps the rate of these.
    """
    channels, side = 256, 7  # as in the layers where most of the arithmetic is
    weight = torch.randn(channels, channels, 3, 3).contiguous(memory_format=torch.channels_last)
    own: dict[str, Callable[..., Tensor]] = {
        "winograd": winograd.winograd_conv2d,
        "amx": amx.amx_conv2d,
        "direct": partial(F.conv2d, padding=1),
    }
    rates: dict[str, float] = {}
    ways = [way for way in WAYS if can_convolve(way.split()[1])[0]]
    for n_images, turns in ((8, 2), (128, 4)):
        x, dy = (
            torch.randn(n_images, channels, side, side).contiguous(memory_format=torch.channels_last) for _ in "xy"
        )
        best = dict.fromkeys(ways, math.inf)
        for _ in range(turns):
            for way in ways:
                precision, convolution = way.split()
                inputs, filters, gradient = (value.to(DTYPES[precision]) for value in (x, weight, dy))
                start = time.perf_counter()
                y = own[convolution](inputs.requires_grad_(), filters.requires_grad_())
                torch.autograd.grad(y, (inputs, filters), gradient)
                best[way] = min(best[way], time.perf_counter() - start)
        flops = 3 * 2 * n_images * channels**2 * 9 * side**2
        rates |= {way: flops / seconds / 1e9 for way, seconds in best.items()}
        ways = [way for way in ways if best[way] < 4 * min(best.values())]
    return rates
