"""The optimiser of Page (2019) and Apple (2019), from its formulas: the learning rate inside the velocity.

For a parameter w with gradient g, at the rate lr of step k = 1, 2, ..., read from the schedule at k / steps per epoch:
u = -lr (g + decay w), v <- momentum v + u, w <- w + u + momentum v.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from cifar_fast import recipes, replace
from cifar_fast.recipe import Recipe
from cifar_fast.training.optim import build_optimizers, lr_schedule, set_learning_rates
from cifar_fast.training.step import TrainingStep

APPLE = recipes.apple_8gpu()
STEPS_PER_EPOCH = 24  # 8 workers with 6,250 images each, 256 in a batch


def apples_rates() -> np.ndarray:
    """The 432 learning rates of Apple's run, divided by 256 there because losses are summed."""
    return np.interp(np.arange(1, 433) / STEPS_PER_EPOCH, [0, 18 / 5, 18 - 2, 18], [0, 1.5, 0.15, 0.15])


class Line(nn.Module):
    """Nothing but parameters: a weight and a bias whose gradients a test sets."""

    def __init__(self, dtype: torch.dtype = torch.float64) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(3, 2)).to(dtype)


def step_of(model: Line, recipe: Recipe, update: object) -> TrainingStep:
    optimizers = build_optimizers(model, recipe)
    return TrainingStep(
        recipe, model, optimizers, lr_schedule(recipe), STEPS_PER_EPOCH, None, None, {False: update, True: update}
    )


def test_each_of_the_432_rates_is_apples() -> None:
    seen: list[float] = []

    def update(images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        weights, biases = step.optimizers[0].param_groups[:2]
        seen.append(weights["lr"])
        assert biases["lr"] == 64 * weights["lr"]
        return images, labels

    step = step_of(Line(), APPLE, update)
    for _ in range(432):
        step(torch.zeros(()), torch.zeros(()))
    np.testing.assert_allclose(seen, apples_rates(), rtol=1e-12)
    assert seen[0] > 0  # the schedule is read at the end of a step


def reference(weights: Tensor, gradients: list[Tensor], rates: np.ndarray, decay: float, momentum: float) -> Tensor:
    """The formulas of this file's docstring, for one parameter."""
    w, v = weights.clone(), torch.zeros_like(weights)
    for g, lr in zip(gradients, rates, strict=False):
        u = -lr * (g + decay * w)
        v = momentum * v + u
        w = w + u + momentum * v
    return w


@pytest.mark.parametrize("rates_in_memory", [False, True], ids=["numbers", "tensors"])
def test_fifty_steps_are_the_formula(rates_in_memory: bool) -> None:
    random = torch.Generator().manual_seed(0)
    model = Line()
    optimizers = build_optimizers(model, APPLE)
    weight, bias = model.layers[0].weight, model.layers[0].bias
    gradients = [
        [torch.randn(p.shape, generator=random, dtype=torch.float64) for _ in range(50)] for p in (weight, bias)
    ]
    decay = 5e-4 * 1.5  # of the weights, for a mean loss; a sixty-fourth of it for the biases
    expected = [
        reference(weight.detach(), gradients[0], apples_rates(), decay, 0.9),
        reference(bias.detach(), gradients[1], 64 * apples_rates(), decay / 64, 0.9),
    ]
    schedule = lr_schedule(APPLE)
    if rates_in_memory:  # as a captured step reads them, here in double precision
        for group in optimizers[0].param_groups:
            group["lr"] = torch.tensor(0.0, dtype=torch.float64)
    for k in range(50):
        weight.grad, bias.grad = gradients[0][k].clone(), gradients[1][k].clone()
        set_learning_rates(optimizers, schedule, (k + 1) / STEPS_PER_EPOCH)
        optimizers[0].step()
    for p, value in zip((weight, bias), expected, strict=True):
        torch.testing.assert_close(p.detach(), value, rtol=1e-13, atol=1e-13)


def distances(recipe: Recipe) -> np.ndarray:
    """How far a weight has moved after each of 432 steps under a constant gradient of 1."""
    model = Line()
    weight, moved = model.layers[0].weight, []
    start = weight.detach().clone()

    def update(images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        weight.grad = torch.ones_like(weight)
        model.layers[0].bias.grad = torch.zeros_like(model.layers[0].bias)
        step.optimizers[0].step()
        moved.append((start - weight.detach()).mean().item())
        return images, labels

    step = step_of(model, replace(recipe, weight_decay=0.0), update)
    for _ in range(432):
        step(torch.zeros(()), torch.zeros(()))
    return np.array(moved)


def test_under_a_constant_gradient_torchs_form_runs_ahead_while_the_rate_rises() -> None:
    torchs = distances(replace(APPLE, lr_in_velocity=False, schedule_time="start"))
    ratios = (torchs / distances(APPLE))[[9, 19, 42, 85, 215, 431]]
    np.testing.assert_allclose(ratios, [1.20, 1.30, 1.25, 1.15, 1.03, 0.999], atol=0.006)


def test_at_a_constant_rate_the_two_forms_are_the_same() -> None:
    constant = replace(APPLE, start_lr_fraction=1.0, warmup_fraction=0.0, final_lr_fraction=1.0)
    np.testing.assert_allclose(distances(constant), distances(replace(constant, lr_in_velocity=False)), rtol=1e-12)
