"""What this machine has: its devices, its processor, its memory."""

from __future__ import annotations

import ctypes
import os
import platform
import sys
from functools import cache
from typing import Any

import psutil
import torch

from cifar_fast.errors import UserError

OTHER_GPUS = {"mps": "Apple GPU", "xpu": "Intel GPU"}
"""GPUs that are used only when they are asked for, since nobody has measured this package on them."""


def select_device(name: str | None = None) -> torch.device:
    """Return the device called `name`; by default a CUDA GPU, or the CPU where torch can use none.

    Raises `UserError` for a device that this machine lacks, or that this package does not support.
    """
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise UserError(
            f"device {name!r} is not known; use cpu, cuda (cuda:0 for one GPU of several), mps or xpu"
        ) from error
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UserError(
            f"device {name!r} is not there: torch can use {torch.cuda.device_count()} GPUs on this machine; try cpu"
        )
    if device.type not in ("cpu", "cuda", *OTHER_GPUS):
        raise UserError(f"device {name!r} is not supported; use cpu, cuda, mps or xpu")
    if device.type in OTHER_GPUS and (device.index or 0) >= count_other_gpus(device.type):
        raise UserError(f"device {name!r} is not there: {why_no_other_gpu(device.type)}; use cpu or cuda")
    return device


def count_other_gpus(kind: str) -> int:
    """Return how many GPUs of `kind`, a key of `OTHER_GPUS`, torch can use."""
    if kind == "xpu":
        return torch.xpu.device_count()
    return int(torch.backends.mps.is_available())


def why_no_other_gpu(kind: str) -> str:
    """Return what a GPU of `kind`, a key of `OTHER_GPUS`, needs, for a machine where torch finds none."""
    built = torch.backends.mps.is_built() if kind == "mps" else torch.xpu._is_compiled()
    if not built:
        needs = "a Mac with Apple silicon" if kind == "mps" else "a torch from https://download.pytorch.org/whl/xpu"
        return f"this torch was built without support for {OTHER_GPUS[kind]}s, which needs {needs}"
    needs = "macOS 14 or later on Apple silicon" if kind == "mps" else "an Intel GPU and its driver"
    return f"torch finds none: it needs {needs}"


def has_float64(device: torch.device) -> bool:
    """Say whether every device of this type computes in float64."""
    return device.type not in OTHER_GPUS


@cache
def keep_freed_memory() -> None:
    """Tell glibc to keep large freed blocks instead of returning them to the system.

    Each training step then reuses the pages of the previous one, and the system need not hand out new zeroed ones. Does
    nothing where the C library has no `mallopt`.
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
    """Return the processor's name as the system reports it."""
    try:
        with open("/proc/cpuinfo") as lines:
            return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def cores() -> int:
    """Return how many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def environment(device: torch.device) -> dict[str, Any]:
    """Return the hardware and the versions behind a result, as plain values."""
    return {
        "device": device.type,
        "gpu": gpu_name(device),
        "cpu": cpu_name(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability()
        + (" + AMX" if torch.cpu._is_amx_tile_supported() else ""),
        "cores": cores(),
        "threads": torch.get_num_threads(),
        "memory_gb": round(psutil.virtual_memory().total / 1e9, 1),
        "platform": platform.platform(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda if device.type == "cuda" else None,
    }


def gpu_name(device: torch.device) -> str | None:
    """Return the name of a GPU; None for the CPU."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    if device.type == "xpu":
        return torch.xpu.get_device_name(device)
    return f"{OTHER_GPUS['mps']} of {cpu_name()}" if device.type == "mps" else None
