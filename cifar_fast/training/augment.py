"""Augments a whole batch in one call, with a random choice for each image; `batches.py` draws the choices."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def crop(padded: Tensor, tops: Tensor, lefts: Tensor, size: int, images: Tensor | None = None) -> Tensor:
    """Cut one window of `size` x `size` pixels out of each image.

    `padded`: (M, C, P, P), any dtype. `tops`, `lefts`: int64 (N,), offsets 0 ... P - size, in pixels. `images`: int64
    (N,), the image that each window is cut from; by default all images in order. Returns (N, C, size, size).
    """
    if images is None:
        images = torch.arange(len(padded), device=padded.device)
    windows = padded.unfold(2, size, 1).unfold(3, size, 1)  # (M, C, P - size + 1, P - size + 1, size, size), a view
    return windows[images, :, tops, lefts]


def flip(images: Tensor, mirrored: Tensor) -> Tensor:
    """Mirror left to right those `images` (N, C, H, W) that `mirrored`, bool (N,), selects."""
    return torch.where(mirrored[:, None, None, None], images.flip(-1), images)


def cutout(images: Tensor, tops: Tensor, lefts: Tensor, size: int, value: float = 0.0) -> Tensor:
    """Set a square of `size` x `size` pixels to `value` in each of `images` (N, C, H, W).

    `tops`, `lefts`: int64 (N,), in pixels; the square may lie partly outside the image. Source: DeVries and Taylor,
    "Improved regularization of convolutional neural networks with cutout", arXiv 1708.04552.
    """
    rows = torch.arange(images.shape[-2], device=images.device)[None, :, None]  # (1, H, 1)
    columns = torch.arange(images.shape[-1], device=images.device)[None, None, :]  # (1, 1, W)
    tops, lefts = tops[:, None, None], lefts[:, None, None]  # (N, 1, 1)
    inside = (rows >= tops) & (rows < tops + size) & (columns >= lefts) & (columns < lefts + size)  # (N, H, W)
    return images.masked_fill(inside[:, None], value)


def jitter(images: Tensor, contrast: Tensor, brightness: Tensor) -> Tensor:
    """Multiply each normalised image (N, C, H, W) by its `contrast` (N,) and add its `brightness` (N,)."""
    return images * contrast[:, None, None, None] + brightness[:, None, None, None]


def resize(images: Tensor, size: int) -> Tensor:
    """Resample floating-point `images` (N, C, H, W) to (N, C, size, size), unless they have that size."""
    if images.shape[-1] == size:
        return images
    return F.interpolate(images, size=(size, size), mode="bilinear", antialias=True)
