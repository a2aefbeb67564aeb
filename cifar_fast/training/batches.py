"""The training set on the device, cut into fixed shards, and its epochs of augmented batches."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from functools import partial
from itertools import accumulate

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from cifar_fast.errors import RecipeError, TricksError
from cifar_fast.recipe import Recipe
from cifar_fast.training import augment
from cifar_fast.training.seeds import Seeds


def pixel_statistics(images: Tensor) -> tuple[Tensor, Tensor]:
    """Return the mean and standard deviation of each channel of uint8 `images` (N, C, H, W), float32 (C,), 0 ... 255.

    The deviation is at least 1, so that an image of one colour can be divided by it.
    """
    values = torch.arange(256, dtype=torch.float64, device=images.device)
    means, deviations = [], []
    for channel in images.unbind(1):
        # Counting the 256 values is exact and needs no floating-point copy of the set.
        share = torch.bincount(channel.flatten(), minlength=256).double() / channel.numel()
        mean = (share * values).sum()
        means.append(mean)
        deviations.append((share * (values - mean) ** 2).sum().sqrt().clamp(min=1.0))
    return torch.stack(means).float(), torch.stack(deviations).float()


def draw_generator(seed: int, epoch: int, shard: int) -> torch.Generator:
    """Return the CPU generator for the choices of one shard in one epoch: the same for any device and any number of
    processes.
    """
    return _generator(0, seed, 0, epoch, shard)


# The first number of a key separates the kinds of draws; the constant after the seed keeps what each seed draws.
def _generator(*key: int) -> torch.Generator:
    state = np.random.SeedSequence(key).generate_state(1, np.uint64)
    return torch.Generator().manual_seed(int(state[0] >> np.uint64(1)))


def allowed_world_sizes(recipe: Recipe) -> tuple[int, ...]:
    """Return every number of processes that can share the recipe's shards equally, in ascending order."""
    return tuple(number for number in range(1, recipe.n_shards + 1) if recipe.n_shards % number == 0)


def steps_per_epoch(recipe: Recipe, n_images: int) -> int:
    """Return the number of whole batches in `n_images`; raise `RecipeError` if a shard has too few for its share."""
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
    """The random choices for `n` images of one epoch: which image comes, and how it is augmented. Tensors are (n,)."""

    index: Tensor  # int64, position within the shard
    top: Tensor  # int64, offset of the crop in pixels
    left: Tensor
    mirrored: Tensor  # bool
    cutout_top: Tensor  # int64, pixels; the square lies wholly inside the image
    cutout_left: Tensor
    contrast: Tensor  # float32, factor
    brightness: Tensor  # float32, in standard deviations


def draw_choices(recipe: Recipe, shard_size: int, side: int, *, seed: int | Seeds, epoch: int, shard: int) -> Choices:
    """Draw the choices of one epoch for a shard of `shard_size` images that are `side` pixels wide."""
    seeds = Seeds.of(seed)
    generator = draw_generator(seeds.augmentation, epoch, shard)

    def integers(low: int, high: int) -> Tensor:
        return torch.randint(low, high, (shard_size,), generator=generator)

    def spread() -> Tensor:
        return torch.empty(shard_size).uniform_(-recipe.color_jitter, recipe.color_jitter, generator=generator)

    index = torch.randperm(shard_size, generator=generator)
    offsets = 2 * recipe.crop_padding + 1
    top, left = integers(0, offsets), integers(0, offsets)
    mirrored = integers(0, 2).bool()
    if recipe.flip == "alternating":
        # A draw for the whole run says how each image starts; then it changes sides every epoch.
        first = torch.randint(0, 2, (shard_size,), generator=_generator(1, seeds.augmentation, 0, shard)).bool()
        mirrored = first[index] ^ bool(epoch % 2)
    elif recipe.flip == "none":
        mirrored = torch.zeros_like(mirrored)
    corners = side - recipe.cutout + 1
    cutout_top, cutout_left = integers(0, corners), integers(0, corners)
    choices = Choices(index, top, left, mirrored, cutout_top, cutout_left, 1 + spread(), spread())
    if seeds.order == seeds.augmentation:
        return choices
    # Each image keeps its augmentation and takes the place that the order's own seed gives it.
    order = torch.randperm(shard_size, generator=draw_generator(seeds.order, epoch, shard))
    moved = index.argsort()[order]
    return Choices(*(values[moved] for values in vars(choices).values()))


PORTION = 100_000
"""Images that are padded at a time: torch's CUDA kernel accepts at most 2**31 numbers."""


def _with_border(images: Tensor, padding: int) -> list[Tensor]:
    """Return `images` (N, C, H, W), in portions, with `padding` reflected pixels on each side."""
    if padding == 0:
        return [images]
    return [F.pad(some, (padding,) * 4, mode="reflect") for some in images.split(PORTION)]


def _require_batch(found: object, n_images: int) -> tuple[Tensor, Tensor]:
    """Return what an `augment` function returned; raise `TricksError` unless it is a batch of `n_images`."""
    match found:
        case (Tensor() as images, Tensor() as labels):
            whole = labels.ndim == 1 and not labels.is_floating_point()
            if images.ndim == 4 and len(images) == len(labels) == n_images and (whole or labels.ndim == 2):
                return images, labels
            got = f"{tuple(images.shape)} and {tuple(labels.shape)} ({labels.dtype})"
        case _:
            got = type(found).__name__
    raise TricksError(
        f"`augment` returned {got}; return as many images as it got, ({n_images}, 3, H, W), and their labels, whole "
        f"numbers ({n_images},) or probabilities ({n_images}, classes)"
    )


class TrainBatches:
    """The training set of one process and its augmented batches.

    A process holds `n_shards / world_size` of the recipe's strided shards: shard s has the images s, s + n_shards, ...
    Its part of a batch is the local batches of its shards, one after the other, so a ghost group never crosses a shard.
    The images stay uint8, a quarter of the bytes of float32, and have their reflected border, so a crop is a gather.
    Cropping and mirroring commute with normalisation, which comes last.
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
        seed: int | Seeds = 0,
        rank: int = 0,
        world_size: int = 1,
        augment: Callable[[Tensor, Tensor, torch.Generator], tuple[Tensor, Tensor]] | None = None,
    ) -> None:
        """Send the shards of `rank` to `device`, or keep them on the CPU if the recipe does not preload.

        Args:
            images: uint8 (N, C, H, W), the whole training set.
            labels: int64 (N,).
            recipe: what is trained.
            device: where the batches are used.
            dtype: number format of the batches.
            mean: mean of each channel, (C,), in pixel values; None: measured.
            std: standard deviation of each channel, likewise.
            seed: seed of the random choices; `Seeds` to give order and augmentation one each.
            rank: this process's rank.
            world_size: number of processes; divides the recipe's `n_shards`.
            augment: the reader's own function, called for each shard's local batch after all that the recipe does;
                None: there is none.

        Raises:
            RecipeError: a shard holds fewer images than its part of a batch, or the crop's border or
                the cutout exceeds the image.
        """
        self.recipe, self.seeds, self.device, self.dtype = recipe, Seeds.of(seed), device, dtype
        self.augment = augment
        self.side = images.shape[-1]
        if recipe.crop_padding >= self.side:
            raise RecipeError(
                f"crop_padding={recipe.crop_padding} reflects more than an image has: at most {self.side - 1}"
            )
        if recipe.cutout > self.side:
            raise RecipeError(f"cutout={recipe.cutout} is larger than the images, which are {self.side} pixels wide")
        self.steps_per_epoch = steps_per_epoch(recipe, len(images))
        self.shards = range(rank * recipe.n_shards // world_size, (rank + 1) * recipe.n_shards // world_size)
        self.home = device if recipe.preload else torch.device("cpu")
        """Where the training set lies and batches are made."""
        if mean is None or std is None:
            mean, std = pixel_statistics(images)
        self.mean, self.std = (value.to(self.home)[:, None, None] for value in (mean, std))  # (C, 1, 1)

        padded, own_labels = [], []
        for shard in self.shards:
            own = slice(shard, None, recipe.n_shards)
            padded += _with_border(images[own].to(self.home, non_blocking=True), recipe.crop_padding)
            own_labels.append(labels[own].to(self.home, non_blocking=True))
        # The shards lie one after the other, so that a batch is one gather. A single part need not be copied.
        self.all_images = torch.cat(padded) if len(padded) > 1 else padded[0]  # uint8 (n, C, H + 2p, W + 2p)
        self.all_labels = torch.cat(own_labels)  # int64 (n,)
        sizes = [len(own) for own in own_labels]
        self.starts = [0, *accumulate(sizes[:-1])]  # where each shard begins
        self.images, self.labels = self.all_images.split(sizes), self.all_labels.split(sizes)  # a view for each shard

        self.prepared: dict[int, Callable[..., tuple[Tensor, Tensor]]] = {}
        """Compiled or captured replacements of `make`, by the side of the images in pixels."""
        self._drawn: tuple[int, Choices] | None = None  # the latest epoch and what `choices` returns for it

    def resolution(self, epoch: int) -> int:
        """Return the side in pixels of the training images in `epoch`, counted from 0."""
        return self.recipe.resolution(epoch, self.side)

    def epoch(self, epoch: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield the batches of `epoch`, from 0: normalised images (B, C, side, side) and int64 labels (B,)."""
        chosen = self.choices(epoch)
        side = self.resolution(epoch)
        make = self.prepared.get(side) or partial(self.make, side)
        is_last = (epoch + 1) * self.steps_per_epoch >= self.total_steps()
        for number, now in enumerate(zip(*vars(chosen).values(), strict=True), start=1):
            if number == self.steps_per_epoch and self.home.type == "cuda" and not is_last:
                # Draw while the GPU still has steps in its queue: after the last one the loop waits for its loss.
                self.choices(epoch + 1)
            images, labels = make(*now)
            yield self.augmented(images, labels, epoch, number)

    def _draw(self, epoch: int) -> list[Choices]:
        return [
            draw_choices(self.recipe, len(labels), self.side, seed=self.seeds, epoch=epoch, shard=shard)
            for shard, labels in zip(self.shards, self.labels, strict=True)
        ]

    def choices(self, epoch: int) -> Choices:
        """Return the choices for `epoch`, (steps, B) each, on the images' device; `index` counts over all shards."""
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
                values = values.pin_memory()  # otherwise the copy waits for everything in the GPU's queue
            together.append(values.to(self.home, non_blocking=True))
        self._drawn = epoch, Choices(*together)
        return self._drawn[1]

    def example_choices(self) -> list[Tensor]:
        """Return the choices for one batch, (B,) each, as an example for a compiler or a capture of `make`."""
        chosen = [values[0].clone() for values in vars(self.choices(0)).values()]
        self._drawn = None  # training draws them again, because its clock counts the drawing
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

    def augmented(self, images: Tensor, labels: Tensor, epoch: int, number: int) -> tuple[Tensor, Tensor]:
        """Return batch `number` of `epoch` as the reader's own function changes it, shard by shard, if there is one."""
        if self.augment is None:
            return images, labels
        size = self.recipe.local_batch_size
        parts = []
        for shard, part, target in zip(self.shards, images.split(size), labels.split(size), strict=True):
            generator = _generator(2, self.seeds.augmentation, 0, epoch, number, shard)
            parts.append(_require_batch(self.augment(part, target, generator), size))
        images, labels = (torch.cat(each) for each in zip(*parts, strict=True))
        memory_format = torch.channels_last if self.recipe.channels_last else torch.contiguous_format
        return images.to(self.device, self.dtype).contiguous(memory_format=memory_format), labels.to(self.device)

    def total_steps(self) -> int:
        """Return the number of optimiser steps of the whole training run."""
        return math.ceil(self.recipe.epochs * self.steps_per_epoch)
