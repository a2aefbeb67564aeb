"""The same recipe sees the same images, crops and flips, whoever shares the work, and every choice can be drawn."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from cifar_fast import recipes
from cifar_fast.errors import RecipeError
from cifar_fast.recipe import Recipe
from cifar_fast.training import augment
from cifar_fast.training import batches as batches_module
from cifar_fast.training.batches import TrainBatches, draw_choices, draw_generator, pixel_statistics

CPU = torch.device("cpu")
NO_SCALING = {"mean": torch.zeros(3), "std": torch.ones(3)}
PLAIN = Recipe(global_batch_size=8, crop_padding=0, flip="none", channels_last=False)
ALL_AUGMENTED = replace(PLAIN, crop_padding=2, flip="random", cutout=3, color_jitter=0.2)


def random_images(n: int, side: int = 8, seed: int = 0) -> Tensor:
    return torch.randint(0, 256, (n, 3, side, side), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)


def numbered_images(n: int, side: int = 4) -> Tensor:
    """Plain images whose colour is their number, up to 65,535; uint8 (n, 3, side, side)."""
    number = torch.arange(n)
    colours = torch.stack([number % 256, number // 256, torch.zeros_like(number)], dim=1).byte()
    return colours[:, :, None, None].expand(-1, -1, side, side).contiguous()


def numbers(images: Tensor) -> list[int]:
    """Which of `numbered_images` a batch without augmentation is made of."""
    return (images[:, 0, 0, 0] + 256 * images[:, 1, 0, 0]).int().tolist()


def numbered_batches(n: int, recipe: Recipe, **options: int) -> TrainBatches:
    return TrainBatches(numbered_images(n), torch.arange(n), recipe, device=CPU, **NO_SCALING, **options)


def all_batches(batches: TrainBatches, epoch: int = 0) -> list[tuple[Tensor, Tensor]]:
    return list(batches.epoch(epoch))


def assert_equal_batches(a: list[tuple[Tensor, Tensor]], b: list[tuple[Tensor, Tensor]]) -> None:
    assert len(a) == len(b) > 0
    for (images_a, labels_a), (images_b, labels_b) in zip(a, b, strict=True):
        assert torch.equal(images_a, images_b) and torch.equal(labels_a, labels_b)


# --- Pixel statistics ---


@pytest.mark.parametrize("n", [1, 7])
def test_pixel_statistics_are_mean_and_standard_deviation(n: int) -> None:
    images = random_images(n)
    mean, std = pixel_statistics(images)
    pixels = images.numpy().astype(np.float64)
    np.testing.assert_allclose(mean, pixels.mean((0, 2, 3)), rtol=1e-6)
    np.testing.assert_allclose(std, pixels.std((0, 2, 3)), rtol=1e-6)


def test_a_channel_without_any_variance_can_be_divided_by_its_deviation() -> None:
    _, std = pixel_statistics(torch.full((2, 3, 4, 4), 9, dtype=torch.uint8))
    assert torch.equal(std, torch.ones(3))


# --- Shards and processes ---


@given(st.integers(1, 8), st.integers(1, 6), st.integers(0, 40))
@settings(max_examples=40)
def test_an_epoch_takes_as_many_images_of_each_shard_and_none_twice(n_shards: int, local: int, more: int) -> None:
    n = n_shards * local + more
    recipe = replace(PLAIN, n_shards=n_shards, global_batch_size=n_shards * local)
    batches = numbered_batches(n, recipe)
    drawn = all_batches(batches)
    assert len(drawn) == batches.steps_per_epoch == n // n_shards // local  # the last partial batch is dropped
    for images, labels in drawn:
        assert numbers(images) == labels.tolist()  # labels stay with their images
        # The shards' local batches one after the other, so that a ghost group never crosses a shard.
        assert [number % n_shards for number in labels.tolist()] == [
            shard for shard in range(n_shards) for _ in range(local)
        ]
    assert max(Counter(number for _, labels in drawn for number in labels.tolist()).values()) == 1


@given(st.integers(1, 8), st.integers(0, 40))
@settings(max_examples=40)
def test_shards_partition_the_set(n_shards: int, more: int) -> None:
    n = n_shards + more
    batches = numbered_batches(n, replace(PLAIN, n_shards=n_shards, global_batch_size=n_shards))
    for shard, labels in enumerate(batches.labels):
        assert labels.tolist() == list(range(shard, n, n_shards))
    assert sorted(torch.cat(batches.labels).tolist()) == list(range(n))


@pytest.mark.parametrize("world_size", [2, 4, 8])
def test_any_number_of_processes_see_what_one_sees(world_size: int) -> None:
    recipe = replace(ALL_AUGMENTED, n_shards=8, global_batch_size=32)
    images, labels = random_images(83), torch.arange(83)  # shards of unequal size

    def process(rank: int, world_size: int) -> TrainBatches:
        return TrainBatches(images, labels, recipe, device=CPU, seed=3, rank=rank, world_size=world_size)

    processes = [process(rank, world_size) for rank in range(world_size)]
    assert [shard for one in processes for shard in one.shards] == list(range(8))
    for epoch in range(2):
        together = [
            (torch.cat([part for part, _ in parts]), torch.cat([part for _, part in parts]))
            for parts in zip(*(one.epoch(epoch) for one in processes), strict=True)
        ]
        assert_equal_batches(together, all_batches(process(0, 1), epoch))


def test_seed_epoch_and_shard_each_change_what_is_drawn() -> None:
    keys = [(0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1)]
    drawn = {tuple(torch.randint(0, 2**31, (4,), generator=draw_generator(*key)).tolist()) for key in keys}
    assert len(drawn) == len(keys)
    assert draw_generator(5, 4, 3).initial_seed() == draw_generator(5, 4, 3).initial_seed()


def test_neither_torchs_own_generator_nor_the_order_of_epochs_matters() -> None:
    batches = TrainBatches(random_images(40), torch.arange(40), ALL_AUGMENTED, device=CPU, seed=1)
    in_order = [all_batches(batches, epoch) for epoch in range(3)]
    torch.manual_seed(12345)
    assert_equal_batches(all_batches(batches, 2), in_order[2])
    assert not torch.equal(in_order[1][0][1], in_order[2][0][1])


def test_the_8_gpu_recipe_has_24_steps_an_epoch_and_432_in_all() -> None:
    recipe = recipes.apple_8gpu()
    tiny = torch.zeros(50_000, 3, 5, 5, dtype=torch.uint8)  # the size of the images does not matter for that
    batches = TrainBatches(
        tiny, torch.zeros(50_000, dtype=torch.int64), recipe, device=CPU, **NO_SCALING, rank=3, world_size=8
    )
    assert [len(labels) for labels in batches.labels] == [6_250]
    assert (batches.steps_per_epoch, batches.total_steps()) == (24, 432)


@pytest.mark.parametrize(("epochs", "steps"), [(1.0, 5), (2.0, 10), (0.5, 3), (1.2, 6), (0.01, 1)])
def test_a_fraction_of_an_epoch_is_rounded_up_to_a_step(epochs: float, steps: int) -> None:
    assert numbered_batches(44, replace(PLAIN, epochs=epochs)).total_steps() == steps


def test_a_batch_larger_than_a_shard_is_refused() -> None:
    with pytest.raises(
        RecipeError, match="64 images cannot be drawn from a shard of 12: 50 .* n_shards=4; .* global_batch_size=256"
    ):
        numbered_batches(50, replace(PLAIN, n_shards=4, global_batch_size=256))


# --- Augmentation ---


def augmented_by_hand(images: Tensor, recipe: Recipe, mean: Tensor, std: Tensor, seed: int, epoch: int) -> Tensor:
    """What one shard's epoch should be, image by image with torch's own functions and plain slices."""
    choices = draw_choices(recipe, len(images), images.shape[-1], seed=seed, epoch=epoch, shard=0)
    expected = []
    for i, top, left, mirrored, cut_top, cut_left, contrast, brightness in zip(*vars(choices).values(), strict=True):
        image = (images[i].float() - mean[:, None, None]) / std[:, None, None]
        side = image.shape[-1]
        image = F.pad(image, (recipe.crop_padding,) * 4, mode="reflect")[:, top : top + side, left : left + side]
        if mirrored:
            image = image.flip(-1)
        image = image * contrast + brightness
        rows, columns = (slice(max(0, start), max(0, start + recipe.cutout)) for start in (int(cut_top), int(cut_left)))
        image[:, rows, columns] = 0  # zero once normalised: the mean colour
        expected.append(image)
    return torch.stack(expected)


@given(
    st.integers(0, 3),
    st.sampled_from(["none", "random", "alternating"]),
    st.integers(0, 5),
    st.sampled_from([0.0, 0.3]),
    st.integers(0, 1000),
)
@settings(max_examples=25)
def test_batches_are_what_a_plain_loop_over_images_makes(
    padding: int, flip: str, cutout: int, jitter: float, seed: int
) -> None:
    recipe = replace(PLAIN, crop_padding=padding, flip=flip, cutout=cutout, color_jitter=jitter)
    images = random_images(24, seed=seed)
    mean, std = pixel_statistics(images)
    batches = TrainBatches(images, torch.arange(24), recipe, device=CPU, seed=seed)
    found = torch.cat([some for some, _ in batches.epoch(1)])
    torch.testing.assert_close(found, augmented_by_hand(images, recipe, mean, std, seed, epoch=1), rtol=1e-5, atol=1e-5)


def test_a_set_padded_in_portions_is_the_set_padded_as_a_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    images, labels = random_images(40), torch.arange(40)
    recipe = replace(ALL_AUGMENTED, n_shards=2)
    whole = TrainBatches(images, labels, recipe, device=CPU)
    monkeypatch.setattr(batches_module, "PORTION", 7)
    parts = TrainBatches(images, labels, recipe, device=CPU)
    assert whole.all_images.shape == (40, 3, 12, 12) and torch.equal(parts.all_images, whole.all_images)


def test_every_crop_offset_occurs_and_about_as_often() -> None:
    recipe = replace(PLAIN, crop_padding=4)
    choices = draw_choices(recipe, 8100, 32, seed=0, epoch=0, shard=0)
    counts = Counter(zip(choices.top.tolist(), choices.left.tolist(), strict=True))
    assert set(counts) == {(top, left) for top in range(9) for left in range(9)}
    assert 50 < min(counts.values()) and max(counts.values()) < 150  # 100 each on average, 10 their deviation


def test_without_padding_nothing_is_cropped() -> None:
    choices = draw_choices(PLAIN, 100, 32, seed=0, epoch=0, shard=0)
    assert not choices.top.any() and not choices.left.any() and not choices.mirrored.any()


def test_half_of_the_images_are_mirrored_by_chance() -> None:
    choices = draw_choices(replace(PLAIN, flip="random"), 4000, 32, seed=0, epoch=0, shard=0)
    assert 0.45 < choices.mirrored.float().mean() < 0.55


@given(st.integers(1, 50), st.integers(0, 1000))
def test_alternating_flip_shows_each_image_from_the_other_side_every_epoch(n: int, seed: int) -> None:
    recipe = replace(PLAIN, flip="alternating")

    def mirrored(epoch: int) -> Tensor:
        choices = draw_choices(recipe, n, 32, seed=seed, epoch=epoch, shard=0)
        by_image = torch.empty(n, dtype=torch.bool)
        by_image[choices.index] = choices.mirrored
        return by_image

    first = mirrored(0)
    for epoch in range(1, 5):
        assert torch.equal(mirrored(epoch), first if epoch % 2 == 0 else ~first)


def test_alternating_flip_starts_from_either_side_by_chance() -> None:
    recipe = replace(PLAIN, flip="alternating")
    first = [draw_choices(recipe, 1000, 32, seed=seed, epoch=0, shard=0).mirrored for seed in range(2)]
    assert all(450 < int(mirrored.sum()) < 550 for mirrored in first)


@pytest.mark.parametrize("cutout", [1, 5, 8, 32])
def test_cutout_always_blanks_its_whole_square_and_can_lie_anywhere(cutout: int) -> None:
    n = 5_000
    choices = draw_choices(replace(PLAIN, cutout=cutout), n, 32, seed=0, epoch=0, shard=0)
    blanked = augment.cutout(
        torch.ones(1, 1, 32, 32).expand(n, 1, 32, 32), choices.cutout_top, choices.cutout_left, cutout
    )
    assert (blanked.sum((1, 2, 3)) == 32 * 32 - cutout**2).all()
    for starts in (choices.cutout_top, choices.cutout_left):
        counts = torch.bincount(starts, minlength=33 - cutout)
        assert len(counts) == 33 - cutout and counts.min() > 0.6 * n / (33 - cutout)


def test_a_square_larger_than_the_image_is_refused() -> None:
    with pytest.raises(RecipeError, match="cutout=9 is larger than the images, which are 8 pixels wide"):
        TrainBatches(random_images(16), torch.zeros(16, dtype=torch.long), replace(PLAIN, cutout=9), device=CPU)


def test_colour_jitter_stays_within_its_bounds_and_fills_them() -> None:
    choices = draw_choices(replace(PLAIN, color_jitter=0.2), 4000, 32, seed=0, epoch=0, shard=0)
    for drawn, middle in ((choices.contrast, 1.0), (choices.brightness, 0.0)):
        assert middle - 0.2 <= drawn.min() < middle - 0.19 and middle + 0.19 < drawn.max() <= middle + 0.2
    assert abs(torch.corrcoef(torch.stack([choices.contrast, choices.brightness]))[0, 1]) < 0.1


# --- What reaches the network ---


def test_not_preloading_gives_the_same_batches() -> None:
    images, labels = random_images(40), torch.arange(40)
    kept, sent = (
        TrainBatches(images, labels, replace(ALL_AUGMENTED, preload=preload), device=CPU) for preload in (True, False)
    )
    for epoch in range(2):
        assert_equal_batches(all_batches(kept, epoch), all_batches(sent, epoch))


def test_without_preloading_the_set_stays_on_the_cpu() -> None:
    # The meta device stands for a GPU: tensors there have a shape and no contents.
    recipe = replace(ALL_AUGMENTED, preload=False)
    batches = TrainBatches(random_images(40), torch.arange(40), recipe, device=torch.device("meta"))
    assert all(images.device == CPU for images in batches.images)
    images, labels = next(batches.epoch(0))
    assert images.device.type == labels.device.type == "meta"
    kept = TrainBatches(random_images(40), torch.arange(40), ALL_AUGMENTED, device=torch.device("meta"), **NO_SCALING)
    assert all(images.device.type == "meta" for images in kept.images)


def test_the_set_is_kept_as_bytes() -> None:
    batches = TrainBatches(random_images(16), torch.arange(16), ALL_AUGMENTED, device=CPU)
    (kept,) = batches.images
    assert kept.dtype == torch.uint8 and kept.shape == (16, 3, 12, 12)


def test_resolutions_go_epoch_by_epoch_and_the_last_goes_on() -> None:
    recipe = replace(PLAIN, resolutions=(16, 24))
    batches = TrainBatches(random_images(16, side=32), torch.arange(16), recipe, device=CPU)
    sides = [next(batches.epoch(epoch))[0].shape for epoch in range(4)]
    assert sides == [(8, 3, 16, 16), (8, 3, 24, 24), (8, 3, 24, 24), (8, 3, 24, 24)]
    assert TrainBatches(random_images(16), torch.arange(16), PLAIN, device=CPU).resolution(5) == 8


def test_resolutions_of_larger_images_are_in_proportion() -> None:
    """Otherwise the last epochs would train at 32 pixels what is evaluated at 64."""
    laptop = recipes.laptop()
    assert [laptop.resolution(epoch) for epoch in (0, 3, 6, 9)] == [18, 24, 32, 32]
    assert [laptop.resolution(epoch, 64) for epoch in (0, 3, 6, 9)] == [36, 48, 64, 64]
    assert [PLAIN.resolution(epoch, 48) for epoch in (0, 9)] == [48, 48]
    recipe = replace(PLAIN, resolutions=(24, 32))
    batches = TrainBatches(random_images(16, side=48), torch.arange(16), recipe, device=CPU)
    assert [next(batches.epoch(epoch))[0].shape[-1] for epoch in range(3)] == [36, 48, 48]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_batches_have_the_type_and_the_memory_format_asked_for(dtype: torch.dtype) -> None:
    data = (random_images(16), torch.arange(16))
    last = TrainBatches(*data, replace(ALL_AUGMENTED, channels_last=True), device=CPU, dtype=dtype)
    first = TrainBatches(*data, replace(ALL_AUGMENTED, channels_last=False), device=CPU, dtype=dtype)
    assert_equal_batches(all_batches(last), all_batches(first))
    images, labels = next(last.epoch(0))
    assert images.dtype == dtype and labels.dtype == torch.int64
    assert images.is_contiguous(memory_format=torch.channels_last)
    assert next(first.epoch(0))[0].is_contiguous()


def test_what_is_prepared_takes_the_place_of_making_a_batch_at_its_resolution() -> None:
    recipe = replace(PLAIN, resolutions=(16, 32), global_batch_size=4)
    batches = TrainBatches(random_images(8, side=32), torch.arange(8), recipe, device=CPU, **NO_SCALING)
    calls: list[int] = []

    def prepared(*chosen: Tensor) -> tuple[Tensor, Tensor]:
        calls.append(len(chosen))
        return batches.make(32, *chosen)

    expected = [list(batches.epoch(epoch)) for epoch in (0, 1)]
    batches.prepared = {32: prepared}
    for epoch in (0, 1):
        for (images, labels), (same, its) in zip(batches.epoch(epoch), expected[epoch], strict=True):
            assert torch.equal(images, same) and torch.equal(labels, its)
    assert calls == [8, 8]  # the second epoch's two batches


@pytest.mark.gpu
@pytest.mark.parametrize("preload", [True, False])
def test_a_gpu_sees_what_a_cpu_sees(preload: bool) -> None:
    images, labels = random_images(48), torch.arange(48)
    recipe = replace(ALL_AUGMENTED, n_shards=2, global_batch_size=16, preload=preload)
    on_cpu = TrainBatches(images, labels, recipe, device=CPU, seed=2)
    on_gpu = TrainBatches(images, labels, recipe, device=torch.device("cuda"), seed=2)
    for (images_c, labels_c), (images_g, labels_g) in zip(on_cpu.epoch(1), on_gpu.epoch(1), strict=True):
        assert images_g.is_cuda and torch.equal(labels_g.cpu(), labels_c)
        torch.testing.assert_close(images_g.cpu(), images_c, rtol=1e-5, atol=1e-5)
