"""Teaching figures of images show the package's own images, statistics and predictions."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from cifar_fast.errors import UserError
from cifar_fast.recipe import Recipe
from cifar_fast.recipes import smoke
from cifar_fast.teaching import image_grids
from cifar_fast.training.batches import pixel_statistics
from cifar_fast.training.evaluate import predict_logits
from cifar_fast.training.layers import patch_covariance
from cifar_fast.training.model import Network, build_model

AUGMENTED = Recipe(global_batch_size=8, crop_padding=4, cutout=6, color_jitter=0.2)


@pytest.fixture(scope="module")
def network(tiny_data) -> Network:
    """A small network with random weights: its predictions are wrong, but they are predictions."""
    mean, std = pixel_statistics(tiny_data.train_images)
    return build_model(replace(smoke(), widths=(4, 4, 4)), tiny_data.n_classes, mean, std)


def drawn(axes: Any) -> list[np.ndarray]:
    return [np.asarray(image.get_array()) for image in axes.get_images()]


def channels_last(images: torch.Tensor) -> list[np.ndarray]:
    return list(images.permute(0, 2, 3, 1).numpy())


# --- the data ---


def test_each_image_is_drawn_above_its_class(tiny_data):
    figure = image_grids.labelled_images(
        tiny_data.test_images[:5], tiny_data.test_labels[:5], tiny_data.classes, dataset=tiny_data.name, columns=3
    )
    (axes,) = figure.axes
    assert all(map(np.array_equal, drawn(axes), channels_last(tiny_data.test_images[:5])))
    names = [text.get_text().replace("\n", " ") for text in axes.texts]
    assert names == [tiny_data.classes[label] for label in tiny_data.test_labels[:5]]
    assert figure.get_suptitle() == "data set: synthetic"


def test_mistakes_are_marked_and_named(tiny_data):
    probabilities = torch.full((2, 10), 0.05)
    labels = torch.tensor([3, 4])
    probabilities[:, 3] = 0.55
    names = [f"class{i}" for i in range(10)]
    figure = image_grids.labelled_images(
        tiny_data.test_images[:2], labels, names, dataset="made up", probabilities=probabilities
    )
    right, wrong = figure.axes[0].texts
    assert right.get_text() == "class3 55 %" and wrong.get_text() == "class3 55 %\n\u2717 class4"
    assert right.get_color() != wrong.get_color()
    assert "1 of 2 correct" in figure.get_suptitle()


# --- augmentation ---


def test_the_steps_of_an_augmentation_follow_from_each_other(tiny_data):
    image = tiny_data.train_images[0]
    figure = image_grids.augmentation_steps(
        image, padding=4, top=1, left=7, mirrored=True, cutout=8, cutout_top=-2, cutout_left=10, dataset="synthetic"
    )
    padded, crop, flipped, blanked = (drawn(axes)[0] for axes in figure.axes)
    assert np.array_equal(padded[4:36, 4:36], image.permute(1, 2, 0).numpy())
    assert np.array_equal(crop, padded[1:33, 7:39])
    assert np.array_equal(flipped, crop[:, ::-1])
    mean = image.float().mean((1, 2)).round().to(torch.uint8).numpy()
    assert (blanked[:6, 10:18] == mean).all()
    untouched = np.ones((32, 32), bool)
    untouched[:6, 10:18] = False
    assert np.array_equal(blanked[untouched], flipped[untouched])
    window = figure.axes[0].patches[0]
    assert (window.get_x(), window.get_y(), window.get_width()) == (6.5, 0.5, 32)


def test_a_window_outside_the_border_is_refused(tiny_data):
    with pytest.raises(UserError, match=r"top=9 and left=4 must be 0 \.\.\. 8"):
        image_grids.augmentation_steps(tiny_data.train_images[0], top=9, dataset="synthetic")


# --- whitening ---


def normalised(data: Any, n: int) -> torch.Tensor:
    mean, std = (value[:, None, None] for value in pixel_statistics(data.train_images))
    return (data.train_images[:n] - mean) / std


def test_whitening_levels_the_spectrum_and_empties_the_covariance(tiny_data):
    images = normalised(tiny_data, 50)
    figure = image_grids.whitening_spectrum(images, 2, 1e-3, dataset="synthetic")
    spectrum, before, after = figure.axes[:3]
    lines = {line.get_label(): np.asarray(line.get_ydata()) for line in spectrum.get_lines()}
    assert lines["before"] == pytest.approx(torch.linalg.eigvalsh(patch_covariance(images, 2)).flip(0), rel=1e-3)
    assert lines["after"] == pytest.approx(lines["before"] / (lines["before"] + 1e-3), rel=1e-3)
    assert drawn(before)[0] == pytest.approx(patch_covariance(images, 2).numpy(), abs=1e-5)
    covariance = drawn(after)[0]
    assert abs(covariance - np.diag(np.diag(covariance))).max() < 1e-3
    assert "data set: synthetic, 50 images" in figure.get_suptitle()


# --- what a network makes of images ---


@pytest.mark.parametrize(("tta", "n_views"), [("none", 1), ("flip", 2), ("flip_shift", 6)])
def test_the_votes_average_to_the_prediction(tiny_data, network, tta, n_views):
    image, label = tiny_data.test_images[0], int(tiny_data.test_labels[0])
    figure = image_grids.tta_votes(network, image, label, tiny_data.classes, tta=tta, dataset="synthetic")
    top, bottom = figure.axes
    assert len(drawn(top)) == len(top.texts) == len(bottom.collections) == n_views
    expected = 100 * predict_logits(network, image[None], tta=tta).softmax(1)[0]
    assert [bar.get_height() for bar in bottom.patches] == pytest.approx(expected.tolist(), abs=1e-3)
    alone = 100 * predict_logits(network, image[None]).softmax(1)[0]
    assert bottom.collections[0].get_offsets()[:, 1].tolist() == pytest.approx(alone.tolist(), abs=1e-3)
    if n_views > 1:
        assert np.array_equal(drawn(top)[1], drawn(top)[0][:, ::-1])


def test_the_confusion_matrix_shows_shares_of_each_class_and_colours_mistakes_alone():
    confusion = torch.tensor([[8, 2, 0], [0, 5, 5], [0, 0, 4]])
    figure = image_grids.confusion_matrix(confusion, ("cat", "dog", "ship"), dataset="made up")
    axes = figure.axes[0]
    written = {text.get_position(): text.get_text() for text in axes.texts}
    assert written == {(0, 0): "80.0", (1, 0): "20.0", (1, 1): "50.0", (2, 1): "50.0", (2, 2): "100.0"}
    assert drawn(axes)[0].tolist() == [[0, 20, 0], [0, 0, 50], [0, 0, 0]]
    assert "24 images, accuracy 70.83 %" in figure.get_suptitle()
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("predicted class", "true class")


def test_a_class_without_images_has_an_empty_row():
    figure = image_grids.confusion_matrix(torch.tensor([[3, 1], [0, 0]]), ("a", "b"), dataset="made up")
    assert drawn(figure.axes[0])[0].tolist() == [[0, 25], [0, 0]]
    assert [text.get_text() for text in figure.axes[0].texts] == ["75.0", "25.0"]
    assert "accuracy 75.00 %" in figure.get_suptitle()
