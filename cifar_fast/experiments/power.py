"""Says, before a comparison starts, how many pairs of runs it will need and how long that takes, by simulating it."""

from __future__ import annotations

import html
import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from statistics import variance

import numpy as np
import torch
from numpy.typing import NDArray

from cifar_fast.data.dataset import Dataset
from cifar_fast.experiments.ablation import AS_IT_IS
from cifar_fast.experiments.all_reduce import published_link
from cifar_fast.experiments.forecast import about, forecast
from cifar_fast.experiments.plan import predict
from cifar_fast.experiments.saved import saved_runs
from cifar_fast.experiments.statistics import anytime_t_bound
from cifar_fast.experiments.step_costs import measure_step
from cifar_fast.hardware.device import select_device
from cifar_fast.recipe import Recipe
from cifar_fast.shown import html_table, table
from cifar_fast.training.tricks import NO_TRICKS, Tricks

DIFFERENCES = (1.0, 0.5, 0.3, 0.2, 0.1, 0.0)
"""True differences in accuracy, in points, that a table of runs needed shows."""
EXPERIMENTS = 2000
"""Simulated comparisons of each difference."""
SAME_NETWORK = "tta="
"""Start of the names of saved arms that evaluate another arm's networks: their differences are too alike."""

# --- the simulation ---


def decide(
    differences: NDArray[np.float64], resolution: float, least_deviation: float = 0.0
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Apply the stopping rule of `compare` to many series of differences.

    Args:
        differences: (experiments, pairs), in points.
        resolution: stop when the interval is narrower than this, in points.
        least_deviation: as for `anytime_interval`.

    Returns:
        The number of pairs at which each experiment stops, at most all of them, and the sign of the difference that it
        has found: 1, -1, or 0 if it found none.
    """
    count = np.arange(1, differences.shape[1] + 1)
    mean = differences.cumsum(axis=1) / count
    # Relative to the first difference, so that rounding cannot make a variance of equal values look large.
    shifted = differences - differences[:, :1]
    squares = (shifted**2).cumsum(axis=1) - shifted.cumsum(axis=1) ** 2 / count
    deviation = np.sqrt(np.maximum(squares, 0) / np.maximum(count - 1, 1)).clip(least_deviation)
    bounds = np.array([anytime_t_bound(int(n)) for n in count])
    known = np.isfinite(bounds)
    half_width = np.where(known, np.where(known, bounds, 0) * deviation / np.sqrt(count), math.inf)
    excludes_zero = np.abs(mean) > half_width
    stops = excludes_zero | (2 * half_width < resolution)
    stops[:, -1] = True
    last = stops.argmax(axis=1)
    row = np.arange(len(differences))
    signs = np.where(excludes_zero[row, last], np.sign(mean[row, last]), 0)
    return count[last], signs.astype(np.int64)


def simulate(
    difference: float,
    deviation: float,
    *,
    resolution: float,
    max_runs: int,
    least_deviation: float = 0.0,
    experiments: int = EXPERIMENTS,
    seed: int = 0,
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return what `decide` gives for simulated comparisons.

    Args:
        difference: the true difference, in points.
        deviation: standard deviation of the difference of one pair, in points.
        resolution: as for `compare`, like `max_runs`.
        max_runs: most pairs of an experiment.
        least_deviation: as for `anytime_interval`.
        experiments: the number of simulated comparisons.
        seed: seed of the simulation.
    """
    noise = np.random.default_rng(seed).standard_normal((experiments, max_runs))
    return decide(difference + deviation * noise, resolution, least_deviation)


# --- what it starts from ---


@cache
def saved_deviation() -> tuple[float, int]:
    """Return the standard deviation of the difference of two runs with the same seed, and how many pairs gave it.

    It is in points, pooled over the arms of the saved ablation of an earlier `laptop` on CIFAR-10, each around its own
    mean.
    """
    arms: dict[str, dict[int, float]] = defaultdict(dict)
    for run in saved_runs("ablation"):
        arms[run["arm"]][run["seed"]] = 100 * run["accuracy"]
    first = arms.pop(AS_IT_IS)
    squares, freedom, pairs = 0.0, 0, 0
    for name, accuracies in arms.items():
        differences = [accuracies[seed] - first[seed] for seed in accuracies if seed in first]
        if len(differences) > 1 and not name.startswith(SAME_NETWORK):
            squares += (len(differences) - 1) * variance(differences)
            freedom += len(differences) - 1
            pairs += len(differences)
    return math.sqrt(squares / freedom), pairs


def expected_deviation(n_test: int) -> tuple[float, str]:
    """Return the standard deviation of a pair's difference to expect with `n_test` test images, and its source.

    Runs of one recipe differ mostly because the test set is finite (K. Jordan, "On the variance of neural network
    training with respect to test sets and distributions", 2024, arXiv:2304.01910), so the deviation shrinks with the
    square root of the number of test images.
    """
    measured, pairs = saved_deviation()
    source = f"that of {pairs} saved pairs of an earlier laptop on CIFAR-10"
    if n_test == 10_000:
        return measured, source
    return measured * math.sqrt(10_000 / n_test), f"{source}, scaled from 10,000 to {n_test:,} test images"


def run_seconds(
    recipe: Recipe, data: Dataset, *, tricks: Tricks = NO_TRICKS, world_size: int, device: str | None
) -> float:
    """Predict from a few steps how long a run takes here with its evaluations: as `forecast`, or on GPUs as `plan`.

    Callbacks are not called. On GPUs all epochs are taken to have images of full size.
    """
    tricks = tricks.without_callbacks()
    if select_device(device).type != "cuda":
        # Processes on a CPU share its cores: together they take about as long as one with the whole batch.
        return forecast(recipe, data, tricks=tricks, device=device).seconds
    recipe = replace(recipe, resolutions=())
    n_train, n_test = len(data.train_labels), len(data.test_labels)
    measured = measure_step(
        recipe,
        tricks=tricks,
        device=device,
        n_train=n_train,
        n_test=n_test,
        n_classes=data.n_classes,
        world_sizes=(world_size,),
    )
    torch.cuda.empty_cache()  # the processes that will train need the memory
    predicted = predict(measured, recipe, n_train, n_test, world_size, published_link("nvlink_nccl"))
    return predicted.train_seconds + predicted.evaluate_seconds


# --- the table ---


@dataclass(frozen=True, kw_only=True)
class RunsNeeded:
    """How many pairs of runs a comparison would take, by the size of the true difference."""

    deviation: float
    """Standard deviation of the difference of one pair, in points."""
    source: str
    """Where the deviation comes from, in words."""
    resolution: float
    max_runs: int
    least_deviation: float = 0.0
    pair_seconds: float | None = None
    """Time for one turn: a run of each arm; None if unknown."""
    timing: str = "unknown until the first pair is trained"
    """Where the time comes from, in words."""
    differences: Sequence[float] = DIFFERENCES
    """True differences to show, in points."""

    def pairs(self, difference: float) -> tuple[int, int, float]:
        """Return how many pairs half of all comparisons need, how many 80 % need, and what share finds a difference.

        `difference`: the true one, in points.
        """
        pairs, signs = simulate(
            difference,
            self.deviation,
            resolution=self.resolution,
            max_runs=self.max_runs,
            least_deviation=self.least_deviation,
        )
        median, most = (int(n) for n in np.quantile(pairs, (0.5, 0.8), method="higher"))
        return median, most, float(np.mean(signs == np.sign(difference)))

    def rows(self) -> list[tuple[str, ...]]:
        """Return the table as rows of text, the heading first."""
        rows: list[tuple[str, ...]] = [
            ("true difference", "pairs: median", "80 % need at most", "found", "time: median", "80 % need at most")
        ]
        for difference in self.differences:
            median, most, found = self.pairs(difference)
            rows.append(
                (
                    f"{difference:.1f} points",
                    str(median),
                    str(most),
                    f"{100 * found:.0f} %" if difference else "-",
                    self._time(median),
                    self._time(most),
                )
            )
        return rows

    def notes(self) -> list[str]:
        """Return what the prediction assumes, a line each."""
        limit = f"at most {self.max_runs} pairs"
        return [
            f"{limit}, {self._time(self.max_runs)}" if self.pair_seconds is not None else limit,
            f"a pair takes {self._time(1)}: {self.timing}" if self.pair_seconds is not None else f"time: {self.timing}",
            f"standard deviation of a pair's difference: {self.deviation:.2f} points, {self.source}",
            f"{EXPERIMENTS:,} simulated comparisons of each difference, which stop as this one will",
        ]

    def _time(self, pairs: int) -> str:
        return "?" if self.pair_seconds is None else about(pairs * self.pair_seconds)

    def table(self) -> str:
        """Return the prediction as text."""
        notes = "\n".join(f"- {note}" for note in self.notes())
        return f"PREDICTION: pairs of runs until the comparison stops\n{table(self.rows())}\n{notes}"

    def _repr_html_(self) -> str:
        notes = "".join(f"<li>{html.escape(note)}</li>" for note in self.notes())
        return f"<p>PREDICTION: pairs of runs until the comparison stops</p>{html_table(self.rows())}<ul>{notes}</ul>"
