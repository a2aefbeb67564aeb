"""Which numbers of workers can share a recipe, and which `n_shards` would allow others."""

from __future__ import annotations

from dataclasses import replace

from cifar_fast.errors import RecipeError
from cifar_fast.recipe import Recipe
from cifar_fast.training.batches import allowed_world_sizes

WORLD_SIZES = (1, 2, 4, 8, 16, 32, 64)
"""The numbers of workers that a plan shows where the recipe allows them."""


def planned_world_sizes(recipe: Recipe, world_size: int | None = None) -> tuple[int, ...]:
    """Return those of `WORLD_SIZES` that the recipe allows, and `world_size`, in order.

    Raises `RecipeError` when the recipe does not allow `world_size`.
    """
    planned = set(WORLD_SIZES) & set(allowed_world_sizes(recipe))
    if world_size is not None:
        require_allowed(recipe, world_size)
        planned.add(world_size)
    return tuple(sorted(planned))


def require_allowed(recipe: Recipe, world_size: int) -> None:
    """Raise `RecipeError`, with what the recipe allows and what would allow more, unless `world_size` fits."""
    if world_size not in allowed_world_sizes(recipe):
        raise RecipeError(f"world_size={world_size} does not fit: {describe_world_sizes(recipe)}")


def describe_world_sizes(recipe: Recipe) -> str:
    """Return in words which numbers of workers the recipe allows, and which `n_shards` would allow others."""
    workers = ", ".join(map(str, allowed_world_sizes(recipe)))
    shards = [number for number in range(1, max(WORLD_SIZES) + 1) if _can_have_shards(recipe, number)]
    batch = f"global_batch_size={recipe.global_batch_size}"
    if recipe.ghost_batch_size:
        batch += f" in whole groups of ghost_batch_size={recipe.ghost_batch_size}"
    text = (
        f"{recipe.name} has n_shards={recipe.n_shards}, which {workers} worker{'s' * (recipe.n_shards > 1)} can share"
    )
    if shards == [1]:
        return f"{text}; {batch} cannot be cut into more shards: lower ghost_batch_size or change global_batch_size"
    text += f"; {batch} can be cut into n_shards of {', '.join(map(str, shards))} (--n-shards)"
    if not recipe.ghost_batch_size:
        text += ", which makes the groups of batch norm smaller and so gives another recipe"
    return text


def _can_have_shards(recipe: Recipe, n_shards: int) -> bool:
    try:
        replace(recipe, n_shards=n_shards)
    except RecipeError:
        return False
    return True
