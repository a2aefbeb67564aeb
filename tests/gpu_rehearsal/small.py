"""The GPU recipes, made small enough to be computed on a CPU in float64."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from cifar_fast.recipe import Recipe
from cifar_fast.recipes import named

NAMES = ("speedrun", "apple_8gpu", "airbench_2024", "page_2019")
BATCH = 32


def small(name: str, **changes: Any) -> Recipe:
    """Return the recipe with narrow layers, small batches and two epochs, computed in float64, eager.

    Everything else is the recipe's own, and what it does only once in a while it does within these two epochs.
    """
    recipe = named(name)
    smaller = replace(
        recipe,
        widths=(4, 8, 8) if recipe.network == "convnet6" else (4, 4, 8, 8),
        global_batch_size=BATCH,
        n_shards=min(recipe.n_shards, 2),
        ghost_batch_size=8 if recipe.ghost_batch_size else 0,
        # The mean loss of a small batch is as noisy as the mean of few images: rates fall with the batch.
        peak_lr=recipe.peak_lr * BATCH / recipe.global_batch_size,
        whitening_bias_epochs=1.0 if recipe.whitening_bias_epochs else 0.0,
        epochs=2.0,
        flat_epochs=min(recipe.flat_epochs, 0.4),
        ema_every=min(recipe.ema_every, 2),
        # In CELU's backward pass torch rounds 1 / alpha to float32, and our kernel does not: here it needs no rounding.
        celu_alpha=1 / 16,
        precision="float64",
        cuda_graph="off",
        compile="off",
    )
    return replace(smaller, **changes)
