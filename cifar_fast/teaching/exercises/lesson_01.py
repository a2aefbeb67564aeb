"""Exercises of notebook 01: what a clock counts, and what waiting costs."""

from __future__ import annotations

import math
from typing import Any

from cifar_fast.teaching.exercises.checks import exercise, expect_close

EPOCHS = [(10.0, 0.62), (20.0, 0.81), (30.0, 0.79), (40.0, 0.86), (50.0, 0.93)]


@exercise(
    "01.1",
    title="Time to accuracy",
    difficulty=1,
    minutes=5,
    hints=(
        "Go through the epochs in order, and return at the first whose accuracy is at least the target.",
        'After the loop, nothing has reached it: return float("inf").',
    ),
    wrong=(
        lambda epochs, target: min((s for s, a in epochs if a > target), default=math.inf),
        lambda epochs, target: max((s for s, a in epochs if a >= target), default=math.inf),
        lambda epochs, target: next(s for s, a in epochs if a >= target),
    ),
)
def time_to_accuracy(answer: Any) -> None:
    """Check targets that are reached early, exactly, late, and never."""
    for target, seconds in ((0.8, 20.0), (0.81, 20.0), (0.9, 50.0), (0.94, math.inf)):
        expect_close(answer(list(EPOCHS), target), seconds, f"the time to an accuracy of {target}")


@exercise(
    "01.2",
    title="Amdahl's law",
    difficulty=1,
    minutes=5,
    hints=(
        "Let the whole loop take 1 second. How much of it is waiting, and how much is left of the rest?",
        "The new time is waiting + (1 - waiting) / factor, and the old one was 1.",
    ),
    wrong=(
        lambda waiting, factor: factor,
        lambda waiting, factor: 1 / ((1 - waiting) + waiting / factor),
        lambda waiting, factor: waiting + (1 - waiting) / factor,
    ),
)
def speed_up(answer: Any) -> None:
    """Check some shares and factors, among them no waiting and nothing but waiting."""
    for waiting, factor in ((0.0, 10.0), (0.5, 10.0), (0.2, 4.0), (1.0, 100.0)):
        wanted = 1 / (waiting + (1 - waiting) / factor)
        expect_close(answer(waiting, factor), wanted, f"the speed-up for waiting={waiting:g} and factor={factor:g}")


@exercise(
    "01.3",
    title="A loader that works ahead",
    difficulty=2,
    minutes=15,
    hints=(
        "Keep two times while you go through the batches: when this batch is ready, and when the last one was done.",
        "The loader never pauses: batch i is ready after the sum of waiting[0] to waiting[i].",
        "Training on batch i starts at max(ready, done) and takes computing[i].",
    ),
    wrong=(
        lambda waiting, computing: sum(waiting) + sum(computing),
        lambda waiting, computing: max(sum(waiting), sum(computing)),
        lambda waiting, computing: sum(max(w, c) for w, c in zip(waiting, computing, strict=True)),
    ),
)
def overlapped_seconds(answer: Any) -> None:
    """Check a slow loader, a slow network, and batches of which one is slow."""
    for waiting, computing, seconds in (
        ([2.0, 2.0, 2.0], [1.0, 1.0, 1.0], 7.0),
        ([1.0, 1.0, 1.0], [2.0, 2.0, 2.0], 7.0),
        ([1.0, 5.0, 1.0, 1.0], [3.0, 1.0, 1.0, 4.0], 12.0),
    ):
        expect_close(
            answer(list(waiting), list(computing)), seconds, f"the time for waiting={waiting}, computing={computing}"
        )
