"""Checks the exercises of notebook 10: averages of weights and of views."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cifar_fast.teaching.exercises.checks import Wrong, exercise, expect_close


@exercise(
    "10.1",
    title="A decay for a horizon",
    difficulty=1,
    minutes=5,
    hints=(
        "The mean age of an average with decay d is d / (1 - d) steps. Set that to mean_age.",
        "Solve mean_age * (1 - d) = d for d.",
    ),
    wrong=(lambda mean_age: 1 - 1 / mean_age, lambda mean_age: mean_age / (1 - mean_age)),
)
def decay_for(answer: Callable[[float], float]) -> None:
    """Check that the decay gives the mean age."""
    for mean_age in (19, 99, 4):
        expect_close(answer(mean_age), mean_age / (mean_age + 1), f"the decay for a mean age of {mean_age} steps")


def _started_at_the_first_value(values: Sequence[float], decay: float) -> list[float]:
    averages = [values[0]]
    for value in values[1:]:
        averages.append(decay * averages[-1] + (1 - decay) * value)
    return averages


def _never_divided(values: Sequence[float], decay: float) -> list[float]:
    average, averages = 0.0, []
    for value in values:
        average = decay * average + (1 - decay) * value
        averages.append(average)
    return averages


@exercise(
    "10.2",
    title="An average without a memory of its start",
    difficulty=2,
    minutes=10,
    hints=(
        "Start with average = 0 and move it as an EMA does. Its shares then add up to less than 1 at first.",
        "After t values the shares add up to 1 - decay**t. Append the average divided by that, and go on with the "
        "average itself.",
    ),
    wrong=(_started_at_the_first_value, _never_divided),
)
def corrected_average(answer: Callable[[Sequence[float], float], Sequence[float]]) -> None:
    """Check the first average, a constant, and values that rise."""
    expect_close(answer([7.0], 0.9), [7.0], "the average of a single value")
    expect_close(answer([3.0] * 5, 0.8), [3.0] * 5, "the average of five equal values")
    values, decay = [1.0, 2.0, 4.0, 8.0], 0.5
    wanted = []
    for n in range(1, len(values) + 1):
        shares = [decay ** (n - 1 - i) for i in range(n)]
        wanted.append(sum(s * v for s, v in zip(shares, values[:n], strict=True)) / sum(shares))
    expect_close(answer(values, decay), wanted, "the averages of 1, 2, 4, 8 with a decay of 0.5")


def _views(images: Tensor, corners: Sequence[tuple[int, int]]) -> list[Tensor]:
    height, width = images.shape[-2:]
    padded = F.pad(images, (1, 1, 1, 1), mode="reflect")
    return [padded[:, :, top : top + height, left : left + width] for top, left in corners]


def _average(model: nn.Module, images: Tensor, corners: Sequence[tuple[int, int]], of_the_shifted: float) -> Tensor:
    def with_mirror(view: Tensor) -> Tensor:
        return (model(view) + model(view.flip(-1))) / 2

    shifted = torch.stack([with_mirror(view) for view in _views(images, corners)]).mean(0)
    return (1 - of_the_shifted) * with_mirror(images) + of_the_shifted * shifted


FOUR = ((0, 0), (0, 2), (2, 0), (2, 2))
"""Where the views begin in the padded image: top and left."""


@exercise(
    "10.3",
    title="Ten views",
    difficulty=2,
    minutes=15,
    hints=(
        "Start from six_views. The two missing shifts are padded[..., :-2, 2:] and padded[..., 2:, :-2].",
        "with_mirror of the image counts 1/2; with_mirror of each of the four shifted views counts 1/8.",
    ),
    wrong=(
        lambda model, images: _average(model, images, (FOUR[0], FOUR[3]), 0.5),
        lambda model, images: _average(model, images, FOUR, 0.8),
    ),
)
def ten_views(answer: Callable[[nn.Module, Tensor], Tensor]) -> None:
    """Check that mirror images get the same logits, and that the weights are right."""
    random = torch.Generator().manual_seed(0)
    images = torch.randn(4, 3, 8, 8, generator=random)
    weight = torch.randn(10, 3 * 8 * 8, generator=random) / 14
    model = nn.Sequential(nn.Flatten(), nn.Linear(3 * 8 * 8, 10, bias=False), nn.ReLU())
    model[1].weight.data = weight  # its outputs are nothing like those of a mirrored image
    with torch.no_grad():
        found, mirrored = answer(model, images), answer(model, images.flip(-1))
        wanted = _average(model, images, FOUR, 0.5)
    if isinstance(found, Tensor) and isinstance(mirrored, Tensor) and found.shape == mirrored.shape == wanted.shape:
        apart = (found - mirrored).abs().max().item()
        if apart > 1e-4:
            raise Wrong(f"an image and its mirror image should get the same logits, but they differ by {apart:.3f}")
    expect_close(found, wanted, "the logits", rtol=1e-4, atol=1e-4)
