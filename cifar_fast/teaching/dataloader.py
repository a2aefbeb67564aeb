"""The ordinary way to feed a network, for comparison: a DataLoader that augments image by image with torchvision."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader
from torch.utils.data import Dataset as TorchDataset

from cifar_fast.data.dataset import Dataset
from cifar_fast.errors import UserError
from cifar_fast.recipe import Recipe
from cifar_fast.training.batches import pixel_statistics


class OneByOne(TorchDataset[tuple[Tensor, int]]):
    """Images as torchvision's data sets give them: one at a time, as PIL images that a transform turns to tensors."""

    def __init__(self, images: Tensor, labels: Tensor, transform: Callable[[Image.Image], Tensor]) -> None:
        """Take uint8 `images` (N, 3, H, W), int64 `labels` (N,) and the transform."""
        self.images, self.labels, self.transform = images, labels, transform

    def __len__(self) -> int:
        """Return the number of images."""
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        """Return one image, transformed, and its label."""
        image = Image.fromarray(self.images[index].permute(1, 2, 0).numpy())  # (H, W, 3)
        return self.transform(image), int(self.labels[index])


def torchvision_transform(recipe: Recipe, mean: Tensor, std: Tensor) -> Callable[[Image.Image], Tensor]:
    """Return torchvision's crop, flip and normalisation for one image, as strong as the recipe's.

    `mean`, `std`: float32 (3,), in pixel values. Raises `UserError` for augmentation that torchvision lacks in this
    form: an alternating flip has to know the epoch, and cutout and jitter here act on normalised images.
    """
    from torchvision import transforms  # here, because it takes seconds

    if recipe.flip == "alternating" or recipe.cutout or recipe.color_jitter:
        raise UserError(
            f"torchvision's transforms cannot do all of flip={recipe.flip!r}, cutout={recipe.cutout} and "
            f"color_jitter={recipe.color_jitter:g}; compare with flip='random' (or 'none'), cutout=0, color_jitter=0"
        )
    steps: list[Any] = []
    if recipe.crop_padding:
        steps.append(transforms.RandomCrop(32, padding=recipe.crop_padding, padding_mode="reflect"))
    if recipe.flip == "random":
        steps.append(transforms.RandomHorizontalFlip())
    steps += [transforms.ToTensor(), transforms.Normalize((mean / 255).tolist(), (std / 255).tolist())]
    return transforms.Compose(steps)


def data_loader(data: Dataset, recipe: Recipe, *, workers: int = 0, seed: int = 0) -> DataLoader[tuple[Tensor, int]]:
    """Return a DataLoader over the training set, shuffled, in batches of the recipe's global batch.

    `workers`: processes that augment beside this one, which stay from epoch to epoch; 0: this one does it. `seed`: for
    the shuffling and, through it, for the augmentation in workers.
    """
    mean, std = pixel_statistics(data.train_images)
    images = OneByOne(data.train_images, data.train_labels, torchvision_transform(recipe, mean, std))
    return DataLoader(
        images,
        batch_size=recipe.global_batch_size,
        shuffle=True,
        drop_last=True,
        num_workers=workers,
        persistent_workers=workers > 0,
        pin_memory=torch.cuda.is_available(),
        generator=torch.Generator().manual_seed(seed),
    )


def deliver(batches: Iterable[tuple[Tensor, Tensor]], device: torch.device) -> int:
    """Send every batch to `device`, where it would be trained on, and return the number of images."""
    n_images = 0
    for images, labels in batches:
        images.to(device, non_blocking=True), labels.to(device, non_blocking=True)
        n_images += len(labels)
    return n_images
