"""Shows how far a training run is: a bar on a terminal or in a notebook, a plain line every ten seconds elsewhere.

In a notebook the bar ends as a line that gives the result, so that a stored notebook has no dead bar.
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TextIO

from tqdm.auto import tqdm

from cifar_fast.data.dataset import Dataset
from cifar_fast.recipe import Recipe
from cifar_fast.shown import percent
from cifar_fast.training.batches import steps_per_epoch
from cifar_fast.training.evaluate import VIEWS
from cifar_fast.training.result import EpochResult

LINE_SECONDS = 10.0
"""Seconds between two lines where the output is not a terminal."""
UNSURE = 0.25
"""Share of the test images that get test-time augmentation where `tta_margin` leaves out the others: a guess."""
TRUSTED = 0.2
"""Share of the work after which the time left follows from this run's own pace alone."""
BAR_CELLS = 20
BAR_SECONDS = 0.25
"""The least time, in seconds, between two drawings of a notebook's bar."""


def views_per_image(recipe: Recipe, epoch: int) -> float:
    """Return how many views of each test image are evaluated after `epoch`, counted from 0, on average."""
    if epoch + 1 < math.ceil(recipe.epochs):
        return 1.0
    return float(VIEWS[recipe.tta]) if recipe.tta_margin >= 1 else 1 + UNSURE * VIEWS[recipe.tta]


def step_work(recipe: Recipe, side: int, epoch: int) -> float:
    """Return the arithmetic of a step in `epoch`, where one view of a test image, `side` pixels wide, counts as 1.

    A forward and a backward pass together take three times as much as a forward pass; small images take less, in
    proportion to their pixels.
    """
    return 3 * recipe.global_batch_size * (recipe.resolution(epoch, side) / side) ** 2


class Progress:
    """Epoch, time left and accuracy of one training run, from before its first step; a context manager."""

    def __init__(
        self,
        recipe: Recipe,
        data: Dataset,
        *,
        title: str | None = None,
        seed: object = None,
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
            seed: the run's seed, which the line that ends a notebook's bar names; None: the line names no seed.
            show: False shows nothing.
            expected_seconds: how long the run should take; the time left rests on it until the run's own pace is known.
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
        self._cell: CellBar | None = None
        self._last: EpochResult | None = None
        self._named = self.title if seed is None else f"{self.title}, seed {seed}"

    def __enter__(self) -> Progress:
        self._started = self._last_line = self._clock()
        if not self._show:
            return self
        if in_a_notebook():
            self._cell = CellBar(self._outcome())
        elif self.stream.isatty():
            self._bar = tqdm(
                total=self._total_steps, bar_format="{percentage:3.0f}%|{bar:20}| {desc}", file=self.stream
            )
        self._write()
        return self

    def __exit__(self, error: object, *_: object) -> None:
        if self._bar is not None:
            self._bar.close()
        if self._cell is not None:
            stopped = f"{self._named}: stopped in epoch {self._epoch} of {self._n_epochs}"
            self._cell.end(stopped if error else self._outcome())

    def _outcome(self) -> str:
        """Return the line that ends a notebook's bar. The bar also begins as such a line: to compare outputs, nbval
        reads the first form of an output, and a reader sees the last.
        """
        accuracy, seconds = (self._last.test_accuracy, self._last.train_seconds) if self._last else (0.0, 0.0)
        return f"{self._named}: {percent(accuracy)} after {seconds:.1f} s of training"

    def step(self, done: int, accuracy: float | None = None) -> None:
        """Note that `done` steps are done in all, the last with this `accuracy` on its batch, if that is known."""
        for number in range(self._steps, done):
            self._work += self._step_work[number // self._steps_per_epoch]
        if accuracy is not None:
            self._epoch_accuracies.append(accuracy)
            mean = sum(self._epoch_accuracies) / len(self._epoch_accuracies)
            if not self._epochs:
                self._accuracy = f"training accuracy {mean:.1%}"
        new, self._steps = done - self._steps, done
        if self._cell is not None:
            self._write()
        if self._bar is not None and self._bar.update(new):
            self._write()
        self.tick()

    def evaluated(self, epoch: EpochResult) -> None:
        """Note the accuracy after an epoch."""
        self._work += self._evaluation_work[self._epochs]
        self._epochs += 1
        self._last = epoch
        self._accuracy = f"test accuracy {epoch.test_accuracy:.2%}"
        if self._bar is not None or self._cell is not None or (self._show and self._epochs == self._n_epochs):
            self._write()
        self.tick()

    def tick(self) -> None:
        """Write a line if the output is not a terminal and the last line is ten seconds old."""
        if self._show and self._bar is self._cell is None and self._clock() - self._last_line >= LINE_SECONDS:
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
        seconds = self.seconds_left
        left = "" if seconds is None else f"{clock_time(seconds)} left, "
        return f"epoch {self._epoch} of {self._n_epochs}, {left}{self._accuracy}"

    @property
    def _epoch(self) -> int:
        """The epoch that is being trained, from 1."""
        return min(self._steps // self._steps_per_epoch, self._n_epochs - 1) + 1

    def _write(self) -> None:
        share = self._steps / self._total_steps
        if self._cell is not None:
            self._cell.show(share, f"{self.title}, {self}")
        elif self._bar is not None:
            self._bar.set_description_str(f"{self.title}: {self}")
        else:
            print(f"{self.title}: {share:.0%}, {self}", file=self.stream, flush=True)
            self._last_line = self._clock()


class CellBar:
    """A bar in a notebook's cell, which ends as a line of text in the same place."""

    def __init__(self, line: str) -> None:
        """Start with `line`, which the first `show` replaces."""
        from IPython.display import display

        self._handle = display(_as_text(line), raw=True, display_id=True)
        self._shown = -math.inf

    def show(self, share: float, text: str) -> None:
        """Draw the bar with that share done, and `text` after it, unless it was drawn a moment ago."""
        if (now := time.monotonic()) - self._shown >= BAR_SECONDS:
            self._shown = now
            full = round(share * BAR_CELLS)
            bar = "\u2588" * full + "\u2591" * (BAR_CELLS - full)
            self._handle.update(_as_text(f"{bar} {text}"), raw=True)

    def end(self, line: str) -> None:
        """Put `line` in place of the bar."""
        self._handle.update(_as_text(line), raw=True)


def _as_text(line: str) -> dict[str, Any]:
    return {"text/plain": line}


@contextmanager
def counted(title: str, total: int, unit: str, *, show: bool = True) -> Iterator[Callable[[str], None]]:
    """Show a bar over `total` pieces of work; in a notebook it ends as a line.

    Yields a function that is called with what each piece is, before it begins.
    """
    started, done = time.monotonic(), -1
    cell = CellBar(_count_line(title, 0.0, total, unit)) if show and in_a_notebook() else None
    with tqdm(total=total, desc=title, unit=unit, disable=not show or cell is not None) as bar:

        def begin(text: str) -> None:
            nonlocal done
            done += 1
            if done:
                bar.update()
            bar.set_postfix_str(text)
            if cell:
                cell.show(done / total, f"{title}, {unit} {done + 1} of {total}: {text}")

        try:
            yield begin
        except BaseException:
            if cell:
                cell.end(f"{title}: stopped in {unit} {done + 1} of {total}")
            raise
        if total:
            bar.update(total - bar.n)
        if cell:
            cell.end(_count_line(title, time.monotonic() - started, total, unit))


def _count_line(title: str, seconds: float, total: int, unit: str) -> str:
    return f"{title}: {total} {unit}{'s' * (total != 1)} in {seconds:.1f} s"


def clock_time(seconds: float) -> str:
    """Return a duration as minutes and seconds, 1:05, or with hours, 1:02:05."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


def in_a_notebook() -> bool:
    """Say whether a notebook's kernel runs this code."""
    ipython = sys.modules.get("IPython")
    shell = ipython.get_ipython() if ipython else None
    return hasattr(shell, "kernel")
