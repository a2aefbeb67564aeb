"""Figures show what the results say."""

from __future__ import annotations

import sys
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
from matplotlib.figure import Figure

from cifar_fast.plots import learning_curve
from cifar_fast.recipe import smoke
from cifar_fast.result import EpochResult

EPOCH = EpochResult(
    epoch=1, train_loss=1.5, train_accuracy=0.4, test_loss=1.25, test_accuracy=0.5, tta="none", train_seconds=2.0
)
EPOCHS = [EPOCH, replace(EPOCH, epoch=2, train_accuracy=0.7, test_accuracy=0.75, test_loss=0.5, train_seconds=4.5)]


def finished_run(gpu: str | None) -> Any:
    machine = {"gpu": gpu, "cpu": "Some Processor", "threads": 2}
    return SimpleNamespace(
        epochs=EPOCHS, recipe=smoke(), dataset={"name": "synthetic"}, environment=machine, accuracy=0.75
    )


def test_the_curves_are_the_epochs_figures():
    accuracy, loss = learning_curve(EPOCHS).axes
    curves = {line.get_label(): line.get_xydata().tolist() for line in accuracy.get_lines()}
    assert curves["test"] == [[2.0, 50.0], [4.5, 75.0]]
    assert curves["training (augmented)"] == [[2.0, 40.0], [4.5, 70.0]]
    curves = {line.get_label(): line.get_xydata().tolist() for line in loss.get_lines()}
    assert curves["test"] == [[2.0, 1.25], [4.5, 0.5]]
    assert accuracy.get_xlabel() == loss.get_xlabel() == "train_seconds"


def test_curves_differ_without_colour():
    for axes in learning_curve(EPOCHS).axes:
        test, train = axes.get_lines()
        assert test.get_linestyle() != train.get_linestyle()
        assert test.get_marker() != train.get_marker()
        assert axes.get_legend() is not None


@pytest.mark.parametrize(("gpu", "hardware"), [("Some GPU", "Some GPU"), (None, "Some Processor, 2 threads")])
def test_the_title_names_recipe_data_and_hardware(gpu, hardware):
    title = learning_curve(finished_run(gpu)).get_suptitle()
    for word in ("smoke", "data set: synthetic", "75.00 %", hardware):
        assert word in title


def test_it_draws_into_axes_that_are_given_and_leaves_pyplot_alone(tmp_path):
    figure = Figure()
    left, right = figure.subplots(1, 2)
    assert learning_curve(EPOCHS[:1], (left, right)) is figure
    figure.savefig(tmp_path / "curve.png")
    assert (tmp_path / "curve.png").read_bytes().startswith(b"\x89PNG")
    if "matplotlib.pyplot" in sys.modules:
        assert not sys.modules["matplotlib.pyplot"].get_fignums()
