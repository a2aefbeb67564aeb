"""The training set on the device, cut into fixed shards, and its epochs of augmented batches."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from functools import partial

import numpy as np
import torch
from torch import Tensor

from cifar_fast.errors import RecipeError
from cifar_fast.recipe import Recipe
from cifar_fast.training import augment


def pixel_statistics(images: Tensor) -> tuple[Tensor, Tensor]:
    """Return mean and standard deviation of each channel of uint8 `images` (N, C, H, W): float32 (C,), 0 ... 255."""
    values = torch.arange(256, dtype=torch.float64, device=images.device)
    means, deviations = [], []
    for channel in images.unbind(1):
        # Counting the 256 values is exact, and needs no float copy of the set.
        share = torch.bincount(channel.flatten(), minlength=256).double() / channel.numel()
        mean = (share * values).sum()
        means.append(mean)
        deviations.append((share * (values - mean) ** 2).sum().sqrt().clamp(min=1.0))
    return torch.stack(means).float(), torch.stack(deviations).float()


def draw_generator(seed: int, run: int, epoch: int, shard: int) -> torch.Generator:
    """Return the CPU generator of one shard's choices in one epoch, whatever the device or the number of processes."""
    return _generator(0, seed, run, epoch, shard)


def _generator(*key: int) -> torch.Generator:
    state = np.random.SeedSequence(key).generate_state(1, np.uint64)
    return torch.Generator().manual_seed(int(state[0] >> np.uint64(1)))


def allowed_world_sizes(recipe: Recipe) -> tuple[int, ...]:
    """Return every number of processes that can share the recipe's shards equally."""
    return tuple(number for number in range(1, recipe.n_shards + 1) if recipe.n_shards % number == 0)


def steps_per_epoch(recipe: Recipe, n_images: int) -> int:
    """Return the whole batches in one pass over `n_images`; raise `RecipeError` when a shard does not hold one."""
    smallest = n_images // recipe.n_shards
    if smallest < recipe.local_batch_size:
        raise RecipeError(
            f"a batch of {recipe.local_batch_size} images cannot be drawn from a shard of {smallest}: "
            f"{n_images} training images in n_shards={recipe.n_shards}; lower "
            f"global_batch_size={recipe.global_batch_size} or n_shards"
        )
    return smallest // recipe.local_batch_size


@dataclass(frozen=True)
class Choices:
    """The random choices for `n` images of one epoch: which image, and what is done to it; all tensors are (n,)."""

    index: Tensor  # int64, position within the shard
    top: Tensor  # int64, offset of the crop in pixels
    left: Tensor
    mirrored: Tensor  # bool
    cutout_top: Tensor  # int64, pixels; may lie partly outside, so that the border is covered too
    cutout_left: Tensor
    contrast: Tensor  # float32, factor
    brightness: Tensor  # float32, standard deviations


def draw_choices(recipe: Recipe, shard_size: int, side: int, *, seed: int, run: int, epoch: int, shard: int) -> Choices:
    """Draw one epoch's choices for one shard of `shard_size` images of `side` pixels."""
    generator = draw_generator(seed, run, epoch, shard)

    def integers(low: int, high: int) -> Tensor:
        return torch.randint(low, high, (shard_size,), generator=generator)

    def spread() -> Tensor:
        return torch.empty(shard_size).uniform_(-recipe.color_jitter, recipe.color_jitter, generator=generator)

    index = torch.randperm(shard_size, generator=generator)
    offsets = 2 * recipe.crop_padding + 1
    top, left = integers(0, offsets), integers(0, offsets)
    mirrored = integers(0, 2).bool()
    if recipe.flip == "alternating":
        # Each image starts from its own side, drawn once for the run, and changes sides every epoch.
        first = torch.randint(0, 2, (shard_size,), generator=_generator(1, seed, run, shard)).bool()
        mirrored = first[index] ^ bool(epoch % 2)
    elif recipe.flip == "none":
        mirrored = torch.zeros_like(mirrored)
    cutout_top, cutout_left = integers(1 - recipe.cutout, side), integers(1 - recipe.cutout, side)
    return Choices(index, top, left, mirrored, cutout_top, cutout_left, 1 + spread(), spread())


class TrainBatches:
    """The training set of one process, and the batches it is trained on.

    A process holds `n_shards / world_size` of the recipe's strided shards: shard s has the images s, s + n_shards, ...
    Its local batch is the shards' local batches one after the other, so that a ghost group never crosses a shard. What
    is kept is uint8 with its reflected border: a quarter of the bytes of float32, and the crop is a gather. Cropping
    and mirroring commute with normalisation, which comes after.
    """

    def __init__(
        self,
        images: Tensor,
        labels: Tensor,
        recipe: Recipe,
        *,
        device: torch.device,
        dtype: torch.dtype = torch.float32,
        mean: Tensor | None = None,
        std: Tensor | None = None,
        seed: int = 0,
        run: int = 0,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        """Take uint8 `images` (N, C, H, W) and int64 `labels` (N,) to `device`; `mean` and `std` (C,) in pixel values,
        else measured.

        Raises `RecipeError` when a shard holds fewer images than the local batch needs.
        """
        self.recipe, self.seed, self.run, self.device, self.dtype = recipe, seed, run, device, dtype
        self.shards = range(rank * recipe.n_shards // world_size, (rank + 1) * recipe.n_shards // world_size)
        if recipe.crop_padding >= images.shape[-1]:
            raise RecipeError(
                f"crop_padding={recipe.crop_padding} reflects more than an image has: at most {images.shape[-1] - 1}"
            )
        self.steps_per_epoch = steps_per_epoch(recipe, len(images))
        self.side = images.shape[-1]
        # Where the set is not preloaded it stays on the CPU, which cuts and augments each batch and then sends it.
        self.home = device if recipe.preload else torch.device("cpu")
        padded, own_labels = [], []
        for shard in self.shards:
            own = images[shard :: recipe.n_shards].to(self.home, non_blocking=True)
            padded.append(augment.reflect_pad(own, recipe.crop_padding))
            own_labels.append(labels[shard :: recipe.n_shards].to(self.home, non_blocking=True))
        sizes = [len(own) for own in own_labels]
        self.starts = [sum(sizes[:number]) for number in range(len(sizes))]  # where each shard begins
        # All shards lie one after the other, so that a batch is one gather.
        self.all_images = torch.cat(padded) if len(padded) > 1 else padded[0]  # uint8 (n, C, H + 2p, W + 2p)
        self.all_labels = torch.cat(own_labels)  # int64 (n,)
        self.images, self.labels = self.all_images.split(sizes), self.all_labels.split(sizes)  # a view for each shard
        if mean is None or std is None:
            mean, std = pixel_statistics(images)
        self.mean, self.std = (value.to(self.home)[:, None, None] for value in (mean, std))  # (C, 1, 1)
        self.prepared: Callable[..., tuple[Tensor, Tensor]] | None = None
        """What takes the place of `make`, at the images' own resolution, where that was compiled or recorded."""
        self._drawn: tuple[int, Choices] | None = None  # of one epoch, as `choices` returns them

    def resolution(self, epoch: int) -> int:
        """Return the side in pixels of the training images in `epoch`, counted from 0."""
        sides = self.recipe.resolutions
        return sides[min(epoch, len(sides) - 1)] if sides else self.side

    def epoch(self, epoch: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield the batches of `epoch`, from 0: normalised images (B, C, side, side) and int64 labels (B,)."""
        chosen = self.choices(epoch)
        make = self.prepared if self.prepared and self.resolution(epoch) == self.side else None
        make = make or partial(self.make, self.resolution(epoch))
        is_last = (epoch + 1) * self.steps_per_epoch >= self.total_steps()
        for number, now in enumerate(zip(*vars(chosen).values(), strict=True), start=1):
            if number == self.steps_per_epoch and self.home.type == "cuda" and not is_last:
                self.choices(epoch + 1)  # while the GPU has steps in its queue: after the last one its loss is read
            yield make(*now)

    def _draw(self, epoch: int) -> list[Choices]:
        return [
            draw_choices(self.recipe, len(labels), self.side, seed=self.seed, run=self.run, epoch=epoch, shard=shard)
            for shard, labels in zip(self.shards, self.labels, strict=True)
        ]

    def choices(self, epoch: int) -> Choices:
        """Return what is chosen for each image of `epoch`, where the images are: (steps, B) each; `index` counts over
        all shards."""
        if self._drawn is not None and self._drawn[0] == epoch:
            return self._drawn[1]
        size, steps, drawn = self.recipe.local_batch_size, self.steps_per_epoch, self._draw(epoch)
        together = []
        for field in fields(Choices):
            of_shards = [getattr(choices, field.name)[: steps * size].view(steps, size) for choices in drawn]
            if field.name == "index":
                of_shards = [index + start for index, start in zip(of_shards, self.starts, strict=True)]
            values = torch.cat(of_shards, 1)  # (steps, B): the local batches of all shards one after the other
            if self.home.type == "cuda":
                values = values.pin_memory()  # else the copy waits for all that the GPU has been told to do
            together.append(values.to(self.home, non_blocking=True))
        self._drawn = epoch, Choices(*together)
        return self._drawn[1]

    def example_choices(self) -> list[Tensor]:
        """Return the choices for one batch, (B,) each, for whoever compiles `make`; training draws its own."""
        chosen = [values[0].clone() for values in vars(self.choices(0)).values()]
        self._drawn = None  # the clock of training counts the drawing
        return chosen

    def make(self, side: int, *chosen: Tensor) -> tuple[Tensor, Tensor]:
        """Return the normalised images (B, C, side, side) and labels (B,) of the choices for one batch, (B,) each."""
        choices = Choices(*chosen)
        images = augment.crop(self.all_images, choices.top, choices.left, self.side, choices.index)
        images = (augment.flip(images, choices.mirrored).float() - self.mean) / self.std  # (B, C, H, W)
        if self.recipe.color_jitter:
            images = augment.jitter(images, choices.contrast, choices.brightness)
        if self.recipe.cutout:
            images = augment.cutout(images, choices.cutout_top, choices.cutout_left, self.recipe.cutout)
        images = augment.resize(images, side).to(self.device, self.dtype)
        if self.recipe.channels_last:
            images = images.contiguous(memory_format=torch.channels_last)
        return images, self.all_labels[choices.index].to(self.device)

    def total_steps(self) -> int:
        """Return the number of optimiser steps of the whole training run."""
        return math.ceil(self.recipe.epochs * self.steps_per_epoch)
