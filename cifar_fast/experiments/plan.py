"""What more workers would do: a plain model of measured step costs and a published all-reduce.

Nothing here is a measurement of several GPUs; every table and figure drawn from it says PREDICTION.
"""

from __future__ import annotations

import math
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass

from cifar_fast.experiments.all_reduce import Link, MeasuredAllReduce, link_all_reduce_seconds
from cifar_fast.experiments.step_costs import StepCosts
from cifar_fast.experiments.world_sizes import describe_world_sizes, planned_world_sizes, require_allowed
from cifar_fast.recipe import Recipe
from cifar_fast.shown import table
from cifar_fast.training.batches import steps_per_epoch
from cifar_fast.training.evaluate import VIEWS

PREDICTION = "PREDICTION, not a measurement"


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """What `predict` expects of one training run; a prediction, not a measurement."""

    recipe: str
    n_train: int
    n_test: int
    world_size: int
    local_batch_size: int
    """Images of one worker in a step."""
    steps: int
    gradient_bytes: int
    setup_seconds: float
    compute_seconds: float
    all_reduce_seconds: float
    launch_seconds: float
    """What launching adds: the time in which the device waits for Python."""
    evaluate_seconds: float
    """Not part of `train_seconds`."""
    lower_bound: bool
    """No published all-reduce covers this many workers: the link's own figures are a lower bound."""
    link: Link
    hardware: str

    @property
    def terms(self) -> dict[str, float]:
        """The parts of `train_seconds`, in seconds."""
        return {
            "compute": self.compute_seconds,
            "all-reduce": self.all_reduce_seconds,
            "launch overhead": self.launch_seconds,
            "set-up": self.setup_seconds,
        }

    @property
    def train_seconds(self) -> float:
        """The sum of the terms."""
        return sum(self.terms.values())


def predict(
    measured: StepCosts,
    recipe: Recipe,
    n_train: int,
    n_test: int,
    world_size: int,
    link: Link,
    *,
    all_reduce_seconds: float | None = None,
) -> Prediction:
    """Predict the clocks of `recipe` on `world_size` devices, each like the one that was measured.

    The global batch stays the same and each worker computes its share of it (strong scaling): the local batch is
    `global_batch_size / world_size`, and the number of steps does not depend on the workers. In a step the device
    computes and then averages all gradients in one all-reduce. Python waits for neither, so launching counts only as
    far as it takes longer than both together. The model assumes the same set-up for every number of workers, and splits
    the test images over them.

    Args:
        measured: costs of the recipe's network on one device.
        recipe: the recipe to train; it must allow `world_size`.
        n_train: training images.
        n_test: test images.
        world_size: number of workers.
        link: what connects them.
        all_reduce_seconds: measured time of one all-reduce among them, which replaces the link's.

    Returns:
        The terms, in seconds.

    Raises:
        RecipeError: the recipe does not allow `world_size`, or a shard holds less than its part of a batch.
    """
    require_allowed(recipe, world_size)
    steps = total_steps(recipe, n_train)
    local_batch_size = recipe.global_batch_size // world_size
    compute, launch = measured.compute_line(local_batch_size), measured.launch_line(local_batch_size)
    views = math.ceil(recipe.epochs) - 1 + VIEWS[recipe.tta]  # single views after every epoch but the last
    one_all_reduce = link_all_reduce_seconds(measured.gradient_bytes, world_size, link)
    if all_reduce_seconds is not None and world_size > 1:
        one_all_reduce = all_reduce_seconds
    return Prediction(
        recipe=recipe.name,
        n_train=n_train,
        n_test=n_test,
        world_size=world_size,
        local_batch_size=local_batch_size,
        steps=steps,
        gradient_bytes=measured.gradient_bytes,
        setup_seconds=measured.setup_seconds,
        compute_seconds=steps * compute,
        all_reduce_seconds=steps * one_all_reduce,
        launch_seconds=steps * max(0.0, launch - compute - one_all_reduce),
        evaluate_seconds=views * math.ceil(n_test / world_size) * measured.evaluate_seconds_per_image,
        lower_bound=all_reduce_seconds is None and world_size > link.most_workers,
        link=link,
        hardware=measured.hardware,
    )


def predict_all(
    measured: StepCosts,
    recipe: Recipe,
    n_train: int,
    n_test: int,
    link: Link,
    *,
    world_size: int | None = None,
    all_reduce: MeasuredAllReduce | None = None,
) -> list[Prediction]:
    """Return a prediction for each of 1, 2, 4, ... 64 workers that the recipe allows, and for `world_size`.

    For as many GPUs as `all_reduce` was measured with, its time replaces the link's.
    """
    known = {all_reduce.world_size: all_reduce.seconds} if all_reduce and all_reduce.backend == "nccl" else {}
    return [
        predict(measured, recipe, n_train, n_test, number, link, all_reduce_seconds=known.get(number))
        for number in planned_world_sizes(recipe, world_size)
    ]


def total_steps(recipe: Recipe, n_train: int) -> int:
    """Return the number of optimiser steps, as `TrainBatches` counts them; the number of workers does not change it.

    Raises `RecipeError` when a shard holds less than its part of a batch.
    """
    return math.ceil(recipe.epochs * steps_per_epoch(recipe, n_train))


# --- the table ---


def plan_table(
    predictions: Sequence[Prediction], measured: StepCosts, recipe: Recipe, all_reduce: MeasuredAllReduce | None = None
) -> str:
    """Return the predictions as a text table, with the measurements and assumptions behind them below it."""
    rows = [
        ["", "", "", *["PREDICTED"] * 7],
        ["", "images a", "", "compute", "all-reduce", "launch", "set-up", "train_", "evaluate_", "speed-"],
        ["workers", "worker", "steps", "s", "s", "s", "s", "seconds", "seconds", "up"],
    ]
    first = predictions[0]
    rows += [_row(prediction, first.train_seconds / prediction.train_seconds) for prediction in predictions]
    title = f"{PREDICTION}: {recipe.name}, {first.n_train:,} training and {first.n_test:,} test images"
    return "\n".join([title, "", table(rows, right=True), "", *_notes(predictions, measured, recipe, all_reduce)])


def _row(prediction: Prediction, speed_up: float) -> list[str]:
    bound = ">= " if prediction.lower_bound else ""
    compute, all_reduce, launch, setup = (f"{seconds:.3f}" for seconds in prediction.terms.values())
    return [
        str(prediction.world_size),
        f"{prediction.local_batch_size:,}",
        f"{prediction.steps:,}",
        compute,
        bound + all_reduce,
        launch,
        setup,
        f"{bound}{prediction.train_seconds:.2f}",
        f"{prediction.evaluate_seconds:.2f}",
        f"{'<= ' * prediction.lower_bound}{speed_up:.2f}",
    ]


def _notes(
    predictions: Sequence[Prediction], measured: StepCosts, recipe: Recipe, all_reduce: MeasuredAllReduce | None
) -> list[str]:
    link, line = predictions[0].link, measured.compute_line
    points = ", ".join(f"{point.images:,} images {1000 * point.step_seconds:.2f} ms" for point in measured.points)
    spread = max(point.spread for point in measured.points)
    sizes = [point.images for point in measured.points]
    outside = [str(now.world_size) for now in predictions if not min(sizes) <= now.local_batch_size <= max(sizes)]
    notes = [
        f"measured on one {measured.hardware}",
        f"measured steps: {points}; repetitions differ by up to {100 * spread:.0f} %, and the model from them by up "
        f"to {100 * measured.largest_deviation:.1f} %",
        f"compute of a step: {1000 * line.fixed_seconds:.2f} ms + {1e6 * line.seconds_per_image:.2f} us an image",
        f"all-reduce of a step: {measured.n_parameters:,} gradients, {measured.gradient_bytes / 1e6:.2f} MB, over "
        f"{link.name}: {1e3 * link.latency_seconds:.3f} ms + 2 (N - 1) / N x bytes / "
        f"({link.bytes_per_second / 1e9:.0f} GB/s); source: {link.source}",
        "assumptions: every worker has a device like the measured one to itself, none waits for another, and set-up "
        "does not shrink; each epoch's random draws are left out; evaluation is split over the workers and is not part "
        "of train_seconds",
        f"workers: {describe_world_sizes(recipe)}",
    ]
    if all_reduce is None:
        notes.append("all-reduce on this machine: cannot be measured with one GPU or one core")
    else:
        is_shown = all_reduce.world_size in [now.world_size for now in predictions]
        used = "used for that row" if all_reduce.backend == "nccl" and is_shown else "not used for any row"
        notes.append(
            f"all-reduce on this machine: {all_reduce.world_size} processes over {all_reduce.backend} average "
            f"{all_reduce.n_gradients:,} gradients in {1e3 * all_reduce.seconds:.2f} ms (measured; {used})"
        )
    if outside:
        how = "in proportion to the measured one" if len(sizes) == 1 else "on the line through the measured ones"
        notes.append(f"no step was measured at the local batch of {', '.join(outside)} workers: predicted {how}")
    if not measured.on_gpu and len(predictions) > 1:
        notes.append("measured on a CPU: each worker has such a CPU; this says nothing about GPUs")
    if any(now.lower_bound for now in predictions):
        notes.append(
            f">=: a lower bound; we know of no published all-reduce among more than {link.most_workers} workers, on "
            "several machines, so the link within one machine stands in for it"
        )
    return [textwrap.fill(note, width=110, initial_indent="- ", subsequent_indent="  ") for note in notes]
