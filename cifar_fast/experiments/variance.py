"""Splits the spread of test accuracy over runs into luck with the test images and differences between the networks."""

from __future__ import annotations

import html
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from cifar_fast.errors import UserError
from cifar_fast.experiments.benchmark import load_benchmark, logits_file
from cifar_fast.shown import percent, table
from cifar_fast.training.result import LOGITS, RunResult, load_logits


@dataclass(frozen=True, eq=False)
class Variance:
    """How R runs differ on the same N test images, of C classes.

    Let c[r, i] = 1 if run r is right about image i, and let p[i] be the probability that a run is, estimated by the
    share of runs that are. The variance over runs of the accuracy on these N images is, on average over test sets,

        variance = (N - 1) / N * distribution-wise variance + mean(p * (1 - p)) / N

    The first part is the variance of the accuracies that the networks would have on endlessly many images. The second
    is that of N independent coins, and falls as the test set grows. Both are estimated here without bias.

    Source: Keller Jordan, "Calibrated chaos: variance between runs of neural network training is harmless and
    inevitable", arXiv 2304.01910.
    """

    accuracies: Tensor
    """float64 (R,): the test accuracy of each run, 0 ... 1."""
    image_accuracy: Tensor = field(repr=False)
    """float64 (N,): the share of runs that are right about each image."""
    agreement: Tensor = field(repr=False)
    """float64 (R, R): the share of images for which two runs predict the same class, right or wrong."""
    ensemble_accuracy: float
    """Accuracy of the class with the largest mean probability over the runs."""
    labels: Tensor = field(repr=False)
    """int64 (N,)."""
    without_logits: int = 0
    """Runs of a benchmark folder that are left out, because their logits were not kept."""

    @property
    def n_runs(self) -> int:
        """The number of runs, R."""
        return len(self.accuracies)

    @property
    def n_images(self) -> int:
        """The number of test images, N."""
        return len(self.labels)

    @property
    def deviation(self) -> float:
        """The standard deviation of the test accuracy over runs (n - 1 in the denominator)."""
        return self.accuracies.std().item()

    @cached_property
    def sampling_variance(self) -> float:
        """The part of the variance that independent coins with the probabilities p would have: mean(p (1 - p)) / N."""
        p = self.image_accuracy
        # With p estimated from R runs, p (1 - p) comes out too small by a factor of (R - 1) / R on average.
        return (p * (1 - p)).mean().item() * self.n_runs / (self.n_runs - 1) / self.n_images

    @property
    def sampling_share(self) -> float:
        """The part of the variance over runs that a finite test set explains; NaN if there is no variance.

        It is an estimate, and may exceed 1 by chance.
        """
        variance = self.deviation**2
        return self.sampling_variance / variance if variance else math.nan

    @property
    def distribution_variance(self) -> float:
        """Variance of the accuracy on endlessly many images: unbiased, so it may come out negative if it is small."""
        n = self.n_images
        return n / (n - 1) * (self.deviation**2 - self.sampling_variance)

    @property
    def distribution_deviation(self) -> float:
        """The standard deviation of the accuracy on endlessly many images; 0 if the estimated variance is negative."""
        return math.sqrt(max(0.0, self.distribution_variance))

    @property
    def other_test_set(self) -> float:
        """The standard deviation of one network's accuracy over test sets of N images: sqrt(a (1 - a) / N).

        Source: Bouthillier and others, "Accounting for variance in machine learning benchmarks", arXiv 2103.03098,
        2021, who model a test set as a binomial sample.
        """
        mean = self.accuracies.mean().item()
        return math.sqrt(mean * (1 - mean) / self.n_images)

    @property
    def mean_agreement(self) -> float:
        """The mean of `agreement` over all pairs of runs."""
        return self._pairs().mean().item()

    def _pairs(self) -> Tensor:
        row, column = torch.triu_indices(self.n_runs, self.n_runs, offset=1)
        return self.agreement[row, column]

    def rows(self) -> list[tuple[str, str]]:
        """Return what `table` shows: what was estimated, and its value."""
        accuracies, pairs, p = self.accuracies, self._pairs(), self.image_accuracy
        uncertain = 1 / math.sqrt(2 * (self.n_runs - 1))  # of a normal sample's standard deviation
        left_out = f" ({self.without_logits} more without logits)" if self.without_logits else ""
        return [
            ("runs", f"{self.n_runs}{left_out}, each tested on the same {self.n_images:,} images"),
            ("accuracy mean", percent(accuracies.mean().item())),
            ("accuracy min, max", f"{percent(accuracies.min().item())}, {percent(accuracies.max().item())}"),
            ("accuracy of the ensemble", f"{percent(self.ensemble_accuracy)} (mean of the runs' probabilities)"),
            ("right in all runs", f"{percent((p == 1).double().mean().item())} of the images"),
            ("right in no run", f"{percent((p == 0).double().mean().item())} of the images"),
            (
                "two runs agree on",
                f"{percent(self.mean_agreement)} of the images "
                f"({percent(pairs.min().item())} to {percent(pairs.max().item())})",
            ),
            (
                "standard deviation over runs",
                f"{_points(self.deviation)}, itself known to about ±{100 * uncertain:.0f} %",
            ),
            ("  with independent images", f"{_points(math.sqrt(self.sampling_variance))}: {self._share_in_words()}"),
            ("  with endlessly many images", _points(self.distribution_deviation)),
            ("one network, other test sets", f"{_points(self.other_test_set)} for {self.n_images:,} images each"),
        ]

    def _share_in_words(self) -> str:
        if math.isnan(self.sampling_share):
            return "the runs do not differ"
        share = f"{100 * self.sampling_share:.0f} % of the variance"
        return share + (", so the finite test set explains all of it" if self.sampling_share >= 1 else "")

    def table(self) -> str:
        """Return the estimates as aligned text."""
        return table(self.rows())

    def __str__(self) -> str:
        return self.table()

    def _repr_html_(self) -> str:
        cells = (
            f'<tr><th style="text-align: left">{html.escape(name)}</th>'
            f'<td style="text-align: left">{html.escape(value)}</td></tr>'
            for name, value in self.rows()
        )
        return f"<table>{''.join(cells)}</table>"


def _points(share: float) -> str:
    """Return a difference of accuracies (0 ... 1) in percentage points."""
    return f"{100 * share:.3f} points"


def variance(runs: Path | str | Sequence[RunResult | Path | str] | Tensor, labels: Tensor | None = None) -> Variance:
    """Compare what several runs predict for the same test images.

    Args:
        runs: a benchmark folder, or several runs (results or run folders), trained with `save_logits=True`; or their
            logits, float (R, N, C).
        labels: int64 (N,), the labels of the test images: for logits only, because runs keep theirs.

    Raises:
        UserError: there are fewer than two runs, one has no logits, or they were tested on different images.
        RunError: a folder holds no benchmark, or its logits cannot be read.
    """
    if isinstance(runs, Tensor):
        if labels is None:
            raise UserError("logits alone do not say what is right: give the labels of the test images too")
        return _of_logits(list(runs), labels)
    if labels is not None:
        raise UserError("runs keep the labels of their test images: give labels for logits (R, N, C) only")
    without = 0
    if isinstance(runs, Path | str):
        files, without = _of_benchmark(Path(runs))
        found = [load_logits(file) for file in files]
    else:
        found = [_of_run(run) for run in runs]
    if len(found) < 2:
        raise UserError(f"a variance needs the logits of at least two runs, not of {len(found)}")
    first = found[0][1]
    for number, (_, its_labels) in enumerate(found):
        if not torch.equal(its_labels, first):
            raise UserError(f"run {number} was tested on other images than run 0: compare runs on one test set")
    return _of_logits([logits for logits, _ in found], first, without)


def _of_benchmark(folder: Path) -> tuple[list[Path], int]:
    """Return the files with the logits of finished runs, and the number of finished runs that have none."""
    numbers = range(len(load_benchmark(folder).runs))
    files = [path for number in numbers if (path := folder / logits_file(number)).exists()]
    return files, len(numbers) - len(files)


def _of_run(run: RunResult | Path | str) -> tuple[Tensor, Tensor]:
    if not isinstance(run, RunResult):
        if not (Path(run) / LOGITS).exists():
            raise UserError(f"{run} holds no {LOGITS}: train the run again with save_logits=True (--logits)")
        return load_logits(Path(run) / LOGITS)
    if run.logits is None or run.test_labels is None:
        raise UserError(f"the run with seed {run.seed} has no logits: train it again with save_logits=True")
    return run.logits, run.test_labels


def _of_logits(logits: Sequence[Tensor], labels: Tensor, without_logits: int = 0) -> Variance:
    if len(logits) < 2:
        raise UserError(f"a variance needs the logits of at least two runs, not of {len(logits)}")
    if any(each.dim() != 2 or len(each) != len(labels) for each in logits) or len(labels) < 2:
        shape = tuple(logits[0].shape)
        raise UserError(f"logits of shape {shape} for each run do not fit {len(labels)} labels: both need N > 1 images")
    labels = labels.long()
    predicted = torch.stack([each.argmax(1) for each in logits])  # (R, N)
    right = (predicted == labels).double()
    probabilities = torch.zeros(logits[0].shape, dtype=torch.float64)
    for each in logits:
        probabilities += each.double().softmax(1)
    return Variance(
        accuracies=right.mean(1),
        image_accuracy=right.mean(0),
        agreement=torch.stack([(one == predicted).double().mean(1) for one in predicted]),
        ensemble_accuracy=(probabilities.argmax(1) == labels).double().mean().item(),
        labels=labels,
        without_logits=without_logits,
    )
