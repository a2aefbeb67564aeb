"""How gradients lie in memory: one flat buffer that a single all-reduce averages."""

from __future__ import annotations

import torch
from torch import Tensor, nn

ALIGNMENT = 64
"""Each gradient starts at a multiple of this many numbers, so that a GPU can load several at a time."""


def flat_gradients(model: nn.Module) -> Tensor:
    """Make every gradient of `model` a view of one new buffer of zeros, and return that buffer.

    Each view has the memory order of its weights, so the backward pass adds to it in place. The gradients must stay in
    the buffer: zero it instead of setting them to None.
    """
    learned = [p for p in model.parameters() if p.requires_grad]
    sizes = [-(-p.numel() // ALIGNMENT) * ALIGNMENT for p in learned]
    buffer = torch.zeros(sum(sizes), dtype=learned[0].dtype, device=learned[0].device)
    for p, part in zip(learned, buffer.split(sizes), strict=True):
        p.grad = part.as_strided(p.size(), p.stride())
    return buffer


def in_memory_order(gradient: Tensor) -> Tensor:
    """Return a flat view of a dense tensor, (numel,), with its elements as they lie in memory."""
    if gradient.is_contiguous():
        return gradient.view(-1)
    outermost_first = sorted(range(gradient.ndim), key=gradient.stride, reverse=True)
    return gradient.permute(outermost_first).view(-1)


def fill_in_zeros(model: nn.Module) -> None:
    """Give every learned parameter that took no part in a step a gradient of zero.

    Otherwise the ranks might average different parameters, and an optimiser skip some on one rank alone.
    """
    for p in model.parameters():
        if p.requires_grad and p.grad is None:
            p.grad = torch.zeros_like(p)
