"""Measures a network on unseen images: loss, accuracy, confusion, with or without test-time augmentation."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cifar_fast.hardware.device import has_float64
from cifar_fast.hardware.numerics import HALF
from cifar_fast.training.model import Network

VIEWS = {"none": 1, "flip": 2, "flip_shift": 6}
"""How many times each test-time augmentation shows an image to the network."""


@dataclass(frozen=True)
class Evaluation:
    """The performance of a network on a set of labelled images."""

    loss: float
    """Mean cross entropy, without label smoothing."""
    accuracy: float
    """Share of images whose largest logit is their label's, 0 ... 1."""
    confusion: Tensor
    """int64 (classes, classes): the number of images of class [row] that were classified as [column]."""
    logits: Tensor = field(repr=False, compare=False)
    """float32 (N, classes), on the network's device, with test-time augmentation."""


@dataclass(frozen=True)
class Calibration:
    """The confidence of a network beside the share of its predictions that are right, in bins of confidence."""

    confidence: Tensor
    """float64 (bins,): mean probability of the predicted class; NaN in an empty bin."""
    accuracy: Tensor
    """float64 (bins,): share of these predictions that are right; NaN in an empty bin."""
    count: Tensor
    """int64 (bins,): number of images in the bin."""

    @property
    def error(self) -> float:
        """Mean gap between confidence and accuracy, each bin weighted by its images, 0 ... 1."""
        gaps = (self.confidence - self.accuracy).abs().nan_to_num()
        return (gaps * self.count).sum().item() / self.count.sum().item()


def calibration(probabilities: Tensor, labels: Tensor, n_bins: int = 10) -> Calibration:
    """Compare the confidence of `probabilities`, float (N, classes), with the share that is right by `labels`, (N,).

    The bins are equally wide. `error` is the expected calibration error of Guo, Pleiss, Sun and Weinberger, "On
    calibration of modern neural networks", arXiv 1706.04599.
    """
    confidence, predicted = probabilities.double().max(1)
    right = (predicted == labels).double()
    bin_index = (confidence * n_bins).long().clamp(max=n_bins - 1)
    count = torch.bincount(bin_index, minlength=n_bins)
    sums = (torch.bincount(bin_index, weights=values, minlength=n_bins) for values in (confidence, right))
    mean_confidence, accuracy = (each / count for each in sums)
    return Calibration(mean_confidence, accuracy, count)


def views(images: Tensor, tta: str) -> Iterator[tuple[float, Tensor]]:
    """Yield the views of `images` (N, C, H, W) that test-time augmentation averages, each after its weight.

    `none`: the images alone. `flip`: the images and their mirror images. `flip_shift`: in addition both shifted by a
    pixel, up-left and down-right; the shifted views together weigh as much as the unshifted pair. All weights sum to 1.
    Source: Keller Jordan, arXiv 2404.00498.
    """
    if tta == "none":
        yield 1.0, images
        return
    flip_weight = 0.5 if tta == "flip" else 0.25
    yield flip_weight, images
    yield flip_weight, images.flip(-1)
    if tta == "flip_shift":
        padded, (height, width) = F.pad(images, (1, 1, 1, 1), mode="reflect"), images.shape[-2:]
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
    """Return half-precision `logits` in float32, where a softmax keeps its digits, and others as they are."""
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

    A `tta_margin` below 1 skips test-time augmentation for an image if its two likeliest classes, from a single view,
    differ by more than this in probability: an average seldom changes such a prediction. The choice is made for each
    image alone, so the result does not depend on batches or processes. `on_batch` is called after each batch. A network
    in float64 returns float64.
    """
    device = model.normalise.mean.device
    logits = []
    with _evaluating(model), torch.autocast(device.type, dtype, enabled=dtype in HALF):
        for some in images.split(batch_size):
            normalised = model.normalise(some.to(device)).contiguous(memory_format=model.memory_format)
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
        weight * at_least_float32(model(view.contiguous(memory_format=model.memory_format)))
        for weight, view in views(normalised, tta)
    ]
    return torch.stack(seen).sum(0)


def margins(logits: Tensor) -> Tensor:
    """Return the difference in probability between the two likeliest classes, (N,), for `logits` (N, classes)."""
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
    """Compare predictions for uint8 `images` (N, 3, H, W) with int64 `labels` (N,); arguments as `predict_logits`."""
    logits = predict_logits(
        model, images, tta=tta, tta_margin=tta_margin, dtype=dtype, batch_size=batch_size, on_batch=on_batch
    )
    return score(logits, labels)


def score(logits: Tensor, labels: Tensor) -> Evaluation:
    """Compare `logits` (N, classes) with int64 `labels` (N,)."""
    if not has_float64(logits.device):
        logits = logits.cpu()
    labels = labels.to(logits.device)
    n_classes = logits.shape[1]
    cells = labels * n_classes + logits.argmax(1)
    counts = torch.zeros(n_classes**2, dtype=torch.float64, device=logits.device)
    counts.scatter_add_(0, cells, torch.ones_like(cells, dtype=torch.float64))
    # One copy to the host for all figures: each copy makes the host wait for a GPU.
    loss, *counted = torch.cat([F.cross_entropy(logits, labels).double()[None], counts]).tolist()
    confusion = torch.tensor(counted, dtype=torch.float64).long().reshape(n_classes, n_classes)
    return Evaluation(loss, confusion.diagonal().sum().item() / len(labels), confusion, logits)
