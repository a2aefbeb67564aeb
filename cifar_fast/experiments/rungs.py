"""What each rung of the classroom ladder gains, in points of accuracy and in arithmetic.

A run is a line of the `results.jsonl` that `benchmarks/classroom_ladder.py` writes. Runs of recipes other than
the ladder's are left out, so that a changed ladder does not cite them.
"""

from __future__ import annotations

import html
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from cifar_fast import recipes
from cifar_fast.errors import RecipeError, UserError
from cifar_fast.experiments.ablation import AS_IT_IS
from cifar_fast.experiments.statistics import mean_interval
from cifar_fast.experiments.tables import rounded
from cifar_fast.recipe import Recipe
from cifar_fast.shown import data_set, epochs, hardware, table
from cifar_fast.training.batches import steps_per_epoch

LEAST_SEEDS = 3
"""Seeds that a comparison of arithmetic needs."""
BEYOND = 1.25
"""Factor in arithmetic by which a curve may be extended beyond its ends."""
TERA = 1e12
LABELS = {"warmup": "no warm-up", "tta_flip": "flip TTA", "tta": "shift TTA"}


@dataclass(frozen=True)
class Point:
    """The runs of one rung with one number of epochs."""

    epochs: float
    flop: float
    """Floating-point operations of a training run."""
    accuracy: dict[int, float]
    """Test accuracy, 0 ... 1, by seed."""

    @property
    def mean(self) -> float:
        """The mean accuracy, 0 ... 1."""
        return fmean(self.accuracy.values())

    @property
    def interval(self) -> tuple[float, float] | None:
        """The 95 % interval of the mean, 0 ... 1; None for a single run."""
        return mean_interval(list(self.accuracy.values()))


Curve = list[Point]
"""A rung's points, from few epochs to many."""


def ladder_runs(runs: Iterable[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Return those of `runs` that trained a recipe of today's ladder, or one of the tricks beside it."""
    ladders: dict[float, dict[str, Recipe]] = {}
    found = []
    for run in runs:
        length = run["recipe"]["epochs"]
        if length not in ladders:
            ladders[length] = {name: rung.recipe for name, rung in recipes.classroom_arms(length).items()}
        try:
            recipe = Recipe.from_dict(run["recipe"])
        except RecipeError:  # a field of another version
            continue
        if ladders[length].get(run["arm"]) == recipe:
            found.append(run)
    return found


def curves(runs: Iterable[Mapping[str, Any]], beside: str = "") -> dict[str, Curve]:
    """Return each rung's points by its name, from the foot of the ladder upwards; rungs without runs have none.

    A trick `beside` the ladder comes after the rung that it is added to.
    """
    found = _points(runs)
    names = [rung.recipe.name for rung in recipes.classroom_ladder()]
    if beside and beside not in names:
        recipes.rung_pair(beside)  # raises for a name that is no trick
        names.insert(names.index(_below(beside)) + 1, beside)
    return {name: found[name] for name in names}


def _points(runs: Iterable[Mapping[str, Any]]) -> dict[str, Curve]:
    """Return the points of each rung, and of each trick beside the ladder."""
    points: dict[str, dict[float, Point]] = {name: {} for name in recipes.classroom_arms()}
    for run in ladder_runs(runs):
        length = run["recipe"]["epochs"]
        point = points[run["arm"]].setdefault(length, Point(length, run["train_flop"], {}))
        point.accuracy[run["seed"]] = run["accuracy"]
    return {name: [found[length] for length in sorted(found)] for name, found in points.items()}


StepSeconds = Mapping[str, Mapping[int, float]]
"""Seconds of a training step, by the name of the rung and the side of the images in pixels."""


def train_seconds(rung: str, length: float, steps: StepSeconds, n_train: int = 50_000) -> float:
    """Return the seconds that the steps of `rung` take in `length` epochs; the set-up and evaluation come on top.

    Rungs that only evaluate a network take as long as the one that trains it.

    Raises:
        UserError: `steps` lacks the rung, or a size of its images.
    """
    last, above = recipes.last_trained(length)
    recipe = recipes.classroom_arms(length)[rung].recipe
    trained = last if recipe in above else recipe
    total = 0.0
    for epoch in range(math.ceil(length)):
        side = trained.resolution(epoch)
        if side not in steps.get(trained.name, {}):
            raise UserError(
                f"no step of {trained.name!r} with images of {side} pixels was timed; benchmarks/ladder_seconds.py does"
            )
        total += min(1.0, length - epoch) * steps_per_epoch(trained, n_train) * steps[trained.name][side]
    return total


@dataclass(frozen=True)
class Saving:
    """How many times a rung's arithmetic the recipe below it takes to reach the rung's accuracy."""

    epochs: float
    """Epochs of the rung whose accuracy the recipe below is to reach."""
    factor: float
    interval: tuple[float, float] | None
    """The 95 % interval of the factor; None if the runs are too few or too noisy for one, and for a bound."""
    n: int
    """Seeds that all points of both curves share."""
    more: bool = False
    """Whether the curve below ends before that accuracy, so that `factor` is only a bound."""

    def __str__(self) -> str:
        """Return the factor in words."""
        if self.more:
            return f"more than {self.factor:.1f} times the arithmetic (n = {self.n})"
        between = "95 % interval {:.2f} to {:.2f}".format(*self.interval) if self.interval else "roughly"
        return f"{self.factor:.2f} times the arithmetic ({between}, n = {self.n})"


@dataclass(frozen=True, kw_only=True)
class Gain:
    """What a rung gains over the one below it. Nothing has been measured where `differences` is empty."""

    rung: str
    title: str
    epochs: float = 0.0
    differences: tuple[float, ...] = ()
    """Accuracy with the trick minus accuracy without, in points, seed by seed."""
    saving: Saving | None = None
    """None where the curves do not show it."""
    dataset: str = ""
    hardware: str = ""

    @property
    def points(self) -> float:
        """The mean difference, in points."""
        return fmean(self.differences)

    @property
    def interval(self) -> tuple[float, float] | None:
        """The 95 % interval (Student's t) of the mean difference; None for a single pair of runs."""
        return mean_interval(self.differences)

    def sentences(self) -> tuple[str, str, str]:
        """Return the gain in points, what it is worth in arithmetic ("" if unknown), and where it was measured."""
        if not self.differences:
            return f"{self.title[:1].upper()}{self.title[1:]}: not measured yet.", "", ""
        interval = self.interval
        between = f" (95 % interval {rounded(interval, like=interval, signed=True)})" if interval else ""
        mean = rounded([self.points], like=interval, signed=True)
        first = f"{self.title[:1].upper()}{self.title[1:]}: {mean} points of test accuracy{between}."
        worth = ""
        if self.saving:
            worth = f"Without it, the accuracy of {epochs(self.saving.epochs)} takes {self.saving}."
        pairs = "pairs of runs" if len(self.differences) > 1 else "pair of runs"
        where = (
            f"n = {len(self.differences)} {pairs} with the same seed, {epochs(self.epochs)}; "
            f"data set: {self.dataset}; hardware: {self.hardware}"
        )
        return first, worth, where

    def __str__(self) -> str:
        """Return it as a paragraph of text."""
        return " ".join(filter(None, self.sentences()[:2])) + f"\n{self.sentences()[2]}" * bool(self.differences)

    __repr__ = __str__

    def _repr_html_(self) -> str:
        first, worth, where = map(html.escape, self.sentences())
        name, _, rest = first.partition(": ")
        said = f"<p><b>{name}</b>: {rest} {worth}</p>"
        return f"{said}\n<p><small>{where}</small></p>" if where else said


def gain(rung: str, runs: Iterable[Mapping[str, Any]]) -> Gain:
    """Compare a rung with the one below it, and a trick beside the ladder with the rung that it is added to.

    They are compared at the number of epochs with the most shared seeds, the largest if there are several.

    Args:
        rung: name of a trick of the ladder.
        runs: lines of `results.jsonl`.

    Raises:
        RecipeError: no rung adds a trick of that name.
    """
    recipes.rung_pair(rung)
    title = recipes.classroom_arms()[rung].title
    kept = ladder_runs(runs)
    found = _points(kept)
    curves = (_curve_below(rung, found), found[rung])
    shared = {
        point.epochs: sorted(point.accuracy.keys() & _at(curves[0], point.epochs).keys()) for point in found[rung]
    }
    if not any(shared.values()):
        return Gain(rung=rung, title=title)
    length, seeds = max(shared.items(), key=lambda item: (len(item[1]), item[0]))
    first, second = (_at(curve, length) for curve in curves)
    names = (_below(rung, length), rung)
    compared = [run for run in kept if run["arm"] in names and run["recipe"]["epochs"] == length]
    return Gain(
        rung=rung,
        title=title,
        epochs=length,
        differences=tuple(100 * (second[seed] - first[seed]) for seed in seeds),
        saving=saving(*curves),
        dataset=_distinct(data_set(run["dataset"]) for run in compared),
        hardware=_distinct(hardware(run["environment"]) for run in compared),
    )


def saving(lower: Curve, upper: Curve) -> Saving | None:
    """Return how many times the arithmetic `lower` takes for an accuracy of `upper`; None where they do not show it.

    The accuracy of `lower` between two of its points is interpolated over the logarithm of the arithmetic. Of the
    points of `upper` whose accuracy lies on the curve of `lower`, the one with the most epochs is taken; if there is
    none, one that lies no further from its ends than `BEYOND`. If all lie above, the factor is a bound.

    Only seeds that all points share count, at least `LEAST_SEEDS`. Points with few seeds are left out if the others
    suffice.
    """
    bound = None
    for least in sorted({len(point.accuracy) for point in (*lower, *upper)}, reverse=True):
        found = _saving(*([point for point in curve if len(point.accuracy) >= least] for curve in (lower, upper)))
        if found and not found.more:
            return found
        bound = bound or found
    return bound


def _saving(lower: Curve, upper: Curve) -> Saving | None:
    seeds = sorted(set.intersection(*(set(point.accuracy) for point in (*lower, *upper)))) if lower and upper else []
    if len(lower) < 2 or len(seeds) < LEAST_SEEDS:
        return None
    for beyond in (1.0, BEYOND):
        for target in reversed(upper):
            factor = _factor(lower, target, seeds, beyond)
            if 0 < factor < math.inf:
                return Saving(target.epochs, factor, _interval(lower, target, seeds), len(seeds))
    least = upper[0]
    if _factor(lower, least, seeds) == math.inf and (bound := lower[-1].flop / least.flop) > 1:
        return Saving(least.epochs, bound, None, len(seeds), more=True)
    return None


def _interval(lower: Curve, target: Point, seeds: Sequence[int]) -> tuple[float, float] | None:
    """Return the 95 % interval of `_factor`, by a jackknife over the seeds: each is left out once.

    The pseudo-values of the logarithm, n times the whole minus n - 1 times the rest, are treated like a sample
    (Student's t). Source: J. W. Tukey, "Bias and confidence in not-quite large samples", 1958.
    """
    n, whole = len(seeds), _factor(lower, target, seeds)
    rests = [_factor(lower, target, [other for other in seeds if other != seed], math.inf) for seed in seeds]
    if not all(0 < rest < math.inf for rest in rests):
        return None
    logs = [n * math.log(whole) - (n - 1) * math.log(rest) for rest in rests]
    low, high = mean_interval(logs) or (-math.inf, math.inf)
    half = (high - low) / 2
    return whole * math.exp(-half), whole * math.exp(half)


def _factor(lower: Curve, target: Point, seeds: Sequence[int], beyond: float = BEYOND) -> float:
    """Return the arithmetic at which the mean of `lower` reaches that of `target`, relative to that of `target`.

    Both ends of the curve are extended in straight lines by the factor `beyond`. Returns 0 if the curve starts above
    the target, and infinity if it does not reach it.
    """
    wanted = fmean(target.accuracy[seed] for seed in seeds)
    reached = [(math.log(point.flop), fmean(point.accuracy[seed] for seed in seeds)) for point in lower]
    pieces = list(zip(reached, reached[1:], strict=False))
    for number, ((x0, y0), (x1, y1)) in enumerate(pieces):
        slope = (y1 - y0) / (x1 - x0)
        low = x0 - math.log(beyond) if number == 0 else x0
        high = x1 + math.log(beyond) if number == len(pieces) - 1 else x1
        if slope > 0 and low <= (x := x0 + (wanted - y0) / slope) <= high:
            return math.exp(x) / target.flop
    return 0.0 if wanted < reached[0][1] else math.inf


def label(name: str) -> str:
    """Return the name of a rung as pictures show it: the rung `warmup` removes the warm-up, and `tta` adds shifts."""
    return LABELS.get(name, name.replace("_", " "))


@dataclass(frozen=True)
class Worth:
    """What a trick gains where the ladder adds it, and what the top of the ladder loses without it, seed by seed."""

    epochs: float
    gains: tuple[float, ...]
    """Accuracy with the trick minus accuracy of the rung below, in points."""
    losses: tuple[float, ...]
    """Accuracy of the top minus accuracy of the top without the trick, in points."""


def added_and_left_out(ladder: Iterable[Mapping[str, Any]], left_out: Iterable[Mapping[str, Any]]) -> dict[str, Worth]:
    """Return the worth of each trick by its name, from the foot of the ladder upwards.

    Test-time augmentation takes no training, so the top without it is a rung of the ladder, and its runs are there.

    Args:
        ladder: lines of the ladder's `results.jsonl`.
        left_out: lines that `benchmarks/ablation.py --leave-one-out` saved, all with the same number of epochs.

    Raises:
        UserError: `left_out` has runs of several numbers of epochs, or the two share no trick of today's ladder.
    """
    left_out = list(left_out)
    lengths = {run["recipe"]["epochs"] for run in left_out}
    if len(lengths) != 1:
        raise UserError(
            f"the runs without a trick were trained for {', '.join(f'{n:g}' for n in sorted(lengths)) or 'no'} epochs; "
            "give those of one number of epochs, as benchmarks/ablation.py --leave-one-out saves them"
        )
    (length,) = lengths
    found = _points(ladder)
    top = recipes.classroom_ladder(length)[-1].recipe
    last, above = recipes.last_trained(length)
    evaluated = {recipe.tta: _at(found[recipe.name], length) for recipe in (last, *above)}
    trained = _accuracies(left_out, AS_IT_IS, top)
    worth = {}
    for name, recipe in recipes.leave_one_out(length).items():
        with_it, below = (_at(found[each], length) for each in (name, _below(name, length)))
        gains = [100 * (with_it[seed] - below[seed]) for seed in sorted(with_it.keys() & below.keys())]
        if recipe.tta == top.tta:
            tops, without = trained, _accuracies(left_out, f"without {name}", recipe)
        else:
            tops, without = evaluated[top.tta], evaluated[recipe.tta]
        losses = [100 * (tops[seed] - without[seed]) for seed in sorted(tops.keys() & without.keys())]
        if gains and losses:
            worth[name] = Worth(length, tuple(gains), tuple(losses))
    if not worth:
        raise UserError(
            "no trick of today's ladder was both added and left out; benchmarks/ablation.py trains the runs"
        )
    return worth


def _curve_below(rung: str, found: Mapping[str, Curve]) -> Curve:
    """Return the points of what the trick `rung` is added to.

    That depends on the epochs, because a single epoch has no small images: `tta_flip` is then added to another rung.
    Where `rung` itself does not exist, its points are those of what it is added to at other epochs.
    """
    names = {point.epochs: _below(rung, point.epochs) for curve in found.values() for point in curve}
    return [
        point for length in sorted(names) for point in found[names[length] or _below(rung)] if point.epochs == length
    ]


def _accuracies(runs: Iterable[Mapping[str, Any]], arm: str, recipe: Recipe) -> dict[int, float]:
    """Return the accuracy of each run of `arm` with `recipe`, by seed."""
    values = recipe.to_dict()
    return {run["seed"]: run["accuracy"] for run in runs if run["arm"] == arm and run["recipe"] == values}


def _at(curve: Curve, length: float) -> dict[int, float]:
    """Return the accuracies of a curve at one number of epochs, by seed."""
    return next((point.accuracy for point in curve if point.epochs == length), {})


def ladder_table(runs: Iterable[Mapping[str, Any]]) -> str:
    """Return as text each trick's accuracy and arithmetic by epochs, and its gain over what it is added to."""
    kept = ladder_runs(runs)
    found = _points(kept)
    rows = [("trick", "added to", "epochs", "n", "accuracy, %", "TFLOP", "points, paired by seed")]
    for name, curve in found.items():
        for point in curve:
            below = _below(name, point.epochs)
            other = next((p for p in found[below] if p.epochs == point.epochs), None) if below else None
            shared = sorted(set(point.accuracy) & set(other.accuracy)) if other else []
            differences = [100 * (point.accuracy[seed] - other.accuracy[seed]) for seed in shared] if other else []
            rows.append(
                (
                    name,
                    below,
                    f"{point.epochs:g}",
                    str(len(point.accuracy)),
                    _plus_minus([100 * value for value in point.accuracy.values()]),
                    f"{point.flop / TERA:.2f}",
                    _change(differences),
                )
            )
    gains = [gain(name, kept) for name in found if _below(name)]
    worth = [f"{each.rung}, {epochs(each.saving.epochs)}: {each.saving}" for each in gains if each.saving]
    where = [
        f"data set: {_distinct(data_set(run['dataset']) for run in kept)}",
        f"hardware: {_distinct(hardware(run['environment']) for run in kept)}",
    ]
    title = (
        "Arithmetic without the trick, relative to that with it, for the accuracy that it reaches in so many epochs:"
    )
    return "\n".join([table(rows), "", *([title, *worth, ""] if worth else []), *where])


def _below(name: str, epochs: float = 2.0) -> str:
    """Return the name of the recipe that the trick `name` is added to; "" for the foot, or if no rung adds it then."""
    arms = recipes.classroom_arms(epochs)
    return recipes.rung_pair(name, epochs)[0].name if name in list(arms)[1:] else ""


def _change(differences: Sequence[float]) -> str:
    if not differences:
        return ""
    interval = mean_interval(differences)
    between = f" ({interval[0]:+.2f} to {interval[1]:+.2f}), n = {len(differences)}" if interval else ""
    return f"{fmean(differences):+.2f}{between}"


def _plus_minus(values: Sequence[float]) -> str:
    interval = mean_interval(values)
    return f"{fmean(values):.2f}" + (f" +- {(interval[1] - interval[0]) / 2:.2f}" if interval else "")


def _distinct(values: Iterable[str]) -> str:
    return " / ".join(dict.fromkeys(values))
