"""Simulates how often `cifar_fast.compare` is wrong, and how many pairs of runs it needs.

    python benchmarks/compare_error.py --out benchmarks/results/compare

The script takes seconds and writes compare_error.json with three parts. `error`: the share of 10,000 comparisons of
equal arms that ever report a difference, checked after every pair, for normal differences and for others that break the
assumption. `runs_needed`: the pairs until the comparison stops, for differences in points and the standard deviation of
saved pairs. `methods`: the same for group-sequential boundaries, calibrated for a known largest number of pairs, and
for an ordinary interval.
"""

import argparse
import json
import math
from collections.abc import Callable
from pathlib import Path
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray
from revision import commit

from cifar_fast.experiments.power import decide, saved_deviation, simulate
from cifar_fast.experiments.statistics import anytime_t_bound, student_t_quantile, wilson_interval

EXPERIMENTS = 10_000
LOOKS = (30, 50, 200)
"""Numbers of pairs up to which equal arms are compared."""
IMAGE = 0.01
"""One of 10,000 test images, in points."""
LARGEST = 30
"""The number of pairs for which group-sequential boundaries are calibrated."""
EFFECTS = (2.0, 1.5, 1.0, 0.75, 0.5)
"""True differences in standard deviations of a pair."""
FAMILY = {"O'Brien-Fleming": 0.0, "Wang-Tsiatis 0.25": 0.25, "Pocock": 0.5}
"""Group-sequential designs by the exponent of their boundaries (S. K. Wang and A. A. Tsiatis, 1987)."""

Draw = Callable[[np.random.Generator, tuple[int, int]], NDArray[np.float64]]
NULLS: dict[str, Draw] = {
    "normal": lambda random, shape: random.standard_normal(shape),
    "Student's t, 5 degrees of freedom": lambda random, shape: random.standard_t(5, shape),
    "skewed: exponential": lambda random, shape: random.standard_exponential(shape) - 1,
    "whole test images, standard deviation 19": lambda random, shape: np.round(19 * random.standard_normal(shape)),
    "whole test images, standard deviation 1": lambda random, shape: np.round(random.standard_normal(shape)),
}
"""Differences of equal arms, with mean zero; "whole test images" are counted in images."""


def error() -> dict[str, dict[str, object]]:
    """Return, for each kind of difference, how often equal arms are ever reported as different."""
    found: dict[str, dict[str, object]] = {}
    for name, draw in NULLS.items():
        differences = draw(np.random.default_rng(1), (EXPERIMENTS, max(LOOKS)))
        least = 1.0 if name.startswith("whole") else 0.0
        found[name] = {}
        for looks in LOOKS:
            wrong = int((decide(differences[:, :looks], 0.0, least)[1] != 0).sum())
            share, interval = wrong / EXPERIMENTS, wilson_interval(wrong, EXPERIMENTS)
            found[name][f"up to {looks} pairs"] = {"share": share, "share_95": list(interval)}
    return found


def runs_needed(deviation: float) -> dict[str, object]:
    """Return how many pairs each difference takes when the comparison goes on until its interval excludes zero."""
    needed: dict[str, object] = {}
    for difference in (1.0, 0.5, 0.3, 0.2, 0.1):
        options = {"resolution": 0.0, "max_runs": 400, "least_deviation": IMAGE, "experiments": EXPERIMENTS}
        pairs, signs = simulate(difference, deviation, **options)
        needed[f"{difference:g} points"] = {
            "median": int(np.quantile(pairs, 0.5, method="higher")),
            "quantile_80": int(np.quantile(pairs, 0.8, method="higher")),
            "quantile_95": int(np.quantile(pairs, 0.95, method="higher")),
            "found_within_30": float(((pairs <= 30) & (signs == 1)).mean()),
            "wrong_sign": float((signs == -1).mean()),
            "pairs": {str(n): int(count) for n, count in zip(*np.unique(pairs, return_counts=True), strict=True)},
        }
    return needed


# --- other methods ---


def t_statistics(differences: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return |t| after 2, 3, ... pairs of each experiment."""
    count = np.arange(1, differences.shape[1] + 1)
    mean = differences.cumsum(axis=1) / count
    squares = (differences**2).cumsum(axis=1) - count * mean**2
    count, mean, squares = count[1:], mean[:, 1:], squares[:, 1:]
    return np.abs(mean) / np.sqrt(squares / (count - 1) / count)


def group_sequential(exponent: float, null: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the bounds on |t| after 2, 3, ... pairs whose error over all looks at `null`, |t| of equal arms, is 5 %.

    The bounds of a normal statistic, scale * (pairs / most) ** (exponent - 1/2), become bounds of t with the same
    tails. The first look is after the third pair.
    """
    most = null.shape[1] + 1

    def bounds(scale: float) -> NDArray[np.float64]:
        t = [math.inf]
        for pairs in range(3, most + 1):
            within = 1 - 2 * NormalDist().cdf(-scale * (pairs / most) ** (exponent - 0.5))
            t.append(student_t_quantile(pairs - 1, within) if within < 1 - 1e-13 else math.inf)
        return np.array(t)

    low, high = 1.5, 6.0
    for _ in range(16):
        middle = (low + high) / 2
        low, high = (middle, high) if (null > bounds(middle)).any(axis=1).mean() > 0.05 else (low, middle)
    return bounds(high)


def methods() -> dict[str, object]:
    """Return for each method its error within `LARGEST` pairs, and the pairs and the power for each effect."""
    shape = (EXPERIMENTS, LARGEST)
    calibration = t_statistics(np.random.default_rng(2).standard_normal((5 * EXPERIMENTS, LARGEST)))
    counts = range(2, LARGEST + 1)
    all_bounds = {"compare": np.array([anytime_t_bound(n) for n in counts])}
    for name, exponent in FAMILY.items():
        all_bounds[name] = group_sequential(exponent, calibration)
    all_bounds["ordinary 95 % interval, from 3 pairs on"] = np.array(
        [math.inf, *(student_t_quantile(n - 1) for n in counts[1:])]
    )
    noise = np.random.default_rng(3).standard_normal(shape)
    found: dict[str, object] = {}
    for name, bounds in all_bounds.items():
        of_method: dict[str, object] = {"error": float((t_statistics(noise) > bounds).any(axis=1).mean())}
        for effect in EFFECTS:
            beyond = t_statistics(noise + effect) > bounds
            pairs = np.where(beyond.any(axis=1), beyond.argmax(axis=1) + 2, LARGEST)
            of_method[f"{effect:g} standard deviations"] = {
                "median": int(np.quantile(pairs, 0.5, method="higher")),
                "quantile_80": int(np.quantile(pairs, 0.8, method="higher")),
                "found": float(beyond.any(axis=1).mean()),
            }
        found[name] = of_method
    return found


def main() -> None:
    """Simulate and save."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, required=True)
    out = parser.parse_args().out
    out.mkdir(parents=True, exist_ok=True)
    deviation, pairs = saved_deviation()
    report = {
        "commit": commit(),
        "experiments": EXPERIMENTS,
        "error": error(),
        "deviation": {"points": deviation, "saved_pairs": pairs, "from": "ablation, laptop on CIFAR-10"},
        "runs_needed": runs_needed(deviation),
        "methods": {"most_pairs": LARGEST, **methods()},
    }
    (out / "compare_error.json").write_text(json.dumps(report, indent=2) + "\n")
    print(json.dumps(report, indent=2))


if __name__ == "__main__":
    main()
