"""One seed stands for all random choices; separate ones hold two kinds of choices fixed and vary the third."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from cifar_fast.data.dataset import Dataset
from cifar_fast.errors import UserError
from cifar_fast.hardware.numerics import Numerics
from cifar_fast.recipe import Recipe
from cifar_fast.recipes import smoke
from cifar_fast.training.batches import Choices, draw_choices
from cifar_fast.training.seeds import Seeds
from cifar_fast.training.setup import Execution, Setup, set_up

CPU = torch.device("cpu")
RECIPE = replace(
    smoke(), n_shards=2, widths=(8, 8, 8), global_batch_size=40, crop_padding=2, cutout=3, color_jitter=0.2,
    precision="float32", convolution="direct",
)  # fmt: skip
FLIPS = ("random", "alternating")


def test_a_number_stands_for_all_three() -> None:
    three = Seeds.of(3)
    assert three == Seeds(start=3, order=3, augmentation=3)
    assert (three.simplest, three.plain(), str(three)) == (3, 3, "3")
    assert Seeds.of(three) is three


def test_separate_seeds_are_plain_values_in_results() -> None:
    seeds = Seeds(start=1, augmentation=2)
    assert seeds.simplest is seeds and str(seeds) == "start 1, order 0, augmentation 2"
    assert seeds.plain() == {"start": 1, "order": 0, "augmentation": 2}
    assert Seeds.of(seeds.plain()) == seeds and len({seeds, Seeds.of(seeds.plain())}) == 1


def test_negative_seeds_are_refused() -> None:
    with pytest.raises(UserError, match="seed=-1 must be at least 0"):
        Seeds.of(-1)
    with pytest.raises(UserError, match="order seed -4 must be at least 0"):
        Seeds(order=-4)


def drawn(recipe: Recipe, seed: int | Seeds, epoch: int) -> Choices:
    return draw_choices(recipe, 60, 32, seed=seed, epoch=epoch, shard=1)


def by_image(choices: Choices) -> list[Tensor]:
    """How each image is augmented, in the order of the images."""
    place = choices.index.argsort()
    return [values[place] for name, values in vars(choices).items() if name != "index"]


@pytest.mark.parametrize("flip", FLIPS)
def test_order_and_augmentation_have_seeds_of_their_own(flip: str) -> None:
    recipe = replace(RECIPE, flip=flip)
    for epoch in range(2):
        both = drawn(recipe, 5, epoch)
        order, augmentation = (drawn(recipe, Seeds(order=a, augmentation=b), epoch) for a, b in ((9, 5), (5, 9)))
        start = drawn(recipe, Seeds(start=9, order=5, augmentation=5), epoch)
        for name, values in vars(both).items():
            assert torch.equal(getattr(start, name), values), name
        # Another order shows each image as before, elsewhere; where, its seed alone decides.
        assert torch.equal(order.index, drawn(recipe, 9, epoch).index) and not torch.equal(order.index, both.index)
        assert all(map(torch.equal, by_image(order), by_image(both)))
        # Another augmentation shows all images in the same places; how, its seed alone decides.
        assert torch.equal(augmentation.index, both.index)
        assert all(map(torch.equal, by_image(augmentation), by_image(drawn(recipe, 9, epoch))))
        assert not any(map(torch.equal, by_image(augmentation), by_image(both)))


def prepared(data: Dataset, seed: int | Seeds) -> Setup:
    return set_up(RECIPE, data, Execution(Numerics(torch.float32, "direct", "stock ops")), device=CPU, seed=seed)


def weights(setup: Setup) -> Tensor:
    return torch.cat([p.detach().flatten() for p in setup.model.parameters()])


def test_only_the_start_seed_changes_the_weights_and_it_changes_no_batch(data: Dataset) -> None:
    three = prepared(data, 3)
    start, others = prepared(data, Seeds(start=4, order=3, augmentation=3)), prepared(data, Seeds(start=3))
    assert torch.equal(weights(three), weights(others)) and not torch.equal(weights(three), weights(start))
    assert torch.equal(weights(start), weights(prepared(data, 4)))
    for (images, labels), (same, its) in zip(three.batches.epoch(1), start.batches.epoch(1), strict=True):
        assert torch.equal(images, same) and torch.equal(labels, its)
    (images, _), (other, _) = next(three.batches.epoch(1)), next(others.batches.epoch(1))
    assert not torch.equal(images, other)
