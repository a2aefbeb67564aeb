"""What this machine has, and what is fastest on it: device, precision, convolution, memory."""

from __future__ import annotations

import ctypes
import os
import platform
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import psutil
import torch
import torch.nn.functional as F

from cifar_fast import winograd
from cifar_fast.errors import UserError
from cifar_fast.recipe import Recipe

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def select_device(name: str | None = None) -> torch.device:
    """Return the device called `name`, or the first GPU, or the CPU; raise `UserError` for one that is not there."""
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise UserError(f"device {name!r} is not known; use cpu, cuda, or cuda:0 for one GPU of several") from error
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UserError(
            f"device {name!r} is not there: torch can use {torch.cuda.device_count()} GPUs on this machine; try cpu"
        )
    if device.type not in ("cpu", "cuda"):
        raise UserError(f"device {name!r} is not supported; use cpu or cuda")
    return device


@dataclass(frozen=True)
class Numerics:
    """How the convolutions are computed on a device, and why."""

    dtype: torch.dtype
    winograd: bool
    reason: str

    def describe(self) -> dict[str, str]:
        """Return them as plain words, for results."""
        return {
            "precision": str(self.dtype).removeprefix("torch."),
            "convolution": "winograd" if self.winograd else "direct",
            "numerics_reason": self.reason,
        }


def choose_numerics(recipe: Recipe, device: torch.device) -> Numerics:
    """Return the recipe's precision and convolution on `device`; `auto` is decided by measurement on a CPU.

    A precision that the device lacks falls back to the nearest that it has, and the reason says so.
    """
    if device.type == "cuda":
        return _cuda_numerics(recipe, device)
    if recipe.precision == "float16":
        return Numerics(
            torch.float32, False, "float16 is not trained in on CPUs (no fast backward pass): float32 instead"
        )
    wanted = ["bfloat16", "float32"] if recipe.precision == "auto" else [recipe.precision]
    rates = {
        key: rate for key, rate in convolution_rates().items() if key.split()[0] in wanted and _allowed(key, recipe)
    }
    best = max(rates, key=lambda key: rates[key])
    measured = ", ".join(f"{key} {rate:.0f}" for key, rate in rates.items())
    reason = f"measured on this CPU, in GFLOP/s of direct convolution: {measured}"
    if recipe.convolution == "winograd" and not best.endswith("winograd"):
        reason += f"; no Winograd here: {winograd.available()[1]}"
    return Numerics(DTYPES[best.split()[0]], best.endswith("winograd"), reason)


def _allowed(key: str, recipe: Recipe) -> bool:
    if recipe.convolution == "winograd" and recipe.precision != "bfloat16" and winograd.available()[0]:
        return key == "float32 winograd"
    return recipe.convolution != "direct" or key.endswith("direct")


def _cuda_numerics(recipe: Recipe, device: torch.device) -> Numerics:
    has_bf16 = torch.cuda.get_device_capability(device) >= (8, 0)
    if recipe.precision == "bfloat16" and not has_bf16:
        return Numerics(
            torch.float16, False, "this GPU has no bfloat16 arithmetic (compute capability below 8.0): float16 instead"
        )
    if recipe.precision != "auto":
        return Numerics(DTYPES[recipe.precision], False, "asked for by the recipe")
    return Numerics(
        torch.float16, False, "half precision on the GPU's matrix units, with three bits more than bfloat16"
    )


@cache
def convolution_rates() -> dict[str, float]:
    """Measure this CPU, in about a second: GFLOP/s of one typical convolution, forward and backward, in each way to
    compute it.

    Winograd's rate counts the multiplications of the direct algorithm, so that rates compare as speeds do.
    """
    n, channels, side = 64, 128, 14
    flops = 3 * 2 * n * channels**2 * 9 * side**2
    x = torch.randn(n, channels, side, side).contiguous(memory_format=torch.channels_last).requires_grad_()
    weight = torch.randn(channels, channels, 3, 3).requires_grad_()
    ways: dict[str, tuple[torch.dtype, Callable[..., torch.Tensor]]] = {
        "float32 direct": (torch.float32, lambda a, b: F.conv2d(a, b, padding=1)),
        "bfloat16 direct": (torch.bfloat16, lambda a, b: F.conv2d(a, b, padding=1)),
    }
    if winograd.available()[0]:
        ways["float32 winograd"] = (torch.float32, winograd.winograd_conv2d)
    rates = {}
    for key, (dtype, convolve) in ways.items():
        best = float("inf")
        for _ in range(4):
            start = time.perf_counter()
            convolve(x.to(dtype), weight.to(dtype)).sum().backward()
            best = min(best, time.perf_counter() - start)
        rates[key] = flops / best / 1e9
    return rates


@cache
def keep_freed_memory() -> None:
    """Tell glibc to keep large freed blocks instead of handing them back: each step then reuses its pages, and faults
    in none anew.

    Nothing happens where the C library has no `mallopt`.
    """
    if sys.platform != "linux":
        return
    libc = ctypes.CDLL(None)
    if not hasattr(libc, "mallopt"):
        return
    m_trim_threshold, m_top_pad, m_mmap_threshold = -1, -2, -3  # malloc.h
    libc.mallopt(m_mmap_threshold, 1 << 30)
    libc.mallopt(m_trim_threshold, (1 << 31) - 1)
    libc.mallopt(m_top_pad, 64 << 20)


def cpu_name() -> str:
    """Return the processor's name as the system gives it."""
    try:
        with open("/proc/cpuinfo") as lines:
            return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def environment(device: torch.device) -> dict[str, Any]:
    """Return what a result stands on: hardware and versions."""
    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else None
    return {
        "device": device.type,
        "gpu": gpu,
        "cpu": cpu_name(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability()
        + (" + AMX" if torch.cpu._is_amx_tile_supported() else ""),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory_gb": round(psutil.virtual_memory().total / 1e9, 1),
        "platform": platform.platform(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda if gpu else None,
    }
