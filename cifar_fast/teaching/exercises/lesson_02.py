"""Exercises of notebook 02: random offsets, cutout for a batch, balanced flips."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from cifar_fast.teaching.exercises.checks import Wrong, exercise, expect_close
from cifar_fast.training import augment


def _generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _one_too_few(n_images: int, padding: int, generator: torch.Generator) -> Tensor:
    return torch.randint(0, 2 * padding, (n_images,), generator=generator)


def _without_the_generator(n_images: int, padding: int, generator: torch.Generator) -> Tensor:
    return torch.randint(0, 2 * padding + 1, (n_images,))


def _one_for_all(n_images: int, padding: int, generator: torch.Generator) -> Tensor:
    return torch.randint(0, 2 * padding + 1, (1,), generator=generator).expand(n_images)


@exercise(
    "02.1",
    title="Every offset",
    difficulty=1,
    minutes=5,
    hints=(
        "The padded image is 2 * padding pixels wider than the crop. How many places does the crop have in it?",
        "torch.randint(low, high, size, generator=...) draws from low to high - 1.",
    ),
    wrong=(_one_too_few, _without_the_generator, _one_for_all),
)
def draw_offsets(answer: Callable[[int, int, torch.Generator], Tensor]) -> None:
    """Check that every offset occurs about equally often, and nothing else, and that the generator decides."""
    for padding in (1, 2, 4):
        n_images, n_offsets = 20_000, 2 * padding + 1
        drawn = answer(n_images, padding, _generator(0))
        if not isinstance(drawn, Tensor) or drawn.shape != (n_images,) or drawn.dtype != torch.int64:
            raise Wrong(f"the offsets should be an int64 tensor of shape ({n_images},)")
        low, high = drawn.min().item(), drawn.max().item()
        if low != 0 or high != 2 * padding:
            raise Wrong(f"with padding={padding} the offsets should reach from 0 to {2 * padding}, not {low} to {high}")
        share = torch.bincount(drawn) / n_images
        if (share * n_offsets - 1).abs().max() > 0.15:
            raise Wrong(f"with padding={padding} some offsets are much likelier than others: {share.tolist()}")
        if not torch.equal(drawn, answer(n_images, padding, _generator(0))):
            raise Wrong("the same generator should give the same offsets: pass it on to the call that draws")


def _loses_a_row(images: Tensor, tops: Tensor, lefts: Tensor, size: int) -> Tensor:
    return augment.cutout(images, tops, lefts, size - 1)


def _in_place(images: Tensor, tops: Tensor, lefts: Tensor, size: int) -> Tensor:
    return images.copy_(augment.cutout(images, tops, lefts, size))


def _turned(images: Tensor, tops: Tensor, lefts: Tensor, size: int) -> Tensor:
    return augment.cutout(images, lefts, tops, size)


@exercise(
    "02.2",
    title="Cutout for a batch",
    difficulty=2,
    minutes=10,
    hints=(
        "A pixel belongs to the square if its row and its column do. Compare torch.arange(H) with all tops at once.",
        "With rows of shape (1, H, 1), columns (1, 1, W), tops and lefts (N, 1, 1), broadcasting does the rest.",
        "Combine the four comparisons with & to a mask (N, H, W), and use images.masked_fill(mask[:, None], 0).",
    ),
    wrong=(_loses_a_row, _in_place, _turned),
)
def cutout(answer: Callable[[Tensor, Tensor, Tensor, int], Tensor]) -> None:
    """Compare with the package's cutout, for squares inside the images and partly outside."""
    random = _generator(0)
    images = torch.randn(64, 3, 12, 16, generator=random)
    for where, low, high in (("inside the image", 0, 8), ("partly outside the image", -3, 15)):
        tops, lefts = torch.randint(low, high, (2, len(images)), generator=random)
        wanted, before = augment.cutout(images, tops, lefts, 5), images.clone()
        found = answer(images, tops, lefts, 5)
        if not torch.equal(images, before):
            raise Wrong("the images that were passed in have changed; return new ones")
        expect_close(found, wanted, f"the batch with squares {where}")


def _coins(n_images: int, epochs: int, generator: torch.Generator) -> Tensor:
    first = torch.randint(0, 2, (n_images,), generator=generator).bool()
    return first ^ (torch.arange(epochs) % 2 == 1)[:, None]


def _anew(n_images: int, epochs: int, generator: torch.Generator) -> Tensor:
    return torch.stack([torch.randperm(n_images, generator=generator) < n_images // 2 for _ in range(epochs)])


def _always_the_same(n_images: int, epochs: int, generator: torch.Generator) -> Tensor:
    return (torch.arange(epochs)[:, None] + torch.arange(n_images)) % 2 == 1


@exercise(
    "02.3",
    title="Balanced flips",
    difficulty=2,
    minutes=10,
    hints=(
        "Only the first epoch is random. Every later one follows from it.",
        "Start from torch.zeros(n_images, dtype=torch.bool), and set the places in the permutation's first half.",
        "An epoch's number modulo 2, as bool of shape (epochs, 1), and ^ with the first epoch give all of them.",
    ),
    wrong=(_coins, _anew, _always_the_same),
)
def balanced_flips(answer: Callable[[int, int, torch.Generator], Tensor]) -> None:
    """Check that half of the images are mirrored in every epoch, that all alternate, and that the start is random."""
    n_images, epochs = 1000, 5
    found = answer(n_images, epochs, _generator(0))
    if not isinstance(found, Tensor) or found.shape != (epochs, n_images) or found.dtype != torch.bool:
        raise Wrong(f"the flips should be a bool tensor of shape ({epochs}, {n_images}), a row for each epoch")
    for epoch, mirrored in enumerate(found.sum(1).tolist()):
        if mirrored != n_images // 2:
            raise Wrong(f"epoch {epoch} mirrors {mirrored} of {n_images} images; it should mirror half of them")
    if not (found[1:] ^ found[:-1]).all():
        raise Wrong("some images show the same side in two epochs in a row")
    permutation = torch.randperm(n_images, generator=_generator(0))
    if not found[0, permutation[: n_images // 2]].all():
        raise Wrong("epoch 0 should mirror the images that the first half of the permutation names")
