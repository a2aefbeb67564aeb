"""Checks the exercises of notebook 13: a loss, an augmentation and a schedule as tricks."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from cifar_fast.teaching.exercises.checks import Wrong, exercise, expect_close
from cifar_fast.training.tricks import Tricks


def _mean(logits: Tensor, labels: Tensor, epsilon: float) -> Tensor:
    return F.cross_entropy(logits, labels) + epsilon * (1 - logits.softmax(1).mean())


@exercise(
    "13.1",
    title="PolyLoss",
    difficulty=1,
    minutes=5,
    hints=(
        "F.cross_entropy(logits, labels, reduction='none') gives the first term for each image.",
        "The probability of an image's label is exp(-cross entropy).",
    ),
    wrong=(_mean,),
)
def poly_loss(answer: Callable[[Tensor, Tensor, float], Any]) -> None:
    """Compare with the formula, image by image."""
    logits = torch.randn(6, 10, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    labels = torch.arange(6)
    right = logits.softmax(1)[torch.arange(6), labels]
    for epsilon in (0.0, 2.0):
        expect_close(
            answer(logits, labels, epsilon), -right.log() + epsilon * (1 - right), f"the loss for epsilon={epsilon:g}"
        )


def _global_draws(images: Tensor, labels: Tensor, generator: torch.Generator, share: float) -> tuple[Tensor, Tensor]:
    chosen = torch.rand(len(images)) < share
    return torch.where(chosen[:, None, None, None], images.mean(1, keepdim=True), images), labels


def _in_place(images: Tensor, labels: Tensor, generator: torch.Generator, share: float) -> tuple[Tensor, Tensor]:
    chosen = torch.rand(len(images), generator=generator) < share
    images[chosen] = images[chosen].mean(1, keepdim=True)
    return images, labels


def _all_grey(images: Tensor, labels: Tensor, generator: torch.Generator, share: float) -> tuple[Tensor, Tensor]:
    torch.rand(1, generator=generator)
    return images.mean(1, keepdim=True).expand_as(images), labels


@exercise(
    "13.2",
    title="Some images in grey",
    difficulty=2,
    minutes=10,
    hints=(
        "Draw one number for each image: torch.rand(len(images), generator=generator).",
        "The grey image is images.mean(1, keepdim=True), the mean of the three channels.",
        "torch.where(chosen[:, None, None, None], grey, images) takes from each what is chosen, and changes neither.",
    ),
    wrong=(_global_draws, _in_place, _all_grey),
)
def some_grey(answer: Callable[[Tensor, Tensor, torch.Generator, float], Any]) -> None:
    """Look at which images are grey, and whether the generator alone decides it."""
    images = torch.randn(400, 3, 4, 4, generator=torch.Generator().manual_seed(1))
    labels, before = torch.arange(400) % 10, images.clone()
    grey = images.mean(1, keepdim=True).expand_as(images)

    def run(seed: int, share: float) -> Tensor:
        torch.manual_seed(len(drawn))  # torch's global generator differs each time, so that drawing from it shows
        found, targets = answer(images, labels, torch.Generator().manual_seed(seed), share)
        if not torch.equal(images, before):
            raise Wrong("the images that were passed in should stay as they were; return new ones")
        expect_close(targets, labels, "the labels")
        expect_close(tuple(found.shape), tuple(images.shape), "the shape of the images")
        drawn.append(found)
        return found

    drawn: list[Tensor] = []
    with torch.random.fork_rng(devices=[]):
        expect_close(run(0, 0.0), images, "with share=0, an image")
        expect_close(run(0, 1.0), grey, "with share=1, an image")
        first, again, other = run(0, 0.25), run(0, 0.25), run(1, 0.25)
    if not torch.equal(first, again) or torch.equal(first, other):
        raise Wrong("the same generator should choose the same images, and another one should choose others")
    is_grey = torch.isclose(first, grey, atol=1e-6).flatten(1).all(1)
    if not torch.equal(torch.where(is_grey[:, None, None, None], images, first), images):
        raise Wrong("an image should be either grey or as it was")
    if not 60 <= (n := int(is_grey.sum())) <= 140:
        raise Wrong(f"with share=0.25 about 100 of 400 images should be grey, not {n}")


def _without_warm_up(epochs: float) -> Callable[[float], float]:
    return lambda epoch: (1 + math.cos(math.pi * epoch / epochs)) / 2


@exercise(
    "13.3",
    title="A cosine schedule",
    difficulty=2,
    minutes=10,
    hints=(
        "Return an inner function: def factor(epoch): ...",
        "The cosine's half wave goes from 1 to -1 while its argument goes from 0 to pi.",
        "After the warm-up: (1 + cos(pi * (epoch - 0.5) / (epochs - 0.5))) / 2.",
    ),
    wrong=(_without_warm_up,),
)
def cosine(answer: Callable[[float], Callable[[float], float]]) -> None:
    """Compare with the formula, and make a trick of it."""
    for epochs in (2.0, 8.0):
        schedule = answer(epochs)
        if not callable(schedule):
            raise Wrong(f"cosine({epochs:g}) should be a function of the epoch, not {type(schedule).__name__}")
        Tricks(schedule=schedule)
        for share in (0.0, 0.1, 0.3, 0.5, 0.75, 1.0):
            epoch = share * epochs
            late = (1 + math.cos(math.pi * (epoch - 0.5) / (epochs - 0.5))) / 2
            wanted = epoch / 0.5 if epoch < 0.5 else late
            expect_close(float(schedule(epoch)), wanted, f"cosine({epochs:g})({epoch:g})", rtol=1e-6, atol=1e-9)
