"""Checks the exercises of notebook 09: schedules and optimisers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from cifar_fast import recipes
from cifar_fast.teaching.exercises.checks import exercise, expect_close
from cifar_fast.training.optim import lr_schedule


@exercise(
    "09.1",
    title="Apple's schedule",
    difficulty=1,
    minutes=5,
    hints=(
        "`np.interp(epoch, times, values)` draws the straight lines, and stays constant after the last time.",
        "Three points: (0, 0), (epochs / 5, 1) and (epochs - 2, 0.1).",
    ),
)
def apple_schedule(answer: Callable[[float, float], float]) -> None:
    """Compare with the package's schedule of `apple_8gpu`, at its own and at another number of epochs."""
    for epochs in (18.0, 10.0):
        wanted = lr_schedule(replace(recipes.apple_8gpu(), epochs=epochs))
        for epoch in (0.0, 1.0, epochs / 5, 5.0, epochs - 2, epochs - 1, epochs):
            expect_close(answer(epoch, epochs), wanted(epoch), f"the share at epoch {epoch:g} of {epochs:g}")


def _coupled(
    weights: Tensor, gradient: Tensor, velocity: Tensor, lr: float, momentum: float, weight_decay: float
) -> tuple[Tensor, Tensor]:
    gradient = gradient + weight_decay * weights
    velocity = momentum * velocity + gradient
    return weights - lr * (gradient + momentum * velocity), velocity


@exercise(
    "09.2",
    title="Decoupled weight decay",
    difficulty=2,
    minutes=10,
    hints=(
        "`weight_decay` must not touch the gradient or the velocity.",
        "The velocity is momentum * velocity + gradient; with it, the step is lr * (gradient + momentum * velocity).",
        "New weights: (1 - lr * weight_decay) * weights minus that step.",
    ),
    wrong=(_coupled,),
)
def decoupled_step(answer: Callable[..., tuple[Tensor, Tensor]]) -> None:
    """Follow three steps, without weight decay as torch's SGD takes them, and with it."""
    generator = torch.Generator().manual_seed(0)
    for lr, momentum, weight_decay in ((0.1, 0.9, 0.0), (0.1, 0.9, 0.5)):
        weights = torch.randn(4, generator=generator, dtype=torch.float64)
        velocity = torch.zeros_like(weights)
        for step in range(1, 4):
            gradient = torch.randn(4, generator=generator, dtype=torch.float64)
            new_velocity = momentum * velocity + gradient
            new_weights = (1 - lr * weight_decay) * weights - lr * (gradient + momentum * new_velocity)
            given = (weights.clone(), gradient.clone(), velocity.clone(), lr, momentum, weight_decay)
            found_weights, found_velocity = answer(*given)
            when = f"after step {step} with weight_decay={weight_decay:g}"
            expect_close(found_velocity, new_velocity, f"the velocity {when}")
            expect_close(found_weights, new_weights, f"the weights {when}")
            weights, velocity = new_weights, new_velocity


@exercise(
    "09.3",
    title="The arithmetic of Muon",
    difficulty=2,
    minutes=10,
    hints=(
        "Swap m and n where m > n: the gram matrix then has the smaller side.",
        "With m <= n: X X' takes m * n * m, its square m * m * m, and the product with X takes m * m * n.",
    ),
    wrong=(lambda m, n, steps: steps * (2 * m * m * n + m**3),),  # forgets to transpose
)
def newton_schulz_multiplications(answer: Callable[[int, int, int], int]) -> None:
    """Check wide, square and tall matrices."""
    for m, n, steps in ((2, 3, 1), (64, 576, 3), (5, 5, 2), (64, 27, 3)):
        small, large = min(m, n), max(m, n)
        wanted = steps * (2 * small**2 * large + small**3)
        expect_close(answer(m, n, steps), wanted, f"the count for a ({m}, {n}) matrix and {steps} iterations")
