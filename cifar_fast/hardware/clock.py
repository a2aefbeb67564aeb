"""The clocks, and what each of them counts.

`train_seconds` is DAWNBench's clock: it runs from the first byte sent to the device to the last step. It includes
transfer, preprocessing, whitening and augmentation, and leaves out validation and warm-up. `evaluate_seconds` is the
time of validation. `total_seconds` runs from the start of the command (or of the call) to the trained and evaluated
model, and includes everything: imports, loading, compilation.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import psutil
import torch


def synchronize(device: torch.device) -> None:
    """Wait until `device` has finished all its work, so that a clock read next counts it."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "xpu":
        torch.xpu.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


@dataclass
class Clock:
    """A stopwatch for the seconds spent inside `running`; it synchronises the device at both ends."""

    device: torch.device
    seconds: float = 0.0

    @contextmanager
    def running(self) -> Iterator[None]:
        """Count the time of the `with` block."""
        synchronize(self.device)
        start = time.perf_counter()
        try:
            yield
        finally:
            synchronize(self.device)
            self.seconds += time.perf_counter() - start


def in_turns(
    ways: Mapping[str, Callable[[], object]], *, rounds: int = 5, device: torch.device | None = None
) -> dict[str, list[float]]:
    """Time several ways of doing the same work, which take turns, so that a machine that slows down slows all of them.

    Args:
        ways: each way's name and the call that does the work.
        rounds: how often each way is timed, after one round that does not count.
        device: synchronised at both ends of each call; None is the CPU, which needs no synchronising.

    Returns:
        The seconds of each way, round by round.
    """
    for work in ways.values():
        work()
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(rounds):
        for name, work in ways.items():
            clock = Clock(device or torch.device("cpu"))
            with clock.running():
                work()
            seconds[name].append(clock.seconds)
    return seconds


def process_start() -> float:
    """Return when this process started, in seconds since the epoch, like `time.time`."""
    return psutil.Process().create_time()


def peak_memory(device: torch.device) -> int:
    """Return the most memory that this process has held so far, in bytes: allocated on a GPU, or resident.

    An Apple GPU keeps no such record: there it is what Metal holds now.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if device.type == "xpu":
        return torch.xpu.max_memory_allocated(device)
    if device.type == "mps":
        return torch.mps.driver_allocated_memory()
    if sys.platform == "win32":
        return psutil.Process().memory_info().peak_wset
    import resource  # there is none on Windows

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # bytes there, kilobytes on Linux
