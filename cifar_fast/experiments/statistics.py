"""Intervals, tests and summaries of several runs."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from cifar_fast.shown import hardware

CLOCKS = ("train_seconds", "evaluate_seconds", "total_seconds")


# --- intervals ---


def wilson_interval(k: float, n: int) -> tuple[float, float]:
    """Return the 95 % interval of the share k/n; unlike k/n +- 1.96 standard errors it stays within 0 ... 1.

    Source: E. B. Wilson, "Probable inference, the law of succession, and statistical inference", 1927.
    """
    if not 0 <= k <= n or n == 0:
        raise ValueError(f"k={k} of n={n} is not a share")
    z = statistics.NormalDist().inv_cdf(0.975)
    share, scale = k / n, 1 + z**2 / n
    centre = (share + z**2 / (2 * n)) / scale
    half_width = z / scale * math.sqrt(share * (1 - share) / n + z**2 / (4 * n**2))
    # At the ends the exact values are 0 and 1, which rounding would miss.
    return (0.0 if k == 0 else centre - half_width), (1.0 if k == n else centre + half_width)


def student_t_quantile(degrees_of_freedom: int, probability: float = 0.95) -> float:
    """Return the t with P(|T| < t) = `probability` for Student's distribution.

    For whole degrees of freedom that probability is a finite sum in sines and cosines of the angle
    atan(t / sqrt(degrees of freedom)) (Abramowitz and Stegun, 26.7.3 and 26.7.4). It rises with the angle, so bisection
    finds it.
    """
    if degrees_of_freedom < 1:
        raise ValueError(f"degrees_of_freedom={degrees_of_freedom} must be at least 1")
    low, high = 0.0, math.pi / 2
    while low < (middle := (low + high) / 2) < high:
        if _probability_within(middle, degrees_of_freedom) < probability:
            low = middle
        else:
            high = middle
    return math.sqrt(degrees_of_freedom) * math.tan(high)


def _probability_within(angle: float, degrees_of_freedom: int) -> float:
    """Return P(|T| < t) where t = sqrt(degrees of freedom) * tan(angle)."""
    sine, cosine = math.sin(angle), math.cos(angle)
    odd = degrees_of_freedom % 2
    term = cosine if odd else 1.0
    total = 0.0
    for i in range(degrees_of_freedom // 2):
        total += term
        term *= cosine**2 * ((2 * i + 2) / (2 * i + 3) if odd else (2 * i + 1) / (2 * i + 2))
    return 2 / math.pi * (angle + sine * total) if odd else sine * total


def mean_interval(values: Sequence[float]) -> tuple[float, float] | None:
    """Return the 95 % interval (Student's t) of the mean of independent values; None for fewer than 2."""
    if len(values) < 2:
        return None
    half_width = student_t_quantile(len(values) - 1) * statistics.stdev(values) / math.sqrt(len(values))
    mean = statistics.fmean(values)
    return mean - half_width, mean + half_width


def anytime_t_bound(n: int, *, error: float = 0.05) -> float:
    """Return the |t| of `n` values beyond which a mean differs from zero, however often one has looked before.

    The probability that independent normal values with mean zero ever exceed it, at any n, is at most `error`, whatever
    their standard deviation. The bound comes from the ratio of two likelihoods of the t statistic: that of a mean of
    N(0, 1) standard deviations, over that of a mean of zero. With k = 1 + n it is

        k**(-1/2) * ((1 + t**2 / (n - 1)) / (1 + t**2 / (k * (n - 1))))**(n / 2).

    Where the mean is zero this ratio is a martingale that starts at 1, and by Ville's inequality it ever reaches
    1 / error with a probability of at most `error`. Solved for t, that is the bound; it is infinite while
    there are too few values for any t to decide (up to 4 at 5 %).

    Sources: H. Wang and A. Ramdas, "Anytime-valid t-tests and confidence sequences for Gaussian means with unknown
    variance", 2024 (arXiv:2310.03722), the Gaussian mixture in the scale-invariant filtration; the same ratio is the
    test of J. N. Rouder et al., "Bayesian t tests", 2009, with a normal prior.
    """
    if n < 1:
        raise ValueError(f"n={n} must be at least 1")
    k = 1 + n
    ratio = (math.sqrt(k) / error) ** (2 / n)
    return math.sqrt((n - 1) * (ratio - 1) / (1 - ratio / k)) if ratio < k else math.inf


def anytime_interval(values: Sequence[float], *, least_deviation: float = 0.0) -> tuple[float, float] | None:
    """Return a 95 % interval of the mean that stays valid however often one looks and whenever one stops.

    The interval of `anytime_t_bound`: the probability that any of the intervals of a growing series misses the mean is
    at most 5 %. None while it is unbounded.

    `least_deviation` replaces the values' standard deviation where that is smaller. For values that come in steps, as
    accuracies do, it is the step, so that equal values do not pass for an exact mean.
    """
    if not values or math.isinf(bound := anytime_t_bound(len(values))):
        return None
    deviation = max(statistics.stdev(values), least_deviation)
    mean, half_width = statistics.fmean(values), bound * deviation / math.sqrt(len(values))
    return mean - half_width, mean + half_width


def sign_test(differences: Sequence[float]) -> float:
    """Return the two-sided p value of the exact sign test that differences are as often above zero as below.

    Zeros do not count.
    """
    above, below = sum(value > 0 for value in differences), sum(value < 0 for value in differences)
    n = above + below
    tail = sum(math.comb(n, k) for k in range(min(above, below) + 1)) / 2**n
    return min(1.0, 2 * tail)


def excludes(values: Sequence[float], target: float) -> bool:
    """Return whether there are at least 3 values and the 95 % interval of their mean excludes the target.

    Asked after every run, this is wrong more often than 1 time in 20: it is a reason to stop, not a test. For a test
    that can be asked after every run see `anytime_interval`.
    """
    interval = mean_interval(values)
    return interval is not None and len(values) >= 3 and not interval[0] <= target <= interval[1]


def reaches(accuracy: float, target: float) -> bool:
    """Return whether an accuracy is at least the target, up to rounding."""
    return accuracy >= target - 1e-9


# --- summaries ---


def summarise(runs: Sequence[Mapping[str, Any]], target: float) -> dict[str, Any]:
    """Return the summary of `runs` (at least one line of results.jsonl) as plain values, ready for JSON.

    Shares, accuracies and `target` are 0 ... 1, clocks are in seconds, and `..._95` is a 95 % interval, None for one
    run.
    """
    first = runs[0]
    at_target = sum(reaches(run["accuracy"], target) for run in runs)
    return {
        "recipe": first["recipe"]["name"],
        "dataset": first["dataset"],
        "hardware": hardware(first["environment"]),
        "numerics": _different(
            f"{run['environment']['precision']}, {run['environment']['convolution']} convolution" for run in runs
        ),
        "versions": {
            "cifar_fast": _different(run["version"] for run in runs),
            **{name: _different(run["environment"][name] for run in runs) for name in ("torch", "python")},
        },
        "seeds": [run["seed"] for run in runs],
        "n": len(runs),
        "target": target,
        "at_target": at_target,
        "share_at_target": at_target / len(runs),
        "share_at_target_95": list(wilson_interval(at_target, len(runs))),
        **{figure: spread([run[figure] for run in runs]) for figure in ("accuracy", *CLOCKS)},
    }


def spread(values: Sequence[float]) -> dict[str, Any]:
    """Return min, median, mean with its 95 % interval, and max of at least one value."""
    interval = mean_interval(values)
    return {
        "min": min(values),
        "median": statistics.median(values),
        "mean": statistics.fmean(values),
        "mean_95": None if interval is None else list(interval),
        "max": max(values),
    }


def _different(values: Iterable[str]) -> str:
    """Return the distinct values in their order."""
    return " / ".join(dict.fromkeys(values))


def speeds(seconds: Mapping[str, Sequence[float]]) -> dict[str, list[float]]:
    """Return how many times as fast as the first way each way was, in each round of what `in_turns` measured."""
    first = next(iter(seconds.values()))
    return {name: [a / b for a, b in zip(first, now, strict=True)] for name, now in seconds.items()}
