"""How good a network is on unseen images: loss, accuracy, confusion, with or without test-time augmentation."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cifar_fast.hardware.numerics import HALF
from cifar_fast.training.augment import reflect_pad
from cifar_fast.training.model import Network


@dataclass(frozen=True)
class Evaluation:
    """What a network makes of a set of labelled images."""

    loss: float
    """Mean cross entropy, without label smoothing."""
    accuracy: float
    """Share of images whose largest logit is their label's, 0 ... 1."""
    confusion: Tensor
    """int64 (classes, classes): how many images of class [row] were taken for class [column]."""


@dataclass(frozen=True)
class Calibration:
    """How sure a network is of its predictions beside how often they are right, by bins of its confidence."""

    confidence: Tensor
    """float64 (bins,): mean probability of the predicted class; not a number where the bin is empty."""
    accuracy: Tensor
    """float64 (bins,): share of these predictions that are right; likewise."""
    count: Tensor
    """int64 (bins,): images in the bin."""

    @property
    def error(self) -> float:
        """Mean distance over the images between their bins' confidence and accuracy, 0 ... 1."""
        return (
            (self.confidence - self.accuracy).abs().nan_to_num() * self.count
        ).sum().item() / self.count.sum().item()


def calibration(probabilities: Tensor, labels: Tensor, n_bins: int = 10) -> Calibration:
    """Compare the confidence of predictions, float (N, classes), with how often they hit int64 `labels` (N,).

    The bins are equally wide. `error` is the expected calibration error of Guo, Pleiss, Sun and Weinberger, "On
    calibration of modern neural networks", arXiv 1706.04599.
    """
    confidence, predicted = probabilities.double().max(1)
    hits = (predicted == labels).double()
    place = (confidence * n_bins).long().clamp(max=n_bins - 1)
    count = torch.bincount(place, minlength=n_bins)
    sums = (torch.bincount(place, weights=values, minlength=n_bins) for values in (confidence, hits))
    mean_confidence, accuracy = (each / count for each in sums)
    return Calibration(mean_confidence, accuracy, count)


def views(images: Tensor, tta: str) -> Iterator[tuple[float, Tensor]]:
    """Yield the views of `images` (N, C, H, W) that test-time augmentation averages, each with its weight; the weights
    sum to 1.

    `none`: the images. `flip`: and their mirror images. `flip_shift`: both again, shifted by a pixel up-left and down-
    right, which together weigh as much as the unshifted pair. Source: Keller Jordan, arXiv 2404.00498.
    """
    if tta == "none":
        yield 1.0, images
        return
    flip_weight = 0.5 if tta == "flip" else 0.25
    yield flip_weight, images
    yield flip_weight, images.flip(-1)
    if tta == "flip_shift":
        padded, (height, width) = reflect_pad(images, 1), images.shape[-2:]
        for offset in (0, 2):
            shifted = padded[:, :, offset : offset + height, offset : offset + width]
            yield 0.125, shifted
            yield 0.125, shifted.flip(-1)


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


def at_least_float32(logits: Tensor) -> Tensor:
    """Return half-precision `logits` in float32, in which a softmax keeps its digits; others as they are."""
    return logits.float() if logits.dtype in HALF else logits


@torch.inference_mode()
def predict_logits(
    model: Network,
    images: Tensor,
    *,
    tta: str = "none",
    tta_margin: float = 1.0,
    dtype: torch.dtype = torch.float32,
    batch_size: int = 500,
    on_batch: Callable[[], None] | None = None,
) -> Tensor:
    """Return the logits, float32 (N, classes), of uint8 `images` (N, 3, H, W), computed in `dtype`.

    Below 1, `tta_margin` spares test-time augmentation those images whose two likeliest classes, seen once, differ by
    more than this in probability: an average seldom turns them. Each image is decided on by itself, so the answer does
    not depend on batches or processes. `on_batch` is called after each batch. A network in float64 gives float64.
    """
    device = model.normalise.mean.device
    logits = []
    with _evaluating(model), torch.autocast(device.type, dtype, enabled=dtype in HALF):
        for some in images.split(batch_size):
            normalised = model.normalise(some.to(device)).contiguous(memory_format=torch.channels_last)
            if tta == "none" or tta_margin >= 1:
                logits.append(_averaged(model, normalised, tta))
            else:
                logits.append(_averaged(model, normalised, "none"))
                unsure = margins(logits[-1]) <= tta_margin
                if unsure.any():
                    logits[-1][unsure] = _averaged(model, normalised[unsure], tta)
            if on_batch:
                on_batch()
    return torch.cat(logits)


def _averaged(model: Network, normalised: Tensor, tta: str) -> Tensor:
    seen = [
        weight * at_least_float32(model(view.contiguous(memory_format=torch.channels_last)))
        for weight, view in views(normalised, tta)
    ]
    return torch.stack(seen).sum(0)


def margins(logits: Tensor) -> Tensor:
    """Return by how much the two likeliest classes differ in probability, (N,), 0 ... 1, for `logits` (N, classes)."""
    first, second = logits.softmax(1).topk(2, dim=1).values.unbind(1)
    return first - second


def predict_probabilities(model: Network, images: Tensor, *, tta: str = "none") -> Tensor:
    """Return the class probabilities, float32 (N, classes), of uint8 `images` (N, 3, H, W)."""
    return predict_logits(model, images, tta=tta).softmax(1)


def evaluate(
    model: Network,
    images: Tensor,
    labels: Tensor,
    *,
    tta: str = "none",
    tta_margin: float = 1.0,
    dtype: torch.dtype = torch.float32,
    batch_size: int = 500,
    on_batch: Callable[[], None] | None = None,
) -> Evaluation:
    """Compare the predictions for uint8 `images` (N, 3, H, W) with int64 `labels` (N,)."""
    logits = predict_logits(
        model, images, tta=tta, tta_margin=tta_margin, dtype=dtype, batch_size=batch_size, on_batch=on_batch
    )
    labels = labels.to(logits.device)
    n_classes = logits.shape[1]
    predicted = logits.argmax(1)
    confusion = torch.bincount(labels * n_classes + predicted, minlength=n_classes**2).reshape(n_classes, n_classes)
    return Evaluation(
        loss=F.cross_entropy(logits, labels).item(),
        accuracy=(predicted == labels).double().mean().item(),
        confusion=confusion.cpu(),
    )
