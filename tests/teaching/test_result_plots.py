"""Figures show what the results say."""

from __future__ import annotations

import io
import sys
from base64 import b64decode
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.figure import Figure
from PIL import Image

from cifar_fast.experiments.published import CIFAR10_FINGERPRINT
from cifar_fast.experiments.statistics import mean_interval
from cifar_fast.recipes import smoke
from cifar_fast.teaching.result_plots import Picture, accuracy_and_time, learning_curve, stack
from cifar_fast.training.result import EpochResult

EPOCH = EpochResult(
    epoch=1, train_loss=1.5, train_accuracy=0.4, test_loss=1.25, test_accuracy=0.5, tta="none", train_seconds=2.0
)
EPOCHS = [EPOCH, replace(EPOCH, epoch=2, train_accuracy=0.7, test_accuracy=0.75, test_loss=0.5, train_seconds=4.5)]


def finished_run(gpu: str | None) -> Any:
    machine = {"gpu": gpu, "cpu": "Some Processor", "cpu_capability": "AVX512", "threads": 1}
    return SimpleNamespace(
        epochs=EPOCHS,
        recipe=smoke(),
        dataset={"name": "synthetic", "n_train": 4000, "n_test": 1000},
        environment=machine,
        accuracy=0.75,
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


@pytest.mark.parametrize(("gpu", "hardware"), [("Some GPU", "Some GPU"), (None, "Some Processor, AVX512, 1 thread")])
def test_the_title_names_recipe_data_and_hardware(gpu, hardware):
    title = learning_curve(finished_run(gpu)).get_suptitle()
    for word in ("smoke", "data set: synthetic (4,000 training and 1,000 test images)", "75.00 %"):
        assert word in title
    assert title.endswith(f"\n{hardware}")


def test_it_draws_into_axes_that_are_given_and_leaves_pyplot_alone(tmp_path):
    figure = Figure()
    left, right = figure.subplots(1, 2)
    assert learning_curve(EPOCHS[:1], (left, right)) is figure
    figure.savefig(tmp_path / "curve.png")
    assert (tmp_path / "curve.png").read_bytes().startswith(b"\x89PNG")
    if "matplotlib.pyplot" in sys.modules:
        assert not sys.modules["matplotlib.pyplot"].get_fignums()


# --- accuracy_and_time ---


def made_up(accuracies: list[float], seconds: list[float], *, fingerprint: str = CIFAR10_FINGERPRINT) -> Any:
    """A benchmark that nobody ran."""
    machine = {
        "gpu": None,
        "cpu": "Some Processor",
        "cpu_capability": "AVX512",
        "threads": 2,
        "torch": "2",
        "python": "3",
    }
    common = {
        "version": "0.1.0",
        "recipe": {"name": "apple_8gpu"},
        "dataset": {"name": "CIFAR-10", "fingerprint": fingerprint, "n_train": 50_000, "n_test": 10_000},
        "environment": machine | {"precision": "float32", "convolution": "direct"},
    }
    runs = [
        common
        | {"seed": i, "accuracy": accuracy, "train_seconds": time, "evaluate_seconds": 1.0, "total_seconds": time + 2}
        for i, (accuracy, time) in enumerate(zip(accuracies, seconds, strict=True))
    ]
    return SimpleNamespace(runs=runs, target=0.94)


FIVE = made_up([0.9401, 0.94, 0.9374, 0.9419, 0.9425], [8.0, 7.5, 7.75, 7.5, 7.5])


def legend_of(axes: Any) -> list[str]:
    return [text.get_text() for text in axes.get_legend().get_texts()]


def test_every_run_is_a_dot_at_its_accuracy_and_at_its_time():
    left, right = accuracy_and_time(FIVE).axes
    for axes, figure, scale in ((left, "accuracy", 100), (right, "train_seconds", 1)):
        (dots,) = [one for one in axes.collections if one.get_label() == "one run"]
        assert dots.get_offsets()[:, 0].tolist() == [scale * run[figure] for run in FIVE.runs]
        assert (dots.get_offsets()[:, 1] > 0).all()
    assert left.get_xlabel() == "test accuracy in %" and right.get_xlabel() == "train_seconds"


def test_target_mean_and_published_figures_are_lines_with_labels():
    left, right = accuracy_and_time(FIVE).axes
    low, high = mean_interval([100 * run["accuracy"] for run in FIVE.runs])
    published = "published (Apple 2019 on 8 V100, n = 50)"
    assert legend_of(left) == [
        "one run",
        f"mean 94.04 %, 95 % interval {low:.2f} to {high:.2f} %",
        "target 94.00 %, reached by 4 of 5 (95 % interval 38 to 96 %)",
        f"{published} median 94.19 %",
        f"{published} minimum 93.74 %",
    ]
    assert legend_of(right)[2:] == [f"{published} mean 7.81 s", f"{published} maximum 10.31 s"]
    lines = {line.get_label(): line for line in (*left.get_lines(), *right.get_lines())}
    for label, place in (
        ("target", 94),
        ("median", 94.19),
        ("minimum", 93.74),
        ("mean 7.81", 7.81),
        ("maximum", 10.31),
    ):
        (line,) = [lines[name] for name in lines if label in name]
        assert list(line.get_xdata()) == pytest.approx([place, place])
    styles = [lines[name].get_linestyle() for name in legend_of(left)[2:]]
    assert len(set(styles)) == 3  # they differ without colour


def test_the_subtitle_names_data_set_hardware_and_n():
    title = accuracy_and_time(FIVE).get_suptitle()
    for words in ("apple_8gpu", "data set: CIFAR-10", "n = 5", "Some Processor, AVX512, 2 threads"):
        assert words in title


def test_nothing_published_stands_beside_another_data_set():
    figure = accuracy_and_time(made_up([0.5, 0.6, 0.7], [1.0, 1.1, 1.2], fingerprint="0" * 16))
    assert "not the whole of CIFAR-10" in figure.get_suptitle()
    assert not [label for axes in figure.axes for label in legend_of(axes) if "published" in label]


@pytest.mark.parametrize("n", [1, 2, 50])
@pytest.mark.parametrize("seconds", [7.8, 520.0])
def test_any_number_of_runs_is_drawn_within_the_axes(tmp_path, n, seconds):
    same = made_up([0.94] * n, [seconds] * n)
    apart = made_up([0.93 + i / 5000 for i in range(n)], [seconds + i / 100 for i in range(n)])
    for runs in (same, apart):
        figure = accuracy_and_time(runs)
        figure.savefig(tmp_path / "runs.png", dpi=50)
        for axes in figure.axes:
            (dots,) = [one for one in axes.collections if one.get_label() == "one run"]
            radius = dots.get_sizes()[0] ** 0.5 / 2
            assert dots.get_offsets()[:, 1].max() + radius <= axes.get_ylim()[1]
            assert axes.get_xlim()[0] < dots.get_offsets()[:, 0].min()
            assert dots.get_offsets()[:, 0].max() < axes.get_xlim()[1]
            assert legend_of(axes)[1].startswith("mean ") == (n > 1)
        assert ("logarithmic" in figure.axes[1].get_xlabel()) == (seconds > 100)


def test_the_interval_of_a_mean_is_drawn_whole():
    figure = accuracy_and_time(made_up([0.9396, 0.9403, 0.9418], [586.0, 575.2, 576.8]))
    low, high = mean_interval([93.96, 94.03, 94.18]) or (0, 0)
    left, right = figure.axes[0].get_xlim()
    assert left < low and high < right


def test_accuracies_far_from_the_target_stay_on_a_linear_axis():
    assert accuracy_and_time(made_up([0.0, 0.2, 0.1], [7.0, 8.0, 9.0])).axes[0].get_xscale() == "linear"


@given(st.lists(st.floats(0, 300), min_size=1, max_size=60), st.floats(1, 20))
def test_stacked_dots_do_not_overlap_and_stand_on_others(places, diameter):
    levels = stack(places, diameter)
    dots = list(zip(places, levels, strict=True))
    for i, (place, level) in enumerate(dots):
        touching = {other for j, (x, other) in enumerate(dots) if i != j and abs(x - place) < diameter}
        assert level not in touching
        assert set(range(level)) <= touching


# --- what a notebook shows ---


def test_a_figure_shows_itself_as_a_small_opaque_png_with_a_sentence():
    figure = accuracy_and_time(FIVE)
    data, metadata = figure._repr_mimebundle_()
    png = b64decode(data["image/png"])
    image = Image.open(io.BytesIO(png)).convert("RGBA")
    assert image.size == (1000, 460) and image.getpixel((0, 0)) == (255, 255, 255, 255)
    assert image.getextrema()[3] == (255, 255)  # no pixel lets a dark page through
    assert len(png) < 60_000 and png == figure.png()
    assert metadata["image/png"]["alt"] == figure.get_suptitle()
    figure.alt = "five runs"
    assert figure._repr_mimebundle_()[1]["image/png"]["alt"] == "five runs"


def test_colours_in_a_png_are_the_figure_s_to_the_eye():
    figure = Picture(figsize=(1, 1))
    figure.add_axes((0, 0, 1, 1)).imshow([[[0.0, 0.45, 0.7]]], aspect="auto")
    image = Image.open(io.BytesIO(figure.png())).convert("RGB")
    assert image.getpixel((50, 50)) == pytest.approx((0, 115, 178), abs=4)
