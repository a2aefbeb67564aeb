"""A clock counts what happens while it runs, and nothing else."""

from __future__ import annotations

import time
from types import SimpleNamespace

import pytest
import torch

from cifar_fast.hardware import clock as timing
from cifar_fast.hardware.clock import Clock, process_start, synchronize


@pytest.fixture
def hand(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The time as `timing` reads it, which only the test moves."""
    now = [100.0]
    monkeypatch.setattr(timing, "time", SimpleNamespace(perf_counter=lambda: now[0]))
    return now


def test_a_clock_adds_up_the_time_inside_and_leaves_out_the_rest(hand: list[float]) -> None:
    clock = Clock(torch.device("cpu"))
    with clock.running():
        hand[0] += 3
    hand[0] += 1000
    with clock.running():
        hand[0] += 4
    assert clock.seconds == 7


def test_a_clock_counts_what_went_wrong_too(hand: list[float]) -> None:
    clock = Clock(torch.device("cpu"))
    with pytest.raises(KeyError), clock.running():
        hand[0] += 3
        raise KeyError
    assert clock.seconds == 3


def test_a_clock_reads_only_once_the_device_has_finished(hand: list[float], monkeypatch: pytest.MonkeyPatch) -> None:
    waits = iter([10.0, 2.0])  # before the start: work of others, not counted; before the end: ours

    def wait(device: torch.device) -> None:
        hand[0] += next(waits)

    monkeypatch.setattr(timing, "synchronize", wait)
    clock = Clock(torch.device("cpu"))
    with clock.running():
        hand[0] += 1
    assert clock.seconds == 3


def test_a_cpu_needs_no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    waited = []
    monkeypatch.setattr(torch.cuda, "synchronize", waited.append)
    synchronize(torch.device("cpu"))
    assert waited == []
    synchronize(torch.device("cuda", 0))
    assert waited == [torch.device("cuda", 0)]


def test_process_start_is_a_fixed_moment_before_now() -> None:
    assert process_start() == process_start() < time.time()


def test_ways_take_turns_after_a_round_that_does_not_count(hand: list[float]) -> None:
    called: list[str] = []

    def work(name: str, seconds: list[float]) -> None:
        called.append(name)
        hand[0] += seconds.pop(0)

    slow, fast = [100.0, 6.0, 8.0], [50.0, 3.0, 2.0]
    ways = {"slow": lambda: work("slow", slow), "fast": lambda: work("fast", fast)}
    seconds = timing.in_turns(ways, rounds=2)
    assert called == ["slow", "fast"] * 3
    assert seconds == {"slow": [6, 8], "fast": [3, 2]}
