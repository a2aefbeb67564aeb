"""Counts the arithmetic of a training run from the shapes of its layers: a cost that no machine's speed changes."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import cache

import torch
from torch.utils.flop_counter import FlopCounterMode

from cifar_fast.recipe import Recipe
from cifar_fast.training.batches import steps_per_epoch
from cifar_fast.training.model import build_model, whiten_first_layer
from cifar_fast.training.step import forward_backward, freeze_whitening_bias

COUNTED_IMAGES = 2
"""Images in the batch that is counted; batch norm needs two."""


def train_flop(recipe: Recipe, n_train: int = 50_000, *, image_size: int = 32, n_classes: int = 10) -> float:
    """Return the floating-point operations of the forward and backward passes of a whole training run.

    A multiplication and an addition count as two operations. Convolutions and matrix products are counted, as PyTorch's
    `FlopCounterMode` counts them; norms, activations, pooling, the optimiser and evaluation are not. Winograd's
    algorithm, which needs fewer multiplications, is counted as the convolution that it computes.

    Args:
        recipe: what is trained; its `resolutions` say how large the images of each epoch are.
        n_train: number of training images. Those that do not fill a batch are left out of an epoch, as in training.
        image_size: side in pixels of the images of the data set.
        n_classes: number of classes.

    Raises:
        RecipeError: there are too few images for a batch.
    """
    per_epoch = steps_per_epoch(recipe, n_train) * recipe.global_batch_size
    total = 0.0
    for epoch in range(math.ceil(recipe.epochs)):
        size = recipe.resolution(epoch, image_size)
        share = min(1.0, recipe.epochs - epoch)
        learned = min(share, max(0.0, recipe.whitening_bias_epochs - epoch))
        for frozen, part in ((False, learned), (True, share - learned)):
            if part:
                total += part * per_epoch * _flop_per_image(_shape_fields(recipe), size, n_classes, frozen)
    return total


def _shape_fields(recipe: Recipe) -> Recipe:
    """Return the recipe with only those fields that change shapes, so that its count can be looked up."""
    return replace(
        Recipe(),
        network=recipe.network,
        widths=recipe.widths,
        pool_position=recipe.pool_position,
        whitening_size=recipe.whitening_size,
        channels_last=False,
        convolution="direct",
        precision="float32",
        fuse_norm=False,
    )


@cache
def _flop_per_image(recipe: Recipe, size: int, n_classes: int, frozen: bool) -> float:
    no_shift = torch.zeros(3)
    model = build_model(recipe, n_classes, no_shift, no_shift + 1, convolution="direct", fuse_norm=False, seed=0)
    # Any images will do: what counts is that the whitening filters are then fixed, and have no gradient.
    whiten_first_layer(model, recipe, torch.randint(256, (8, 3, 32, 32), dtype=torch.uint8))
    freeze_whitening_bias(model, frozen)
    images, labels = torch.zeros(COUNTED_IMAGES, 3, size, size), torch.zeros(COUNTED_IMAGES, dtype=torch.int64)
    with FlopCounterMode(display=False) as counter:
        forward_backward(model, images, labels, recipe, torch.float32)
    return counter.get_total_flops() / COUNTED_IMAGES
