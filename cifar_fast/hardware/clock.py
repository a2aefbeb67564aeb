"""The clocks, and what each of them counts.

`train_seconds` is DAWNBench's: from the first byte sent to the device to the last step; transfer, preprocessing,
whitening and augmentation included, validation and warm-up left out. `evaluate_seconds` is the validation.
`total_seconds` runs from the start of the command (or of the call) to the trained and evaluated model: imports,
loading, compilation, everything.
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
    """Wait until `device` has done all it was told to do, so that a clock read next is true."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@dataclass
class Clock:
    """A stopwatch that counts the seconds spent inside `running`, with the device synchronised at both ends."""

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
    """Return the seconds that each way of doing the same work took, round by round.

    The ways take turns, so that a machine which slows down slows all of them; a round before the first does not count.
    `device` is synchronised at both ends of each call; None: the CPU, which needs no waiting for.
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
    """Return when this process was started, in seconds since the epoch, as `time.time` counts."""
    return psutil.Process().create_time()


def peak_memory(device: torch.device) -> int:
    """Return the largest memory that this process has had so far, in bytes: allocated on a GPU, or resident."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if sys.platform == "win32":
        return psutil.Process().memory_info().peak_wset
    import resource  # there is none on Windows

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # bytes there, kilobytes on Linux
