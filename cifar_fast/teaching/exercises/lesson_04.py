"""The exercises of notebook 04, label smoothing."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from cifar_fast.teaching.exercises.checks import Wrong, exercise, expect_close


@exercise(
    "04.1",
    title="The lowest loss",
    difficulty=1,
    minutes=5,
    hints=(
        "The loss is lowest where the softmax equals the target. What is the cross entropy of the target with itself?",
        "One class has the probability 1 - a + a/K, the other K - 1 have a/K. Add up -p log p.",
        "Without smoothing the other classes have the probability 0. torch.special.entr counts 0 log 0 as 0.",
    ),
    wrong=(
        lambda smoothing, n_classes: 0.0,
        lambda smoothing, n_classes: -math.log(1 - smoothing + smoothing / n_classes),
        lambda smoothing, n_classes: math.log(n_classes),
    ),
)
def lowest_loss(answer: Callable[[float, int], float]) -> None:
    """The entropy of the smoothed target."""
    for smoothing, n_classes in ((0.2, 10), (0.5, 100), (0.0, 10)):
        others = torch.full((n_classes,), smoothing / n_classes, dtype=torch.float64)
        others[0] += 1 - smoothing
        wanted = torch.special.entr(others).sum().item()
        found = answer(smoothing, n_classes)
        expect_close(
            found, wanted, f"the lowest loss for a smoothing of {smoothing:g} and {n_classes} classes", atol=1e-5
        )


@exercise(
    "04.2",
    title="The best temperature",
    difficulty=2,
    minutes=10,
    hints=(
        "Divide the logits by a temperature and call F.cross_entropy. Which temperature makes the result smallest?",
        "A grid is enough: torch.logspace(-1, 1, 201) has 201 temperatures from 0.1 to 10, the same factor apart.",
        "Compute the loss for each temperature of the grid; return the one at position losses.index(min(losses)).",
    ),
    wrong=(
        lambda logits, labels: 1.0,
        lambda logits, labels: min(
            torch.logspace(-1, 1, 201).tolist(), key=lambda t: F.cross_entropy(logits * t, labels).item()
        ),
        lambda logits, labels: 0.1,
    ),
)
def best_temperature(answer: Callable[[Tensor, Tensor], float]) -> None:
    """The temperature with the lowest loss, for networks that are too confident, or not confident enough."""
    generator = torch.Generator().manual_seed(0)
    calibrated = torch.randn(2000, 10, generator=generator)
    labels = torch.multinomial(calibrated.softmax(1), 1, generator=generator)[:, 0]
    for factor, network in ((3.0, "too confident"), (0.4, "not confident enough")):
        logits = factor * calibrated

        def loss(temperature: float, logits: Tensor = logits) -> float:
            return F.cross_entropy(logits / temperature, labels).item()

        best = min(torch.logspace(-1, 1, 401).tolist(), key=loss)
        found = answer(logits, labels)
        expect_close(found, best, f"the best temperature of a network that is {network}", rtol=0.05, atol=0.0)


@exercise(
    "04.3",
    title="Smoothing among similar classes",
    difficulty=2,
    minutes=15,
    hints=(
        "First find out which classes share a group with each label: compare groups[labels][:, None] with groups.",
        "That comparison gives a table (N, K). Divide each row by its sum, and the group shares 1 evenly.",
        "The target is (1 - smoothing) times the one-hot label, plus smoothing times that table.",
    ),
    wrong=(
        lambda labels, groups, smoothing: (
            (1 - smoothing) * F.one_hot(labels, len(groups)).double() + smoothing / len(groups)
        ),
        lambda labels, groups, smoothing: (
            (1 - smoothing) * F.one_hot(labels, len(groups)).double()
            + smoothing * (groups[labels][:, None] == groups).double()
        ),
    ),
)
def grouped_target(answer: Callable[[Tensor, Tensor, float], Tensor]) -> None:
    """Targets that share their smoothing among the classes of one group."""
    groups = torch.tensor([0, 0, 1, 1, 1, 1, 1, 1, 0, 0])
    target = answer(torch.tensor([2, 9]), groups, 0.3)
    if isinstance(target, Tensor) and target.shape == (2, 10) and not torch.allclose(target.sum(1), target.new_ones(2)):
        raise Wrong(f"each target should sum to 1, but the sums are {[round(s, 3) for s in target.sum(1).tolist()]}")
    bird = [0, 0, 0.75, 0.05, 0.05, 0.05, 0.05, 0.05, 0, 0]
    truck = [0.075, 0.075, 0, 0, 0, 0, 0, 0, 0.075, 0.775]
    expect_close(target, [bird, truck], "the target of a bird and a truck", rtol=1e-4, atol=1e-5)
    alone = answer(torch.tensor([1]), torch.tensor([0, 1, 2]), 0.3)
    expect_close(alone, [[0.0, 1.0, 0.0]], "the target of a class that is alone in its group", rtol=1e-4, atol=1e-5)
