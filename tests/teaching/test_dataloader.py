"""The DataLoader that preloading is compared with sees the same images, augmented as the recipe says."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from cifar_fast.data.dataset import Dataset
from cifar_fast.errors import UserError
from cifar_fast.recipe import Recipe
from cifar_fast.teaching.dataloader import data_loader, deliver
from cifar_fast.training import augment
from cifar_fast.training.batches import TrainBatches, pixel_statistics

CPU = torch.device("cpu")
RECIPE = Recipe(global_batch_size=16, crop_padding=2, flip="random")


def numbered(data: Dataset, n: int) -> Dataset:
    """The first `n` training images, labelled by their place, which a shuffled batch then tells."""
    few = (data.train_images[:n], torch.arange(n), data.test_images[:1], data.test_labels[:1])
    return Dataset(data.name, data.classes, *few, data.source, data.fingerprint)


def test_without_augmentation_the_loader_and_the_preloaded_set_give_the_same_images(tiny_data: Dataset) -> None:
    data, recipe = numbered(tiny_data, 32), replace(RECIPE, crop_padding=0, flip="none")
    ways = (
        data_loader(data, recipe),
        TrainBatches(data.train_images, data.train_labels, recipe, device=CPU).epoch(0),
    )
    seen = []
    for way in ways:
        images, order = (torch.cat(parts) for parts in zip(*way, strict=True))
        assert not torch.equal(order, torch.arange(32))  # shuffled
        seen.append(images[order.argsort()])
    assert torch.allclose(*seen, atol=1e-5)


@pytest.mark.parametrize("workers", [0, 1])
def test_each_image_is_one_of_the_windows_of_its_padded_self_or_their_mirrors(tiny_data: Dataset, workers: int) -> None:
    data = numbered(tiny_data, 16)
    ((images, order),) = data_loader(data, RECIPE, workers=workers)
    mean, std = (value[:, None, None] for value in pixel_statistics(data.train_images))
    padded = (F.pad(data.train_images, (2, 2, 2, 2), mode="reflect") - mean) / std
    tops, lefts = torch.cartesian_prod(torch.arange(5), torch.arange(5)).T
    found = []
    for image, which in zip(images, order, strict=True):
        windows = augment.crop(padded, tops, lefts, 32, which.expand(25))
        windows = torch.cat([windows, windows.flip(-1)])  # (50, 3, 32, 32)
        errors = (windows - image).abs().amax((1, 2, 3))
        assert errors.min() < 1e-5
        found.append(int(errors.argmin()))
    assert len(set(found)) > 8  # of 50: each image has its own choice
    assert min(found) < 25 <= max(found)


def test_a_last_batch_that_is_not_full_is_dropped_as_in_training(tiny_data: Dataset) -> None:
    data = numbered(tiny_data, 40)
    batches = TrainBatches(data.train_images, data.train_labels, RECIPE, device=CPU)
    assert deliver(data_loader(data, RECIPE), CPU) == deliver(batches.epoch(0), CPU) == 32


@pytest.mark.parametrize("change", [{"flip": "alternating"}, {"cutout": 4}, {"color_jitter": 0.1}])
def test_augmentation_that_torchvision_lacks_is_refused(tiny_data: Dataset, change: dict) -> None:
    with pytest.raises(UserError, match="torchvision's transforms cannot do all of"):
        data_loader(tiny_data, replace(RECIPE, **change))
