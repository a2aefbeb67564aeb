"""Shows how far a training run is: a bar on a terminal or in a notebook, a plain line every ten seconds elsewhere."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable
from typing import TextIO

from tqdm.auto import tqdm

from cifar_fast.data.dataset import Dataset
from cifar_fast.recipe import Recipe
from cifar_fast.training.batches import steps_per_epoch
from cifar_fast.training.evaluate import VIEWS
from cifar_fast.training.result import EpochResult

LINE_SECONDS = 10.0
"""Seconds between two lines where the output is no terminal."""
UNSURE = 0.25
"""Share of the test images that get test-time augmentation where `tta_margin` leaves out the others: a guess."""
TRUSTED = 0.2
"""Share of the work after which the time left follows from this run's own pace alone."""


def views_per_image(recipe: Recipe, epoch: int) -> float:
    """Return how many views of each test image are evaluated after `epoch`, counted from 0: a mean."""
    if epoch + 1 < math.ceil(recipe.epochs):
        return 1.0
    return float(VIEWS[recipe.tta]) if recipe.tta_margin >= 1 else 1 + UNSURE * VIEWS[recipe.tta]


def step_work(recipe: Recipe, side: int, epoch: int) -> float:
    """Return the arithmetic of a step in `epoch`, where one view of a test image, `side` pixels wide, counts as 1.

    A forward and a backward pass together take three times as much as a forward pass; small images take less, in
    proportion to their pixels.
    """
    sides = recipe.resolutions
    now = sides[min(epoch, len(sides) - 1)] if sides else side
    return 3 * recipe.global_batch_size * (now / side) ** 2


class Progress:
    """Epoch, time left and accuracy of one training run, from before its first step; a context manager."""

    def __init__(
        self,
        recipe: Recipe,
        data: Dataset,
        *,
        title: str | None = None,
        show: bool = True,
        expected_seconds: float | None = None,
        stream: TextIO | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Prepare to show a run of `recipe` on `data`.

        Args:
            recipe: what is trained.
            data: what it is trained on.
            title: what to call the run.
            show: False shows nothing.
            expected_seconds: how long the run should take, for the time left until its own pace tells.
            stream: where to write; None: standard error.
            clock: tells the time in seconds.
        """
        self.title = title or f"{recipe.name} on {data.name}"
        self.stream = stream or sys.stderr
        self._show, self._clock, self._expected = show, clock, expected_seconds
        self._steps_per_epoch = steps_per_epoch(recipe, len(data.train_labels))
        self._total_steps = math.ceil(recipe.epochs * self._steps_per_epoch)
        self._n_epochs = math.ceil(recipe.epochs)
        side = data.train_images.shape[-1]
        self._step_work = [step_work(recipe, side, epoch) for epoch in range(self._n_epochs)]
        self._evaluation_work = [
            len(data.test_labels) * views_per_image(recipe, epoch) for epoch in range(self._n_epochs)
        ]
        steps = [
            min(self._steps_per_epoch, self._total_steps - epoch * self._steps_per_epoch)
            for epoch in range(self._n_epochs)
        ]
        self._total_work = sum(self._evaluation_work) + sum(
            n * work for n, work in zip(steps, self._step_work, strict=True)
        )
        self._steps, self._epochs, self._work = 0, 0, 0.0
        self._epoch_accuracies: list[float] = []
        self._accuracy = "accuracy follows after epoch 1"
        self._bar: tqdm | None = None

    def __enter__(self) -> Progress:
        self._started = self._last_line = self._clock()
        if not self._show:
            return self
        if in_a_notebook():
            self._bar = tqdm(total=self._total_steps, desc=self.title, unit="step")
        elif self.stream.isatty():
            self._bar = tqdm(
                total=self._total_steps, bar_format="{percentage:3.0f}%|{bar:20}| {desc}", file=self.stream
            )
        self._write()
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.close()

    def step(self, done: int, accuracy: float | None = None) -> None:
        """Note that `done` steps are done in all, the last with that share of its batch right, if that is known."""
        for number in range(self._steps, done):
            self._work += self._step_work[number // self._steps_per_epoch]
        if accuracy is not None:
            self._epoch_accuracies.append(accuracy)
            mean = sum(self._epoch_accuracies) / len(self._epoch_accuracies)
            if not self._epochs:
                self._accuracy = f"training accuracy {mean:.1%}"
        new, self._steps = done - self._steps, done
        if self._bar is not None and self._bar.update(new):
            self._write()
        self.tick()

    def evaluated(self, epoch: EpochResult) -> None:
        """Note the accuracy after an epoch."""
        self._work += self._evaluation_work[self._epochs]
        self._epochs += 1
        self._accuracy = f"test accuracy {epoch.test_accuracy:.2%}"
        if self._bar is not None or (self._show and self._epochs == self._n_epochs):
            self._write()
        self.tick()

    def tick(self) -> None:
        """Write a line if the output is no terminal and the last one is ten seconds old."""
        if self._show and self._bar is None and self._clock() - self._last_line >= LINE_SECONDS:
            self._write()

    @property
    def seconds_left(self) -> float | None:
        """The time until the end, evaluation included; None before the first step of a run that nobody has timed."""
        elapsed, share = self._clock() - self._started, self._work / self._total_work
        if not share:
            return None if self._expected is None else max(0.0, self._expected - elapsed)
        by_pace = elapsed / share
        if self._expected is None:
            return by_pace - elapsed
        trust = min(1.0, share / TRUSTED)
        return max(0.0, trust * by_pace + (1 - trust) * self._expected - elapsed)

    def __str__(self) -> str:
        """Return epoch, time left and accuracy in words."""
        epoch = min(self._steps // self._steps_per_epoch, self._n_epochs - 1) + 1
        seconds = self.seconds_left
        left = "" if seconds is None else f"{clock_time(seconds)} left, "
        return f"epoch {epoch} of {self._n_epochs}, {left}{self._accuracy}"

    def _write(self) -> None:
        if self._bar is None:
            share = self._steps / self._total_steps
            print(f"{self.title}: {share:.0%}, {self}", file=self.stream, flush=True)
            self._last_line = self._clock()
        elif self._bar.bar_format:
            self._bar.set_description_str(f"{self.title}: {self}")
        elif self._steps:  # a notebook's bar starts without
            self._bar.set_postfix_str(str(self))


def clock_time(seconds: float) -> str:
    """Return a duration as minutes and seconds, 1:05, or with hours, 1:02:05."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


def in_a_notebook() -> bool:
    """Say whether bars are drawn by a notebook: tqdm decided that when it was imported."""
    return any(parent.__module__ == "tqdm.notebook" for parent in tqdm.__mro__)
