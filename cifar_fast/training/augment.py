"""Augmentation of a whole batch in one call, each image by its own choice; `batches.py` draws the choices."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def reflect_pad(images: Tensor, padding: int) -> Tensor:
    """Mirror `padding` pixels outward at each border of `images` (N, C, H, W), any dtype, the edge pixel excepted."""
    if padding == 0:
        return images
    # torch's own reflection padding takes no uint8. Slices are copied, since a gather by index handles each byte alone:
    # 50,000 images took five times as long.
    height, width = images.shape[-2:]
    layout = torch.channels_last if images.is_contiguous(memory_format=torch.channels_last) else torch.contiguous_format
    shape = (*images.shape[:2], height + 2 * padding, width + 2 * padding)
    padded = torch.empty(shape, dtype=images.dtype, device=images.device, memory_format=layout)
    inside = slice(padding, -padding)
    padded[:, :, inside, inside] = images
    for out in range(1, padding + 1):
        padded[:, :, inside, padding - out] = images[..., out]
        padded[:, :, inside, padding + width - 1 + out] = images[..., width - 1 - out]
    for out in range(1, padding + 1):  # whole rows, with the columns that were just filled
        padded[:, :, padding - out] = padded[:, :, padding + out]
        padded[:, :, padding + height - 1 + out] = padded[:, :, padding + height - 1 - out]
    return padded


def crop(padded: Tensor, tops: Tensor, lefts: Tensor, size: int, images: Tensor | None = None) -> Tensor:
    """Cut one window of `size` x `size` pixels out of each image.

    `padded`: (M, C, P, P), any dtype. `tops`, `lefts`: int64 (N,), offsets 0 ... P - size, in pixels. `images`: int64
    (N,), which image each window is cut from; all in order when left out. Returns (N, C, size, size).
    """
    if images is None:
        images = torch.arange(len(padded), device=padded.device)
    windows = padded.unfold(2, size, 1).unfold(3, size, 1)  # (M, C, P - size + 1, P - size + 1, size, size), a view
    return windows[images, :, tops, lefts]


def flip(images: Tensor, mirrored: Tensor) -> Tensor:
    """Mirror left to right those `images` (N, C, H, W) for which `mirrored`, bool (N,), says so."""
    return torch.where(mirrored[:, None, None, None], images.flip(-1), images)


def cutout(images: Tensor, tops: Tensor, lefts: Tensor, size: int, value: float = 0.0) -> Tensor:
    """Set a square of `size` x `size` pixels to `value` in each of `images` (N, C, H, W); `tops`, `lefts`: int64 (N,),
    in pixels.

    Source: DeVries and Taylor, "Improved regularization of convolutional neural networks with cutout", arXiv
    1708.04552.
    """
    rows = torch.arange(images.shape[-2], device=images.device)[None, :, None]  # (1, H, 1)
    columns = torch.arange(images.shape[-1], device=images.device)[None, None, :]  # (1, 1, W)
    tops, lefts = tops[:, None, None], lefts[:, None, None]  # (N, 1, 1)
    inside = (rows >= tops) & (rows < tops + size) & (columns >= lefts) & (columns < lefts + size)  # (N, H, W)
    return images.masked_fill(inside[:, None], value)


def jitter(images: Tensor, contrast: Tensor, brightness: Tensor) -> Tensor:
    """Multiply each normalised image (N, C, H, W) by its `contrast` (N,), and add its `brightness` (N,)."""
    return images * contrast[:, None, None, None] + brightness[:, None, None, None]


def resize(images: Tensor, size: int) -> Tensor:
    """Resample floating-point `images` (N, C, H, W) to (N, C, size, size), unless they have that size."""
    if images.shape[-1] == size:
        return images
    return F.interpolate(images, size=(size, size), mode="bilinear", antialias=True)
