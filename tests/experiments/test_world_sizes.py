"""Workers share shards equally, and a number of workers that does not fit gets advice that can be followed."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest

from cifar_fast import recipes
from cifar_fast.errors import RecipeError
from cifar_fast.experiments.world_sizes import (
    WORLD_SIZES,
    describe_world_sizes,
    planned_world_sizes,
    require_allowed,
)
from cifar_fast.training.batches import allowed_world_sizes

APPLE = recipes.apple_8gpu()


@pytest.mark.parametrize(("n_shards", "allowed"), [(1, (1,)), (6, (1, 2, 3, 6)), (8, (1, 2, 4, 8))])
def test_workers_share_the_shards_equally(n_shards, allowed):
    recipe = replace(recipes.smoke(), n_shards=n_shards, global_batch_size=96)
    assert allowed_world_sizes(recipe) == allowed
    assert planned_world_sizes(recipe) == tuple(n for n in allowed if n in WORLD_SIZES)
    assert planned_world_sizes(recipe, n_shards)[-1] == n_shards


@pytest.mark.parametrize(
    ("recipe", "world_size", "words"),
    [
        (APPLE, 3, "world_size=3.*n_shards=8, which 1, 2, 4, 8 workers can share.*1, 2, 4, 8, 16, 32, 64"),
        (recipes.airbench_2024(), 8, "n_shards=1, which 1 worker can share.*1, 2, 4, 5, 8.*batch norm smaller"),
        (recipes.laptop(), 2, "whole groups of ghost_batch_size=512 can be cut into n_shards of 1, 2"),
        (replace(APPLE, n_shards=1, ghost_batch_size=2048), 2, "cannot be cut into more shards: lower ghost_batch_siz"),
    ],
)
def test_a_number_of_workers_that_does_not_fit_gets_advice(recipe, world_size, words):
    for call in (require_allowed, planned_world_sizes):
        with pytest.raises(RecipeError, match=words):
            call(recipe, world_size)


def test_the_advice_can_be_followed():
    for recipe in (APPLE, recipes.laptop(), recipes.airbench_2024(), recipes.page_2019()):
        (numbers,) = re.findall(r"n_shards of ([\d, ]+) \(", describe_world_sizes(recipe))
        for number in map(int, numbers.split(", ")):
            require_allowed(replace(recipe, n_shards=number), number)
