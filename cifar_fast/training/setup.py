"""Builds all that a training step needs: the only place that does."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from cifar_fast.data.dataset import Dataset
from cifar_fast.errors import UserError
from cifar_fast.hardware.cuda_graph import EAGER, StepMode, choose_step_mode
from cifar_fast.hardware.device import environment, has_float64
from cifar_fast.hardware.numerics import Capabilities, Numerics, capabilities, choose_numerics
from cifar_fast.recipe import Recipe
from cifar_fast.training.alone import ALONE, Alone
from cifar_fast.training.averaging import EMA, Lookahead
from cifar_fast.training.batches import TrainBatches, pixel_statistics
from cifar_fast.training.gradients import flat_gradients
from cifar_fast.training.model import Network, build_network, whiten_first_layer
from cifar_fast.training.seeds import Seeds
from cifar_fast.training.step import Loss, TrainingStep, Update
from cifar_fast.training.tricks import NO_TRICKS, Tricks, require_optimizers

WHITENING_IMAGES = 10_000
"""Training images whose patches the whitening layer is computed from: the first ones, as Page (2019) takes them."""


@dataclass(frozen=True)
class Execution:
    """How a recipe is computed here: its numerics, and whether its step is eager, compiled or captured."""

    numerics: Numerics
    step_mode: StepMode = EAGER

    def describe(self) -> dict[str, Any]:
        """Return it as plain values, for results."""
        return self.numerics.describe() | self.step_mode.describe()


def choose_execution(
    recipe: Recipe, device: torch.device, backend: str | None = None, tricks: Tricks = NO_TRICKS
) -> Execution:
    """Return how `device` computes `recipe` with `tricks`; `backend` connects the processes, None for a single one."""
    numerics = tricks.explained(choose_numerics(tricks.fitted(recipe), device))
    return Execution(numerics, tricks.restricted(choose_step_mode(recipe, device, backend), recipe))


@dataclass(frozen=True)
class _Report:
    """What one rank tells the others before they start."""

    started_with: dict[str, Any]
    can: Capabilities
    execution: Execution | None
    """Rank 0's choice, which all follow: ranks that measured for themselves might choose differently."""


def agree_on_execution(
    recipe: Recipe, data: Dataset, seed: int | Seeds, device: torch.device, ranks: Alone, tricks: Tricks = NO_TRICKS
) -> Execution:
    """Have all ranks check that they train the same thing, and choose how, in one exchange.

    Raises `UserError` on every rank if the recipe, data set, seed or tricks of one differ from those of rank 0.
    Warns if the recipe asks for a precision that is not available.
    """
    mine = {
        "recipe": recipe.to_dict(),
        "data set": data.describe(),
        "seed": Seeds.of(seed).plain(),
        "tricks": tricks.fingerprint(),
    }
    # On a GPU nothing is measured, so each rank can check whether the kernels work on its own GPU.
    asked = ranks.is_main or device.type == "cuda"
    chosen = choose_execution(recipe, device, ranks.backend, tricks) if asked else None
    # On a CPU, asking compiles the C kernels, which a GPU never uses.
    can = capabilities() if device.type == "cpu" else Capabilities({}, bool(chosen and chosen.numerics.fuse_norm))
    reports = ranks.gather(_Report(mine, can, chosen))
    _require_same_start([report.started_with for report in reports])
    execution = reports[0].execution
    assert execution is not None
    numerics = execution.numerics.restricted_to([report.can for report in reports])
    if recipe.precision not in ("auto", numerics.describe()["precision"]):
        warnings.warn(f"precision={recipe.precision} is not used: {numerics.reason}", stacklevel=3)
    return Execution(numerics, execution.step_mode)


def _require_same_start(reports: Sequence[Mapping[str, Any]]) -> None:
    for rank, report in enumerate(reports):
        for name, expected in reports[0].items():
            if report[name] != expected:
                raise UserError(
                    f"rank {rank} was started with a different {name} from rank 0: {report[name]}, where rank 0 has "
                    f"{expected}; start all ranks with the same command and the same data"
                )


@dataclass
class Setup:
    """All that a training step needs, on the device."""

    recipe: Recipe
    data: Dataset
    device: torch.device
    execution: Execution
    ranks: Alone
    model: Network
    batches: TrainBatches
    optimizers: list[torch.optim.Optimizer]
    loss: Loss
    schedule: Callable[[float], float]
    ema: EMA | None
    lookahead: Lookahead | None
    gradients: Tensor | None
    """The buffer that holds all gradients where NCCL averages them."""
    tricks: Tricks = NO_TRICKS

    @cached_property
    def test_set(self) -> tuple[Tensor, Tensor]:
        """This rank's share of the test images and labels, sent to the device when it is first asked for."""
        share = slice(self.ranks.rank, None, self.ranks.world_size)
        return self.data.test_images[share].to(self.device), self.data.test_labels[share].to(self.device)

    def update(self) -> Update:
        """Return the part of the step that works on tensors alone, eager."""
        return Update(
            self.model,
            self.optimizers,
            self.recipe,
            self.execution.numerics.dtype,
            self.ranks,
            self.gradients,
            self.loss,
            self.tricks.own,
        )

    def step(self) -> TrainingStep:
        """Return the training step, eager; `capture.prepare_step` compiles or captures it."""
        return TrainingStep(
            self.recipe,
            self.model,
            self.optimizers,
            self.schedule,
            self.batches.steps_per_epoch,
            self.ema,
            self.lookahead,
            updates=dict.fromkeys((False, True), self.update()),
            own=self.tricks.own,
        )

    def environment(self) -> dict[str, Any]:
        """Return what the results of this set-up rest on: hardware, versions, numerics, step mode, processes."""
        processes = {"world_size": self.ranks.world_size, "backend": self.ranks.backend}
        return environment(self.device) | self.execution.describe() | processes


def set_up(
    recipe: Recipe,
    data: Dataset,
    execution: Execution,
    *,
    device: torch.device,
    seed: int | Seeds = 0,
    ranks: Alone = ALONE,
    tricks: Tricks = NO_TRICKS,
) -> Setup:
    """Send the data to the device and build there what a training step needs: everything a recipe's clock counts.

    Args:
        recipe: what is trained.
        data: its images and labels; the ranks share the training set.
        execution: how it is computed.
        device: where.
        seed: seed of the weights and of every random choice; `Seeds` to give each kind of choice its own.
        ranks: the processes that share the work; all start from rank 0's weights.
        tricks: the reader's own parts; those that are missing are the recipe's.

    Raises:
        RecipeError: the recipe does not fit the data.
        TricksError: a part of the reader's own does not fit.
    """
    seeds = Seeds.of(seed)
    parts, fitted = tricks.completed(recipe, execution.numerics), tricks.fitted(recipe)
    assert parts.model and parts.optimizers and parts.loss and parts.schedule
    images = data.train_images.to(device) if recipe.preload else data.train_images
    # Pixel statistics and whitening filters take float64: without it, the CPU computes them.
    exact = device if has_float64(device) else torch.device("cpu")
    exact_images = images if has_float64(device) else data.train_images
    mean, std = pixel_statistics(exact_images)
    model = build_network(
        parts.model, recipe, data.n_classes, mean, std, memory_format=tricks.memory_format, seed=seeds.start
    )
    # Weights stay in float32: a format with fewer digits would lose the small steps.
    dtype = torch.float64 if execution.numerics.dtype == torch.float64 else torch.float32
    model = model.to(exact, dtype)
    model = model.to(memory_format=torch.channels_last if fitted.channels_last else torch.preserve_format)
    batches = TrainBatches(
        images,
        data.train_labels,
        fitted,
        device=device,
        dtype=dtype,
        mean=mean,
        std=std,
        seed=seeds,
        rank=ranks.rank,
        world_size=ranks.world_size,
        augment=parts.augment,
    )
    whiten_first_layer(model, recipe, exact_images[:WHITENING_IMAGES].to(exact))
    model = model.to(device)
    ranks.copy_from_main(model)
    optimizers = require_optimizers(parts.optimizers(model.layers, recipe), model.layers)
    return Setup(
        fitted,
        data,
        device,
        execution,
        ranks,
        model,
        batches,
        optimizers,
        parts.loss,
        parts.schedule,
        EMA(model, recipe.ema_decay**recipe.ema_every) if recipe.ema_decay else None,
        Lookahead(model, recipe.lookahead_alpha) if recipe.lookahead_alpha else None,
        flat_gradients(model) if ranks.backend == "nccl" else None,
        tricks,
    )
