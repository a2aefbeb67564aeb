"""The exercises of notebook 06: ghost batch norm."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cifar_fast.teaching.exercises.checks import Wrong, exercise, expect_close
from cifar_fast.training.layers import GhostBatchNorm


def _images(n: int, channels: int = 3, side: int = 5) -> Tensor:
    """Return random images, float64 (n, channels, side, side), whose means differ from image to image."""
    generator = torch.Generator().manual_seed(6)
    shape = (n, channels, side, side)
    noise = torch.randn(shape, dtype=torch.float64, generator=generator)
    return noise + torch.randn((n, channels, 1, 1), dtype=torch.float64, generator=generator)


@exercise(
    "06.1",
    title="The statistics of all GPUs",
    difficulty=1,
    minutes=5,
    hints=(
        "The mean is easy: the GPUs have equally many images. For the variance, look at the formula with the two parts "
        "within and between.",
        "The variance of the batch is the average of the variances plus the variance of the means, with correction=0.",
    ),
    wrong=(lambda means, variances: (means.mean(0), variances.mean(0)),),
)
def whole_batch(answer: Callable[[Tensor, Tensor], Any]) -> None:
    """Compare with the statistics of all images together."""
    x = _images(24)
    on_gpus = x.unflatten(0, (4, 6))
    found = answer(on_gpus.mean((1, 3, 4)), on_gpus.var((1, 3, 4), correction=0))
    if not isinstance(found, tuple | list) or len(found) != 2:
        raise Wrong("return two things: the mean and the variance")
    expect_close(found[0], x.mean((0, 2, 3)), "the mean of the batch")
    expect_close(found[1], x.var((0, 2, 3), correction=0), "the variance of the batch")


@exercise(
    "06.2",
    title="Images dealt like cards",
    difficulty=2,
    minutes=10,
    hints=(
        "x.unflatten(0, (-1, n_gpus)) puts the images of GPU r into column r. Which dimensions belong to one GPU?",
        "Take the mean and the variance over the dimensions 0, 3 and 4 with keepdim=True; flatten(0, 1) puts the "
        "images back into their order.",
    ),
    wrong=(
        lambda x, n_gpus: torch.cat([F.batch_norm(x[r::n_gpus], None, None, training=True) for r in range(n_gpus)]),
    ),
)
def norm_of_dealt_images(answer: Callable[[Tensor, int], Any]) -> None:
    """Compare with a batch norm of each GPU's images, put back where they came from."""
    for n_gpus in (2, 4):
        x = _images(16)
        wanted = torch.empty_like(x)
        for rank in range(n_gpus):
            wanted[rank::n_gpus] = F.batch_norm(x[rank::n_gpus], None, None, training=True, eps=1e-5)
        expect_close(answer(x, n_gpus), wanted, f"the output for 16 images on {n_gpus} GPUs")


@exercise(
    "06.3",
    title="A batch in parts",
    difficulty=2,
    minutes=15,
    hints=(
        "images.split(part) gives the parts. Calling backward() for each adds to the gradients that are there.",
        "The mean loss of the batch is the sum over all images divided by their number: with reduction='sum', divide "
        "the loss of each part by len(images).",
    ),
    wrong=(
        lambda model, images, labels, part: F.cross_entropy(model(images), labels).backward(),
        lambda model, images, labels, part: [
            F.cross_entropy(model(some), theirs).backward()
            for some, theirs in zip(images.split(part), labels.split(part), strict=True)
        ],
    ),
    returns_nothing=True,
)
def gradients_in_parts(answer: Callable[[nn.Module, Tensor, Tensor, int], Any]) -> None:
    """Compare the gradients with those of the whole batch, and watch how many images the model gets at a time."""
    part, images, labels = 4, _images(16), torch.arange(16) % 5
    torch.manual_seed(6)
    norm = GhostBatchNorm(8, part, eps=1e-5, momentum=0.1, freeze_scale=False)
    whole = nn.Sequential(nn.Conv2d(3, 8, 3), norm, nn.ReLU(), nn.Flatten(), nn.Linear(72, 5)).double()
    theirs = deepcopy(whole)
    F.cross_entropy(whole(images), labels).backward()
    sizes: list[int] = []
    theirs.register_forward_pre_hook(lambda module, given: sizes.append(len(given[0])))
    answer(theirs, images, labels, part)
    if sizes and max(sizes) > part:
        raise Wrong(f"the model got {max(sizes)} images at a time, and may get {part}")
    for (name, wanted), found in zip(whole.named_parameters(), theirs.parameters(), strict=True):
        if found.grad is None:
            raise Wrong(f"the parameter {name} has no gradient")
        expect_close(found.grad, wanted.grad, f"the gradient of {name}")
