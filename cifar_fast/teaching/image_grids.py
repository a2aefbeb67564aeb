"""Teaching figures made of images: the data, augmentation, whitening, and what a network makes of images."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.axes import Axes
from matplotlib.patches import Rectangle
from torch import Tensor

from cifar_fast.errors import UserError
from cifar_fast.teaching.concept_plots import SERIES, VERMILION, tidy
from cifar_fast.teaching.result_plots import Picture
from cifar_fast.training import augment
from cifar_fast.training.evaluate import predict_logits, views
from cifar_fast.training.layers import patch_covariance, whitening_filters
from cifar_fast.training.model import Network

# --- the data ---


def labelled_images(
    images: Tensor,
    labels: Tensor,
    classes: Sequence[str],
    *,
    dataset: str,
    probabilities: Tensor | None = None,
    columns: int = 8,
) -> Picture:
    """Draw images in a grid, each above its class or above a network's prediction.

    Args:
        images: uint8 (N, 3, H, W).
        labels: int64 (N,).
        classes: names of the K classes.
        dataset: name of the data set.
        probabilities: float (N, K), a network's; the captions are then its predictions, with mistakes marked.
        columns: images in a row.

    Returns:
        The figure.
    """
    names, colors = [], []
    for i, label in enumerate(labels.tolist()):
        if probabilities is None:
            names.append(_wrapped(classes[label]))
            colors.append("black")
            continue
        share, guess = probabilities[i].max(0)
        right = int(guess) == label
        name = f"{_wrapped(classes[int(guess)])} {100 * share.item():.0f} %"
        names.append(name if right else f"{name}\n\u2717 {_wrapped(classes[label])}")
        colors.append("black" if right else VERMILION)
    title = f"data set: {dataset}"
    alt = f"{len(images)} images of {dataset} with their classes"
    if probabilities is not None:
        hits = int((probabilities.argmax(1) == labels).sum())
        title += f"; {hits} of {len(images)} correct; \u2717: the true class"
        alt = f"{len(images)} images of {dataset} with predicted classes, {hits} of them correct"
    return _gallery(images, columns, names, colors, title=title, alt=alt)


def _wrapped(name: str) -> str:
    return textwrap.fill(name, 13)


def _gallery(
    images: Tensor, columns: int, captions: Sequence[str], colors: Sequence[str], *, title: str, alt: str
) -> Picture:
    """Draw uint8 images (N, 3, H, W) in rows with captions below."""
    columns = min(columns, len(images))
    rows = math.ceil(len(images) / columns)
    unit = min(9 / columns, 1.3)  # inches from one image to the next
    lines = max((caption.count("\n") + 1 for caption in captions if caption), default=0)
    room = (0.14 * lines + 0.05) / unit
    figure = Picture(figsize=(columns * unit + 0.2, rows * (1 + room) * unit + 0.4), layout="constrained")
    axis = figure.subplots()
    draw_images(axis, images, columns, room)
    for i, (caption, color) in enumerate(zip(captions, colors, strict=True)):
        row, column = divmod(i, columns)
        axis.text(column + 0.47, row * (1 + room) + 0.98, caption, ha="center", va="top", fontsize=8, color=color)
    figure.suptitle(title, fontsize="medium")
    figure.alt = alt
    return figure


def draw_images(axis: Axes, images: Tensor, columns: int, room: float = 0.0) -> None:
    """Draw uint8 `images` (N, 3, H, W) in rows of `columns`, one unit of the axes apart, `room` below each row."""
    pitch, side = 1 + room, 0.94
    for i, image in enumerate(images):
        row, column = divmod(i, columns)
        extent = (column, column + side, row * pitch + side, row * pitch)
        axis.imshow(image.permute(1, 2, 0).numpy(), extent=extent, interpolation="nearest")
    axis.set(xlim=(-0.02, columns - 0.04), ylim=(math.ceil(len(images) / columns) * pitch, -0.02))
    axis.set_axis_off()


# --- augmentation ---


def augmentation_steps(
    image: Tensor,
    *,
    padding: int = 4,
    top: int = 4,
    left: int = 4,
    mirrored: bool = False,
    cutout: int = 0,
    cutout_top: int = 0,
    cutout_left: int = 0,
    dataset: str,
) -> Picture:
    """Draw the augmentation of one image step by step: reflected border and crop window, crop, flip, cutout.

    Args:
        image: uint8 (3, H, W).
        padding: pixels of reflected border.
        top: offset of the crop in pixels, 0 ... 2 * padding.
        left: likewise.
        mirrored: whether it is flipped.
        cutout: side in pixels of the square that is blanked, here to the image's mean colour.
        cutout_top: offset of that square in pixels.
        cutout_left: likewise.
        dataset: name of the data set.

    Returns:
        The figure.

    Raises:
        UserError: the window does not lie within the border.
    """
    if not (0 <= top <= 2 * padding and 0 <= left <= 2 * padding):
        raise UserError(f"top={top} and left={left} must be 0 ... {2 * padding}, twice padding={padding}")
    side = image.shape[-1]
    padded = F.pad(image[None], (padding,) * 4, mode="reflect")
    crop = augment.crop(padded, torch.tensor([top]), torch.tensor([left]), side)
    flipped = augment.flip(crop, torch.tensor([mirrored]))
    mean = image.float().mean((1, 2))[:, None, None]  # cutout sets what is normalised to 0: the mean
    blanked = augment.cutout(flipped - mean, torch.tensor([cutout_top]), torch.tensor([cutout_left]), cutout) + mean
    steps = {
        f"border of {padding} reflected,\nwindow at ({top}, {left})": padded,
        f"crop of {side} x {side}": crop,
        "flip: mirrored" if mirrored else "flip: not mirrored": flipped,
        f"cutout of {cutout} x {cutout}" if cutout else "cutout: off": blanked.round().to(torch.uint8),
    }
    figure = Picture(figsize=(9, 2.95), layout="constrained")
    ratios = [1 + 2 * padding / side, 1, 1, 1]
    for axis, (name, one) in zip(figure.subplots(1, 4, width_ratios=ratios), steps.items(), strict=True):
        axis.imshow(one[0].permute(1, 2, 0).numpy(), interpolation="nearest")
        axis.set_title(name, fontsize=9)
        axis.tick_params(labelsize=8)
        axis.set_xlabel("pixels", fontsize=8)
    window = (left - 0.5, top - 0.5)
    figure.axes[0].add_patch(Rectangle(window, side, side, fill=False, edgecolor="white", linewidth=3))
    figure.axes[0].add_patch(Rectangle(window, side, side, fill=False, edgecolor=VERMILION, linewidth=1.5))
    figure.suptitle(f"data set: {dataset}", fontsize="medium")
    figure.alt = f"An image of {dataset} in four steps: " + "; ".join(name.replace("\n", " ") for name in steps)
    return figure


# --- whitening ---


def _eigenvalues(covariance: Tensor) -> Tensor:
    """Return the eigenvalues of a covariance, largest first, in float64."""
    return torch.linalg.eigvalsh(covariance.double()).flip(0).clamp(min=0)


def whitening_spectrum(images: Tensor, size: int = 3, eps: float = 1e-2, *, dataset: str) -> Picture:
    """Draw what whitening does to patches: the variances along the eigenpatches and the covariance, before and after.

    Args:
        images: normalised (N, C, H, W), floating point; some hundred are enough.
        size: side of the patches in pixels.
        eps: added to each eigenvalue.
        dataset: name of the data set.

    Returns:
        The figure. The covariances are (C size^2, C size^2), of the patches' pixels and of the filters' outputs.
    """
    covariance = patch_covariance(images, size).double()
    filters = whitening_filters(images.double(), size, eps).flatten(1)  # (n, n)
    whitened = filters @ covariance @ filters.T
    before, after = _eigenvalues(covariance), whitened.diagonal().clamp(min=1e-12)
    figure = Picture(figsize=(10, 3.5), layout="constrained")
    left, middle, right = figure.subplots(1, 3, width_ratios=(1.25, 1, 1))
    numbers = range(1, len(before) + 1)
    styles = [{"markersize": 4, **style} for style in SERIES[:2]]
    left.plot(numbers, before.clamp(min=1e-12), label="before", **styles[0])
    left.plot(numbers, after, label="after", **styles[1])
    left.axhline(eps, color="black", linestyle=":", label=f"eps = {eps:.2g}")
    left.set(xlabel="eigenpatch", ylabel="variance along it", yscale="log")
    left.legend(fontsize="small", loc="lower left")
    tidy(left)
    for axis, matrix, name in (
        (middle, covariance, "before: patch pixels"),
        (right, whitened, "after: filter outputs"),
    ):
        drawn = axis.imshow(matrix.numpy(), cmap="PuOr_r", vmin=-1, vmax=1, interpolation="nearest")
        axis.set_title(name, fontsize="medium")
        axis.set(xticks=[], yticks=[])
    figure.colorbar(drawn, ax=[middle, right], shrink=0.8, label="covariance")
    figure.suptitle(
        f"data set: {dataset}, {len(images):,} images, patches of {size} x {size} pixels", fontsize="medium"
    )
    figure.alt = (
        f"Variances from {before[0].item():.2g} to {before[-1].item():.2g} before whitening and from "
        f"{after.max().item():.2g} to {after.min().item():.2g} after; the covariance becomes diagonal"
    )
    return figure


# --- what a network makes of images ---


def tta_votes(
    model: Network, image: Tensor, label: int, classes: Sequence[str], *, tta: str = "flip_shift", dataset: str
) -> Picture:
    """Draw the views that test-time augmentation shows a network, what each view votes for, and their average.

    Args:
        model: a trained network.
        image: uint8 (3, H, W).
        label: its class, an index.
        classes: names of the K classes.
        tta: `none`, `flip` or `flip_shift`.
        dataset: name of the data set.

    Returns:
        The figure; the average is taken of the logits, as `predict_logits` takes it.
    """
    weights, seen = zip(*views(image[None], tta), strict=True)
    logits = predict_logits(model, torch.cat(seen)).cpu()  # (V, K)
    votes = logits.softmax(1)
    average = (torch.tensor(weights)[:, None] * logits).sum(0).softmax(0)  # (K,)

    figure = Picture(figsize=(9, 4.9), layout="constrained")
    top, bottom = figure.subplots(2, 1, height_ratios=(1, 1.4))
    draw_images(top, torch.cat(seen), len(seen), room=0.5)
    for i, (weight, vote) in enumerate(zip(weights, votes, strict=True)):
        share, guess = vote.max(0)
        right = int(guess) == label
        text = f"weight {weight:.3g}\n{_wrapped(classes[int(guess)])} {100 * share.item():.0f} %"
        text, color = (text, "black") if right else (f"{text} \u2717", VERMILION)
        top.text(i + 0.47, 0.98, text, ha="center", va="top", fontsize=8, color=color)
    places = np.arange(len(classes))
    bottom.bar(
        places,
        100 * average.numpy(),
        width=0.8,
        color="#56B4E9",
        edgecolor="black",
        linewidth=0.6,
        label="average of the logits",
    )
    for i, vote in enumerate(votes):
        # From left to right as the views stand above; each second view is a mirror image.
        offset = 0.6 * ((i + 0.5) / len(votes) - 0.5)
        style = {"marker": "s", "facecolor": "white"} if i % 2 else {"marker": "o", "facecolor": "black"}
        name = ("a mirrored view" if i % 2 else "a view") if i < 2 else "_"
        bottom.scatter(
            places + offset, 100 * vote.numpy(), s=16, edgecolor="black", linewidth=0.9, zorder=3, label=name, **style
        )
    bottom.set(ylabel="probability in %", ylim=(-3, 103))
    bottom.set_xticks(places.tolist(), [_wrapped(name) for name in classes], fontsize=8)
    bottom.get_xticklabels()[label].set_fontweight("bold")
    tidy(bottom)
    bottom.legend(fontsize="small")
    guess = int(average.argmax())
    verdict = "right" if guess == label else "wrong"
    found = f"{classes[guess]} {100 * average[guess].item():.0f} %, {verdict}"
    figure.suptitle(
        f"label: {classes[label]}; average of the views: {found}\nTTA: {tta}, data set: {dataset}",
        fontsize="medium",
    )
    figure.alt = (
        f"{len(seen)} views of an image ({classes[label]}), the class probabilities of each, and of their average"
    )
    return figure


def confusion_matrix(confusion: Tensor, classes: Sequence[str], *, dataset: str) -> Picture:
    """Draw which classes the model confuses, in % of the images of each true class.

    Args:
        confusion: int64 (K, K), images of class [row] that were predicted as class [column].
        classes: names of the K classes.
        dataset: name of the data set.

    Returns:
        The figure; the diagonal counts the correct predictions, and only mistakes are coloured.
    """
    shares = 100 * confusion.double() / confusion.sum(1, keepdim=True).clamp(min=1)
    mistakes = shares.clone().fill_diagonal_(0)
    accuracy = 100 * confusion.diagonal().sum().item() / max(1, confusion.sum().item())
    figure = Picture(figsize=(7, 5.8), layout="constrained")
    axis = figure.subplots()
    most = max(mistakes.max().item(), 1e-9)
    drawn = axis.imshow(mistakes.numpy(), cmap="Blues", vmin=0, vmax=most)
    for row, shares_of_row in enumerate(shares.tolist()):
        for column, share in enumerate(shares_of_row):
            if confusion[row, column]:
                style: dict[str, Any] = {"weight": "bold"} if row == column else {}
                color = "white" if row != column and share > 0.6 * most else "black"
                axis.text(column, row, f"{share:.1f}", ha="center", va="center", fontsize=8, color=color, **style)
    ticks = range(len(classes))
    axis.set_xticks(ticks, classes, rotation=45, ha="right", rotation_mode="anchor", fontsize=8)
    axis.set_yticks(ticks, classes, fontsize=8)
    axis.set(xlabel="predicted class", ylabel="true class")
    bar = figure.colorbar(drawn, ax=axis, shrink=0.8)
    bar.set_label("mistakes, in % of the true class")
    figure.suptitle(
        f"data set: {dataset}, {int(confusion.sum()):,} images, accuracy {accuracy:.2f} %", fontsize="medium"
    )
    row, column = divmod(int(mistakes.argmax()), len(classes))
    figure.alt = (
        f"Confusion matrix with an accuracy of {accuracy:.2f} %; the most frequent mistake: {classes[row]} "
        f"predicted as {classes[column]}, {mistakes.max().item():.1f} %"
    )
    return figure
