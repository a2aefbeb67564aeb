"""Augmenting a whole batch in one call is augmenting image by image."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from cifar_fast.training import augment

seeds = st.integers(0, 2**32 - 1)


def random_images(n: int, height: int, width: int, seed: int = 0) -> Tensor:
    return torch.randint(
        0, 256, (n, 3, height, width), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8
    )


@given(st.integers(4, 8), st.integers(0, 4), st.integers(1, 5), seeds)
def test_crop_is_slicing_each_image(size: int, padding: int, n: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    padded = random_images(3, size + 2 * padding, size + 2 * padding, seed)
    tops, lefts = torch.randint(0, 2 * padding + 1, (2, n), generator=generator)
    which = torch.randint(0, len(padded), (n,), generator=generator)
    cut = augment.crop(padded, tops, lefts, size, which)
    assert cut.shape == (n, 3, size, size)
    for image, i, top, left in zip(cut, which, tops, lefts, strict=True):
        assert torch.equal(image, padded[i, :, top : top + size, left : left + size])


def test_crop_takes_all_images_in_order_when_none_are_named() -> None:
    padded = random_images(6, 10, 10)
    tops, lefts = torch.arange(6) % 5, torch.arange(6) // 2
    assert torch.equal(augment.crop(padded, tops, lefts, 6), augment.crop(padded, tops, lefts, 6, torch.arange(6)))


def test_the_middle_crop_of_a_padded_image_is_the_image() -> None:
    images = random_images(3, 8, 8)
    middle = torch.full((3,), 4)
    assert torch.equal(augment.crop(F.pad(images, (4, 4, 4, 4), mode="reflect"), middle, middle, 8), images)


@given(st.lists(st.booleans(), min_size=1, max_size=6))
def test_flip_mirrors_those_it_is_told_to(mirrored: list[bool]) -> None:
    images = random_images(len(mirrored), 4, 5)
    flipped = augment.flip(images, torch.tensor(mirrored))
    for image, before, turned in zip(flipped, images, mirrored, strict=True):
        for column in range(5):
            assert torch.equal(image[:, :, column], before[:, :, 4 - column if turned else column])
    assert torch.equal(augment.flip(flipped, torch.tensor(mirrored)), images)


@given(st.integers(1, 5), st.integers(1, 6), seeds)
def test_cutout_blanks_a_square_of_each_image_and_nothing_else(n: int, size: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    images = random_images(n, 8, 8, seed).float() + 1  # no pixel is 0 already
    tops, lefts = torch.randint(1 - size, 8, (2, n), generator=generator)
    blanked = augment.cutout(images, tops, lefts, size)
    for image, before, top, left in zip(blanked, images, tops.tolist(), lefts.tolist(), strict=True):
        for row in range(8):
            for column in range(8):
                inside = top <= row < top + size and left <= column < left + size
                assert torch.equal(image[:, row, column], before[:, row, column] * (not inside))


def test_cutout_sets_the_value_it_is_given() -> None:
    images = torch.zeros(1, 3, 4, 4)
    blanked = augment.cutout(images, torch.tensor([0]), torch.tensor([0]), 2, value=7.0)
    assert blanked.sum() == 3 * 4 * 7


def test_jitter_is_a_factor_and_an_offset_for_each_image() -> None:
    images = random_images(4, 5, 5).float()
    contrast, brightness = torch.tensor([0.5, 1.0, 1.5, 2.0]), torch.tensor([0.0, 1.0, -1.0, 0.5])
    changed = augment.jitter(images, contrast, brightness)
    for image, before, factor, offset in zip(changed, images, contrast, brightness, strict=True):
        assert torch.equal(image, before * factor + offset)
    assert torch.equal(augment.jitter(images, torch.ones(4), torch.zeros(4)), images)


@pytest.mark.parametrize("size", [16, 24, 32, 40])
def test_resize_keeps_a_plain_image_plain_and_commutes_with_the_mirror(size: int) -> None:
    images = random_images(2, 32, 32).float()
    resized = augment.resize(images, size)
    assert resized.shape == (2, 3, size, size)
    assert torch.allclose(augment.resize(images.flip(-1), size), resized.flip(-1), atol=1e-3)
    assert torch.allclose(augment.resize(torch.full((1, 3, 32, 32), 7.0), size), torch.tensor(7.0), atol=1e-4)


def test_resize_to_the_same_size_changes_nothing() -> None:
    images = random_images(2, 32, 32).float()
    assert torch.equal(augment.resize(images, 32), images)


def test_resize_to_half_the_size_aliases_nothing() -> None:
    # Stripes one pixel wide become grey, rather than one of their two colours.
    stripes = torch.zeros(1, 3, 32, 32)
    stripes[..., ::2] = 1.0
    assert torch.allclose(augment.resize(stripes, 16)[..., 2:-2], torch.tensor(0.5), atol=1e-3)
