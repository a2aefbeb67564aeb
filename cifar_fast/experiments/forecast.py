"""How long a training run will take on this machine, from a few of its steps, timed within seconds before it starts."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from cifar_fast.data.dataset import Dataset
from cifar_fast.experiments.step_costs import steady_step, with_batch_size
from cifar_fast.hardware.clock import Clock
from cifar_fast.hardware.device import keep_freed_memory, select_device
from cifar_fast.recipe import Recipe
from cifar_fast.training.batches import steps_per_epoch
from cifar_fast.training.evaluate import evaluate
from cifar_fast.training.progress import views_per_image
from cifar_fast.training.setup import Setup, choose_execution, set_up
from cifar_fast.training.tricks import NO_TRICKS, Tricks

MOST_IMAGES = 512
"""The most images in a timed step: the time of a larger batch is taken to grow in proportion."""
TEST_IMAGES = 500
"""Test images that are timed: a batch of `evaluate`."""
ENOUGH_SECONDS, MOST_REPEATS = 0.8, 6
"""A step is repeated until it has been timed for this many seconds, or this many times."""


@dataclass(frozen=True)
class Forecast:
    """What a training run should take, evaluation included."""

    recipe: Recipe
    seconds: float
    machine: str
    """Its cores and instructions, or its GPU, in words."""

    def __str__(self) -> str:
        """Return it as one would say it: about 4 min (2 cores, AVX2, measured)."""
        return f"{about(self.seconds)} ({self.machine}, measured)"


def about(seconds: float) -> str:
    """Return a duration as precisely as a forecast is: about 35 s, about 4 min, about 1.5 h."""
    if seconds < 90:
        return f"about {max(5, 5 * round(seconds / 5))} s"
    if seconds < 90 * 60:
        return f"about {round(seconds / 60)} min"
    return f"about {seconds / 3600:.1f} h"


def forecast(recipe: Recipe, data: Dataset, *, tricks: Tricks = NO_TRICKS, device: str | None = None) -> Forecast:
    """Time a step of `recipe` at each of its resolutions and a batch of test images, and add up a whole run.

    The steps are those of training, through the same set-up, on at most 512 images; they leave nothing behind. It
    takes a few seconds. On a CUDA GPU, where steps are compiled first, it would take longer than many a training run.

    Args:
        recipe: what is to be trained.
        data: what it is to be trained on.
        tricks: functions of your own in place of the recipe's; callbacks are not called.
        device: `cpu`, `cuda`, ... or None for the best one here.

    Raises:
        RecipeError: the recipe does not fit the data.
        UserError: the device is not there.
    """
    on = select_device(device)
    keep_freed_memory()
    n_steps = steps_per_epoch(recipe, len(data.train_labels))
    smaller = with_batch_size(recipe, timed_images(recipe))
    tricks = tricks.without_callbacks()
    execution = choose_execution(smaller, on, tricks=tricks)
    setup = set_up(smaller, _few(data, smaller.global_batch_size), execution, device=on, tricks=tricks)
    seconds_at = _seconds_of_steps(setup)
    view_seconds = _seconds_of_a_view(setup)
    steps_left, seconds = math.ceil(recipe.epochs * n_steps), 0.0
    for epoch in range(math.ceil(recipe.epochs)):
        steps = min(n_steps, steps_left)
        steps_left -= steps
        of_a_step = seconds_at[setup.batches.resolution(epoch)] * recipe.global_batch_size / smaller.global_batch_size
        seconds += steps * of_a_step + len(data.test_labels) * views_per_image(recipe, epoch) * view_seconds
    return Forecast(recipe, seconds, _in_words(setup.environment()))


def timed_images(recipe: Recipe) -> int:
    """Return how many images a timed step takes: whole norm groups of every shard."""
    unit = recipe.n_shards * (recipe.ghost_batch_size or 1)
    return min(recipe.global_batch_size, max(1, MOST_IMAGES // unit) * unit)


def _few(data: Dataset, n_train: int) -> Dataset:
    return Dataset(
        data.name,
        data.classes,
        data.train_images[:n_train],
        data.train_labels[:n_train],
        data.test_images[:TEST_IMAGES],
        data.test_labels[:TEST_IMAGES],
        data.source,
        data.fingerprint,
    )


def _seconds_of_steps(setup: Setup) -> dict[int, float]:
    """Return the seconds of a step for each size of image, the making of its batch included."""
    step, chosen = steady_step(setup), setup.batches.example_choices()
    sides = sorted({setup.batches.resolution(epoch) for epoch in range(math.ceil(setup.recipe.epochs))})
    step(*setup.batches.make(sides[0], *chosen))  # warms up, which is quickest with small images

    def work(side: int) -> None:
        step(*setup.batches.make(side, *chosen))

    return {side: _least_seconds(partial(work, side), setup) for side in sides}


def _seconds_of_a_view(setup: Setup) -> float:
    images, labels = setup.test_set
    dtype = setup.execution.numerics.dtype
    return _least_seconds(lambda: evaluate(setup.model, images, labels, dtype=dtype), setup) / len(labels)


def _least_seconds(work: Callable[[], object], setup: Setup) -> float:
    """Return the shortest time of some work, repeated while it is quick: other programs only slow it down."""
    measured: list[float] = []
    while not measured or (sum(measured) < ENOUGH_SECONDS and len(measured) < MOST_REPEATS):
        clock = Clock(setup.device)
        with clock.running():
            work()
        measured.append(clock.seconds)
    return min(measured)


def _in_words(environment: dict[str, Any]) -> str:
    if environment["gpu"]:
        return str(environment["gpu"])
    threads = torch.get_num_threads()
    return f"{threads} core{'s' if threads > 1 else ''}, {environment['cpu_capability']}"
