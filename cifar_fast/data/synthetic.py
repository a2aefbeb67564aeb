"""Draws the synthetic data set, for machines without real data; accuracies on it say nothing about CIFAR-10."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from cifar_fast.data.dataset import IMAGE_SIZE, SYNTHETIC, Dataset, build_dataset
from cifar_fast.errors import DataError

_LOBES = (1, 2, 3, 4, 5)
_CLASSES = tuple(f"{fill} {lobes}-lobed pinwheel" for fill in ("solid", "hollow") for lobes in _LOBES)
_N_PIECES_BEHIND, _N_PIECES_IN_FRONT = 2, 1  # of clutter, per image
_CHUNK = 500  # images drawn at once, so that the working set stays in the processor's cache


def synthetic(n_train: int = 20_000, n_test: int = 4_000, seed: int = 0) -> Dataset:
    """Draw a data set of ten shapes, for machines without real data.

    The class is the shape of a pinwheel: 1 to 5 lobes, solid or hollow. Its position, size, tilt, handedness, colour
    and texture are random and say nothing about the class, and there is clutter behind it and in front of it.

    Args:
        n_train: number of training images.
        n_test: number of test images, drawn independently from the same distribution.
        seed: the same seed draws the same images.

    Returns:
        The data set; all classes are equally frequent.

    Raises:
        DataError: n_train or n_test is less than 1.
    """
    if n_train < 1 or n_test < 1:
        raise DataError(
            f"A synthetic set needs at least one training and one test image, not n_train={n_train}, n_test={n_test}."
        )
    train, test = (_draw(n, 2 * seed + part) for part, n in enumerate((n_train, n_test)))
    return build_dataset(SYNTHETIC, _CLASSES, train, test, f"drawn by cifar_fast, seed {seed}")


def _draw(n: int, seed: int) -> tuple[Tensor, Tensor]:
    """Draw n images, uint8 (n, 3, 32, 32), and their labels, int64 (n,)."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randperm(n, generator=generator) % len(_CLASSES)
    images = torch.cat([_draw_chunk(chunk, generator) for chunk in labels.split(_CHUNK)])
    return images, labels


def _draw_chunk(labels: Tensor, generator: torch.Generator) -> Tensor:
    """Draw one image for each label: background, clutter, pinwheel, clutter, noise."""
    n = len(labels)

    def uniform(low: float, high: float, channels: int = 1) -> Tensor:  # (n, channels, 1, 1)
        return low + (high - low) * torch.rand(n, channels, 1, 1, generator=generator)

    pixels = torch.arange(IMAGE_SIZE) + 0.5
    y, x = pixels.view(1, 1, -1, 1), pixels.view(1, 1, 1, -1)

    def stripes() -> Tensor:  # (n, 1, 32, 32), from -1 to 1
        angle, frequency = uniform(0, math.pi), uniform(0.3, 1.5)
        return torch.sin(frequency * (x * angle.cos() + y * angle.sin()) + uniform(0, 2 * math.pi))

    def paint(canvas: Tensor, coverage: Tensor, colour: Tensor) -> Tensor:
        return canvas + coverage * (colour - canvas)

    def clutter(canvas: Tensor) -> Tensor:
        u, v = x - uniform(0, IMAGE_SIZE), y - uniform(0, IMAGE_SIZE)
        angle = uniform(0, math.pi)
        u, v = u * angle.cos() + v * angle.sin(), v * angle.cos() - u * angle.sin()
        inside = 1 - ((u / uniform(1, 6)).square() + (v / uniform(1, 3)).square()).sqrt()
        return paint(canvas, (4 * inside).clamp(0, 1), uniform(0, 1, 3))

    background = uniform(0.2, 0.8, 3)
    direction = torch.nn.functional.normalize(uniform(-1, 1, 3), dim=1)
    canvas = background + uniform(0, 0.1) * stripes()
    for _ in range(_N_PIECES_BEHIND):
        canvas = clutter(canvas)

    radius = uniform(8, 13)
    margin = 0.8 * radius
    across = margin + (IMAGE_SIZE - 2 * margin) * uniform(0, 1)
    down = margin + (IMAGE_SIZE - 2 * margin) * uniform(0, 1)
    mirror = torch.sign(uniform(-1, 1))
    lobes = torch.tensor(_LOBES)[labels % len(_LOBES)].view(-1, 1, 1, 1)
    is_hollow = (labels >= len(_LOBES)).view(-1, 1, 1, 1)
    u, v = mirror * (x - across), y - down  # (n, 1, 32, 32)
    distance = (u.square() + v.square()).sqrt() / radius
    angle = torch.atan2(v, u) + 0.8 * distance + uniform(-0.5, 0.5)  # the twist makes it differ from its mirror image
    contour = 0.68 + 0.32 * torch.cos(lobes * angle)
    coverage = (radius * (contour - distance) + 0.5).clamp(0, 1)
    hole = (radius * (contour - 0.28 - distance) + 0.5).clamp(0, 1)
    coverage = coverage - torch.where(is_hollow, hole, 0.0)
    canvas = paint(canvas, coverage, background + uniform(0.4, 0.8) * direction + uniform(0, 0.1) * stripes())
    for _ in range(_N_PIECES_IN_FRONT):
        canvas = clutter(canvas)

    canvas = canvas + uniform(0.02, 0.08) * torch.randn(canvas.shape, generator=generator)
    return (255 * canvas).clamp(0, 255).to(torch.uint8)  # (n, 3, 32, 32)
