"""Figures drawn from results; nothing here trains, and nothing touches pyplot's state."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from matplotlib.axes import Axes
from matplotlib.figure import Figure

if TYPE_CHECKING:
    from cifar_fast.result import EpochResult, RunResult

# Blue and vermilion of Okabe and Ito (2008) differ for every kind of colour vision; in grey, marker and dash do.
TEST = {"color": "#0072B2", "marker": "o", "linestyle": "-", "label": "test"}
TRAIN = {"color": "#D55E00", "marker": "s", "linestyle": "--", "label": "training (augmented)"}


def learning_curve(run: RunResult | Sequence[EpochResult], axes: tuple[Axes, Axes] | None = None) -> Figure:
    """Draw accuracy and loss, for training and test images, over the seconds of training.

    Args:
        run: a finished run, or its epochs so far (which have no title).
        axes: where to draw accuracy and loss; without it in a new figure.

    Returns:
        The figure that holds the axes.
    """
    epochs = run if isinstance(run, Sequence) else run.epochs
    if axes is None:
        left, right = Figure(figsize=(9, 3.8), layout="constrained").subplots(1, 2)
    else:
        left, right = axes
    seconds = [epoch.train_seconds for epoch in epochs]
    left.plot(seconds, [100 * epoch.train_accuracy for epoch in epochs], **TRAIN)
    left.plot(seconds, [100 * epoch.test_accuracy for epoch in epochs], **TEST)
    # Smoothed targets keep the training loss above what the same predictions cost on the test set's.
    smoothed = {"label": "training (augmented, smoothed labels)"}
    right.plot(seconds, [epoch.train_loss for epoch in epochs], **(TRAIN | smoothed if _smooths(run) else TRAIN))
    right.plot(seconds, [epoch.test_loss for epoch in epochs], **TEST)
    for axis, label in ((left, "accuracy in %"), (right, "loss")):
        axis.set(xlabel="train_seconds", ylabel=label)
        axis.set_xlim(left=0)
        axis.grid(alpha=0.3)
        axis.spines[["top", "right"]].set_visible(False)
        axis.legend()
    figure = left.get_figure(root=True)
    assert isinstance(figure, Figure)
    if not isinstance(run, Sequence):
        figure.suptitle(_title(run), fontsize="medium")
    return figure


def _smooths(run: RunResult | Sequence[EpochResult]) -> bool:
    return not isinstance(run, Sequence) and run.recipe.label_smoothing > 0


def _title(run: RunResult) -> str:
    machine = run.environment
    where = machine["gpu"] or f"{machine['cpu']}, {machine['threads']} threads"
    reached = f"{100 * run.accuracy:.2f} % (TTA: {run.recipe.tta})"
    return f"{run.recipe.name}, data set: {run.dataset['name']}, {reached}\n{where}"
