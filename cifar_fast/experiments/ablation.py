"""Trains a recipe with and without a trick, with the same seeds, and compares the runs seed by seed."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

import torch

from cifar_fast.data.dataset import Dataset
from cifar_fast.distributed.launch import Trainer, choose_world_size, require_travel
from cifar_fast.errors import UserError
from cifar_fast.experiments.statistics import mean_interval
from cifar_fast.experiments.tables import mean_and_half_width, rounded
from cifar_fast.hardware.clock import Clock
from cifar_fast.recipe import Recipe, changed_fields, choices
from cifar_fast.shown import data_set, epochs, hardware, html_table, table
from cifar_fast.training.evaluate import Evaluation, evaluate
from cifar_fast.training.progress import counted
from cifar_fast.training.result import EpochResult, RunResult
from cifar_fast.training.seeds import Seeds
from cifar_fast.training.tricks import NO_TRICKS, Tricks

AS_IT_IS = "as it is"
"""The name of the first arm, the unchanged recipe; saved results have it too."""


@dataclass(frozen=True, repr=False)
class Ablation:
    """Finished runs by the name of their arm; the other arms are compared with the first.

    It prints as a table, or as HTML in a notebook; `table` has more digits.
    """

    arms: dict[str, list[dict[str, Any]]]
    """Each run as `RunResult.to_dict()` gives it; its clocks are None if other work shared the machine."""

    def differences(self, arm: str, field: str = "accuracy") -> list[float]:
        """Return each run of `arm` minus the first arm's run with the same seed.

        `field`: `accuracy` (0 ... 1), `loss`, or a clock, in seconds. Raises `UserError` when they share no seed.
        """
        first = {Seeds.of(run["seed"]): run[field] for run in next(iter(self.arms.values()))}
        differences = [run[field] - first[seed] for run in self.arms[arm] if (seed := Seeds.of(run["seed"])) in first]
        if not differences:
            raise UserError(f"no seed was trained both in {next(iter(self.arms))!r} and in {arm!r}")
        return differences

    def difference(self, arm: str, field: str = "accuracy") -> tuple[float, tuple[float, float] | None]:
        """Return the mean of `differences` and its 95 % interval, or None for a single difference."""
        differences = self.differences(arm, field)
        return fmean(differences), mean_interval(differences)

    def verdict(self, arm: str) -> str:
        """Return in words whether the interval of the difference in accuracy excludes zero; it takes 3 seeds."""
        return _verdict(self.differences(arm))

    def table(self) -> str:
        """Return a line for each arm: accuracy and time with 95 % intervals, and the difference from the first."""
        rows = [("arm", "n", "accuracy", "train_seconds", "accuracy against the first arm, paired by seed")]
        for number, (name, runs) in enumerate(self.arms.items()):
            accuracies = [100 * run["accuracy"] for run in runs]
            seconds = [run["train_seconds"] for run in runs if run["train_seconds"] is not None]
            rows.append(
                (
                    name,
                    str(len(runs)),
                    _spread(accuracies, "%"),
                    _spread(seconds, "s") if len(seconds) == len(runs) else "not timed",
                    points(self.differences(name)) if number else "",
                )
            )
        return f"{table(rows)}\n\n" + "\n".join(self.notes())

    def notes(self) -> list[str]:
        """Return what a table leaves out, a line each: data set and recipe, then the machine."""
        first = next(iter(self.arms.values()))[0]
        data, recipe = first["dataset"], first["recipe"]
        return [
            f"data set: {data_set(data)}; recipe {recipe['name']!r}, {epochs(recipe['epochs'])}",
            f"hardware: {hardware(first['environment'])}; torch {first['environment']['torch']}",
        ]

    def rows(self) -> list[tuple[str, ...]]:
        """Return a table as rows of text, its numbers rounded to what the intervals support."""
        rows: list[tuple[str, ...]] = [
            ("arm", "n", "accuracy", "train_seconds", "difference, paired by seed", "verdict")
        ]
        for number, (name, runs) in enumerate(self.arms.items()):
            accuracy = mean_and_half_width([100 * run["accuracy"] for run in runs], "%")
            seconds = [run["train_seconds"] for run in runs]
            timed = "not timed" if None in seconds else mean_and_half_width(seconds, "s")
            change = _change(self.differences(name)) if number else ""
            rows.append((name, str(len(runs)), accuracy, timed, change, self.verdict(name) if number else ""))
        return rows

    def __repr__(self) -> str:
        return "\n".join([table(self.rows()), "", f"+- and brackets: {INTERVALS}", *self.notes()])

    def _repr_html_(self) -> str:
        return html_table(self.rows(), [f"\u00b1 and brackets: {INTERVALS}", *self.notes()]).replace("+-", "\u00b1")


INTERVALS = "95 % intervals (Student's t) over the seeds"


def _change(differences: Sequence[float]) -> str:
    """Return the mean of differences in accuracy (0 ... 1) and its interval, in points."""
    scaled = [100 * difference for difference in differences]
    interval = mean_interval(scaled)
    between = f" ({rounded(interval, like=interval, signed=True)})" if interval else ""
    return f"{rounded([fmean(scaled)], like=interval, signed=True)}{between} points"


def _verdict(differences: Sequence[float]) -> str:
    interval = mean_interval(differences)
    if interval is None:
        return "one seed: no interval"
    if len(differences) == 2:
        return "two seeds: too few to tell"  # if the two agree by chance, their interval has no width
    low, high = interval
    return "more accurate" if low > 0 else "less accurate" if high < 0 else "no clear difference"


def points(differences: Sequence[float]) -> str:
    """Return in words the mean of differences in accuracy (0 ... 1), its interval in percentage points, the verdict."""
    interval = mean_interval(differences)
    between = f" ({100 * interval[0]:+.2f} to {100 * interval[1]:+.2f})" if interval else ""
    return f"{100 * fmean(differences):+.2f}{between} points: {_verdict(differences)}"


def _spread(values: Sequence[float], unit: str) -> str:
    interval = mean_interval(values)
    half = f" +- {(interval[1] - interval[0]) / 2:.2f}" if interval else ""
    return f"{fmean(values):.2f}{half} {unit}"


Arm = Mapping[str, Any] | Recipe | Tricks | tuple[Mapping[str, Any], Tricks]
"""What an arm changes: fields of the recipe, all of it, parts of the training run, or fields and parts."""


def ablation(
    recipe: Recipe,
    data: Dataset,
    arms: Mapping[str, Arm],
    *,
    tricks: Tricks = NO_TRICKS,
    seeds: Iterable[int] = (0, 1, 2),
    world_size: int | None = 1,
    device: str | None = None,
    progress: bool = True,
    on_epoch: Callable[[str, int, EpochResult], None] | None = None,
    on_run: Callable[[str, dict[str, Any]], None] | None = None,
) -> Ablation:
    """Train `recipe`, and for each arm the recipe with that arm's fields or tricks changed, with the same seeds.

    Args:
        recipe: the first arm, named `AS_IT_IS`.
        data: the training and test images.
        arms: what each arm changes: fields of the recipe, `{"no smoothing": {"label_smoothing": 0.0}}`, parts of the
            training run, `{"my loss": Tricks(loss=my_loss)}`, or a pair of both; or another recipe.
        tricks: functions of your own in all arms; an arm's own functions take their place.
        seeds: each arm is trained once with each of them.
        world_size: number of processes, as for `launch`.
        device: as for `train`.
        progress: whether to show a progress bar.
        on_epoch: called with the arm, the seed and the result of each epoch.
        on_run: called with the arm and each finished run.

    Returns:
        The runs. The arms take turns, so that a machine that slows down slows all of them.

    Raises:
        UserError: there is no arm or no seed, an arm changes nothing, or its tricks cannot be sent to other processes.
        RecipeError: an arm names an unknown field, or a value that is not allowed.
    """
    seeds = list(seeds)
    if not arms or not seeds:
        raise UserError("an ablation needs at least one arm and one seed")
    pairs = {AS_IT_IS: (recipe, tricks)}
    for name, arm in arms.items():
        arm = arm.to_dict() if isinstance(arm, Recipe) else arm
        changes, own = arm if isinstance(arm, tuple) else ({}, arm) if isinstance(arm, Tricks) else (arm, NO_TRICKS)
        pairs[name] = Recipe.from_dict(recipe.to_dict() | dict(changes)), tricks.merged(own)
        if not changed_fields(recipe, pairs[name][0]) and pairs[name][1].fingerprint() == tricks.fingerprint():
            raise UserError(f"the arm {name!r} changes nothing: the recipe already has {dict(changes)}")
    for _, own in pairs.values():
        require_travel(own, choose_world_size(world_size, device, recipe))
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in pairs}
    with (
        Trainer(data, world_size=world_size, device=device) as trainer,
        counted(f"ablation on {data.name}", len(seeds) * len(pairs), "run", show=progress) as begin,
    ):
        trainer.warm_up(recipe, tricks)
        for seed in seeds:
            for name, (changed, own) in pairs.items():
                begin(f"{name}, seed {seed}")

                def tell(epoch: EpochResult, name: str = name, seed: int = seed) -> None:
                    if on_epoch:
                        on_epoch(name, seed, epoch)

                run = trainer.train(changed, tricks=own, seed=seed, progress=False, on_epoch=tell)
                runs[name].append(run.to_dict())
                if on_run:
                    on_run(name, runs[name][-1])
    return Ablation(runs)


def tta_ablation(results: Sequence[RunResult], data: Dataset, *, progress: bool = True) -> Ablation:
    """Evaluate the networks of `results` with each kind of test-time augmentation; nothing is trained.

    The first arm is `tta=none`. Each run keeps the clocks of its training; its accuracy, loss and `evaluate_seconds`
    are those of the arm.
    """
    arms: dict[str, list[dict[str, Any]]] = {f"tta={tta}": [] for tta in choices("tta")}
    n_runs = len(results) * len(arms)
    with counted(f"TTA on {data.name}", n_runs, "evaluation", show=progress) as begin:
        for result in results:
            for tta in choices("tta"):
                begin(f"tta={tta}, seed {result.seed}")
                clock = Clock(next(result.model.parameters()).device)
                with clock.running():
                    found = evaluate_as_trained(result, data, tta)
                now = {"accuracy": found.accuracy, "loss": found.loss, "evaluate_seconds": clock.seconds}
                arms[f"tta={tta}"].append(result.to_dict() | now)
    return Ablation(arms)


def evaluate_as_trained(result: RunResult, data: Dataset, tta: str) -> Evaluation:
    """Evaluate the network of `result` with `tta`, in the precision of its training run."""
    dtype = getattr(torch, result.environment["precision"])
    return evaluate(result.model, data.test_images, data.test_labels, tta=tta, dtype=dtype)
