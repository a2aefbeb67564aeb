"""Checks the exercises of notebook 12: what may be said after n runs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from statistics import fmean, stdev, variance

import torch

from cifar_fast.experiments.statistics import student_t_quantile, wilson_interval
from cifar_fast.teaching.exercises.checks import Wrong, exercise, expect_close

Interval = tuple[float, float]
Wilson = Callable[[float, int], Interval]


def _paired(a: Sequence[float], b: Sequence[float], t: float) -> Interval:
    differences = [y - x for x, y in zip(a, b, strict=True)]
    mean, half_width = fmean(differences), t * stdev(differences) / len(differences) ** 0.5
    return mean - half_width, mean + half_width


def _not_paired(a: Sequence[float], b: Sequence[float], t: float) -> Interval:
    half_width = t * ((variance(a) + variance(b)) / len(a)) ** 0.5
    return fmean(b) - fmean(a) - half_width, fmean(b) - fmean(a) + half_width


@exercise(
    "12.1",
    title="A paired interval",
    difficulty=1,
    minutes=5,
    hints=(
        "First compute one difference for each seed. The interval is that of the mean of these differences.",
        "Use the standard deviation of the differences, with n - 1 in the denominator as torch's .std() has it.",
    ),
    wrong=(_not_paired, lambda a, b, t: _paired(b, a, t)),
)
def paired_interval(answer: Callable[[Sequence[float], Sequence[float], float], Interval]) -> None:
    """Check three pairs whose spread over seeds is much larger than that of their differences."""
    a, b = [93.1, 94.4, 93.8], [93.4, 94.6, 94.2]
    for first, second in ((a, b), ([1.0, 2.0, 3.0, 5.0], [1.5, 2.0, 2.0, 5.5])):
        t = student_t_quantile(len(first) - 1)
        low, high = answer(first, second, t)
        wanted = _paired(first, second, t)
        expect_close(low, wanted[0], f"the lower end for a = {first} and b = {second}", rtol=1e-3, atol=1e-3)
        expect_close(high, wanted[1], f"the upper end for a = {first} and b = {second}", rtol=1e-3, atol=1e-3)


def _fewest(share: float, width: float, wilson: Wilson) -> int:
    n = 1
    while True:
        low, high = wilson(share * n, n)
        if high - low <= width:
            return n
        n += 1


@exercise(
    "12.2",
    title="Runs for a width",
    difficulty=2,
    minutes=10,
    hints=(
        "Try n = 1, 2, 3, ... and return the first one whose interval is narrow enough.",
        "low, high = wilson(share * n, n); stop when high - low <= width. Half the width takes four times the runs.",
    ),
    wrong=(
        lambda share, width, wilson: _fewest(share, 2 * width, wilson),
        lambda share, width, wilson: round(4 * 1.96**2 * share * (1 - share) / width**2),
    ),
)
def runs_for_width(answer: Callable[[float, float, Wilson], int]) -> None:
    """Check several shares and widths."""
    for share, width in ((0.82, 0.1), (0.82, 0.2), (1.0, 0.1)):
        wanted = _fewest(share, width, wilson_interval)
        expect_close(answer(share, width, wilson_interval), wanted, f"the runs for share={share} and width={width}")


EXPERIMENTS = 40_000


def _seen(difference: float, deviation: float, pairs: int, t: float) -> float:
    noise = torch.randn(EXPERIMENTS, pairs, generator=torch.Generator().manual_seed(1))
    found = difference + deviation * noise
    return (found.mean(1).abs() > t * found.std(1) / pairs**0.5).double().mean().item()


@exercise(
    "12.3",
    title="A difference that you will see",
    difficulty=3,
    minutes=15,
    hints=(
        "First compute the share of experiments that find a given difference, as seen does. Then look for the "
        "difference where that share is 0.8.",
        "The share rises with the difference, so halve an interval: begin with 0 and 10 * deviation, and keep the half "
        "where the share passes 0.8. Use the same noise each time.",
    ),
    wrong=(
        lambda deviation, pairs, t: t * deviation / pairs**0.5,
        lambda deviation, pairs, t: (t + 0.84) * deviation / pairs**0.5,
    ),
)
def visible_difference(answer: Callable[[float, int, float], float]) -> None:
    """Check that the difference is seen in 80 % of experiments."""
    for deviation, pairs in ((0.2, 3), (0.2, 10), (1.0, 3)):
        t = student_t_quantile(pairs - 1)
        found = float(answer(deviation, pairs, t))
        if _seen(0.97 * found, deviation, pairs, t) <= 0.8 <= _seen(1.03 * found, deviation, pairs, t):
            continue
        share = _seen(found, deviation, pairs, t)
        raise Wrong(
            f"with a deviation of {deviation} and {pairs} pairs, a difference of {found:.3g} is seen in {share:.0%} of "
            "experiments, not in 80%"
        )
