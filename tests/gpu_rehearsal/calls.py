"""What the fake CUDA runtime was asked for."""

from __future__ import annotations

import ctypes
import os
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache

import torch

# In the order of Kind in fakecuda.c.
KINDS = (
    "kernel",
    "memset",
    "copy from pinned memory",
    "copy from pageable memory",
    "copy to the host",
    "copy on the device",
    "synchronisation",
    "graph launch",
    "allocation",
    "pinned allocation",
    "violation",
)
WORK = ("kernel", "memset", "copy on the device")
"""What the device does, and what is a node of a graph."""


@dataclass(frozen=True)
class Call:
    """One thing that was asked of the runtime."""

    kind: str
    name: str
    """Of a kernel: as the linker knows it."""
    capture: int
    """The number of the capture that recorded it, from 1; 0: it was executed."""
    n_bytes: int


@cache
def library() -> ctypes.CDLL:
    """Return the fake runtime that is preloaded into this process."""
    found = ctypes.CDLL(os.environ["LD_PRELOAD"].split(":")[0])
    found.fake_count.restype = ctypes.c_size_t
    for name, type_ in (
        ("fake_kind", ctypes.c_int),
        ("fake_name", ctypes.c_char_p),
        ("fake_capture", ctypes.c_uint64),
        ("fake_bytes", ctypes.c_size_t),
    ):
        function = getattr(found, name)
        function.restype, function.argtypes = type_, [ctypes.c_size_t]
    found.fake_kernel.argtypes = [ctypes.c_char_p, ctypes.c_void_p]
    return found


def n_calls() -> int:
    """Return how much has been asked so far: a mark to read from later."""
    return library().fake_count()


def calls(begin: int = 0, end: int | None = None) -> list[Call]:
    """Return what was asked between two marks, in order."""
    log = library()
    return [
        Call(KINDS[log.fake_kind(i)], log.fake_name(i).decode(), log.fake_capture(i), log.fake_bytes(i))
        for i in range(begin, n_calls() if end is None else end)
    ]


def by_kind(some: Iterable[Call]) -> Counter[str]:
    """Count calls by kind, without those that were only recorded."""
    return Counter(call.kind for call in some if not call.capture)


def launch(name: str) -> None:
    """Launch a kernel on the current stream, as a library does that is not here: it computes nothing."""
    stream = torch._C._cuda_getCurrentRawStream(torch.cuda.current_device())  # a Stream object would cost more
    if library().fake_kernel(name.encode(), stream):
        raise RuntimeError(f"{name}: operation not permitted when stream is capturing")
