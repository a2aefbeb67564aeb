"""Compiles a training step and captures it as a CUDA graph, where the recipe and the device allow it."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from cifar_fast.errors import TrainingError
from cifar_fast.hardware.cuda_graph import CapturedFunction, compiled, first_line, measured_convolutions
from cifar_fast.training.gradients import fill_in_zeros
from cifar_fast.training.model import tensors
from cifar_fast.training.optim import Muon, keep_learning_rates_on, move_banks
from cifar_fast.training.setup import Setup
from cifar_fast.training.step import (
    CrossEntropy,
    TrainingStep,
    UpdateFunction,
    forward_backward,
    freeze_whitening_bias,
    scored,
)

Make = Callable[..., tuple[Tensor, Tensor]]
"""From the random choices for a batch to its images and labels."""


def prepare_step(setup: Setup) -> TrainingStep:
    """Return the training step, compiled and captured as `setup.execution` says; the weights stay as they are.

    Where the compiler or the GPU refuses, the step runs without compilation or capture: a warning says so, and so does
    `setup.execution` from then on. A field that is `on` in the recipe but impossible on the device also causes a
    warning.
    """
    step, mode = setup.step(), setup.execution.step_mode
    for field in ("cuda_graph", "compile"):
        if getattr(setup.recipe, field) == "on" and not getattr(mode, field):
            warnings.warn(f"{field}=on is not used: {'; '.join(mode.reasons)}", stacklevel=3)
    if mode.compile:
        _compile(setup, step)
    if mode.cuda_graph:
        _capture(setup, step)
    return step


def _compile(setup: Setup, step: TrainingStep) -> None:
    """Compile the network, the recipe's loss, Muon's update, and the making of a batch if it happens on the device."""
    update, make = setup.update(), _makers(setup)
    # Modules around the model, with its parameters.
    models: dict[bool, Any] = {
        frozen: compiled(update.model, variant="frozen" if frozen else "learned") for frozen in (False, True)
    }
    if setup.batches.home == setup.device:
        make = {side: compiled(function) for side, function in make.items()}
    score = compiled(scored) if isinstance(update.loss, CrossEntropy) else None
    # A reader's own optimiser might count its steps, and must not take one before the training run.
    ours = () if "optimizers" in update.own else setup.optimizers
    muons: list[Any] = [optimizer for optimizer in ours if isinstance(optimizer, Muon)]
    keep_learning_rates_on(setup.device, muons)  # a rate that is a number would be compiled in, and anew at each step
    for muon in muons:
        muon.update = compiled(move_banks)
    why = ""
    with rolled_back(setup.model, setup.optimizers), measured_convolutions():
        try:
            for side, frozen in _variants(setup):
                freeze_whitening_bias(setup.model, frozen)
                images, labels = make[side](*setup.batches.example_choices())
                images, labels = setup.batches.augmented(images, labels, 0, 1)
                forward_backward(models[frozen], images, labels, setup.recipe, update.dtype, update.loss, score)
            fill_in_zeros(setup.model)
            replace(update, optimizers=muons).move_weights()
        except Exception as error:  # a compiler fails in many ways, and none need end a training run
            why = first_line(error)
        update.clear_gradients()
    if not setup.ranks.all(not why):
        for muon in muons:
            del muon.update
        _run_without(setup, "compile", why or "another rank failed to compile it")
        return
    step.updates = {frozen: replace(update, model=model, score=score) for frozen, model in models.items()}
    setup.batches.prepared = make


def _capture(setup: Setup, step: TrainingStep) -> None:
    """Capture the making of a batch once for each size of the images, and the update also for each state of the
    whitening bias.

    All captures use the same memory, as much as the largest images need: no two run at the same time.
    """
    keep_learning_rates_on(setup.device, setup.optimizers)
    make = setup.batches.prepared or _makers(setup)
    eager = dict(step.updates)
    updates: dict[bool, dict[int, UpdateFunction]] = {False: {}, True: {}}
    captured: list[CapturedFunction] = []

    def record(function: Callable[..., Any], *inputs: Tensor) -> CapturedFunction:
        captured.append(CapturedFunction(function, *inputs, other=captured[0] if captured else None))
        return captured[-1]

    try:
        with rolled_back(setup.model, setup.optimizers):
            chosen = setup.batches.example_choices()
            if setup.batches.home == setup.device:  # otherwise the CPU makes the batch and sends it
                make = {side: record(function, *chosen) for side, function in make.items()}
            for side, frozen in _variants(setup):
                images, labels = setup.batches.augmented(*make[side](*chosen), 0, 1)
                freeze_whitening_bias(setup.model, frozen)
                updates[frozen][images.shape[-1]] = record(eager[frozen], images, labels)
        step.updates = {frozen: BySide(by_side, eager[frozen]) for frozen, by_side in updates.items()}
        setup.batches.prepared = make
    except RuntimeError as error:
        why = first_line(error)
        if setup.ranks.world_size > 1:  # nobody knows which collective operation the others have reached
            raise TrainingError(
                f"rank {setup.ranks.rank} cannot capture its step: {why}; train with cuda_graph=off"
            ) from error
        setup.update().clear_gradients()
        step.updates = eager
        _run_without(setup, "cuda_graph", why)


@dataclass(frozen=True)
class BySide:
    """Captured updates, each for one size of the images; an eager one takes other sizes."""

    updates: dict[int, UpdateFunction]
    """By the side of the images in pixels."""
    eager: UpdateFunction

    def __call__(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Update the weights once; arguments and result as for `Update`."""
        return self.updates.get(images.shape[-1], self.eager)(images, labels)


def _makers(setup: Setup) -> dict[int, Make]:
    """Return the functions that make a batch, by the side of its images in pixels, largest first."""
    sides = {side for side, _ in _variants(setup)}
    return {side: partial(setup.batches.make, side) for side in sorted(sides, reverse=True)}


def _variants(setup: Setup) -> list[tuple[int, bool]]:
    """Return the sides of the images, each with the states of the whitening bias, frozen or not, that occur with it.

    The largest come first: the others fit into their memory.
    """
    batches = setup.batches
    times = [step / batches.steps_per_epoch for step in range(batches.total_steps())]
    found = {(batches.resolution(int(time)), time >= setup.recipe.whitening_bias_epochs) for time in times}
    return sorted(found, key=lambda variant: (-variant[0], variant[1]))


def _run_without(setup: Setup, field: str, why: str) -> None:
    done = {"compile": "compiled", "cuda_graph": "captured"}[field]
    warnings.warn(f"the training step cannot be {done} and runs without: {why}", stacklevel=5)
    setup.execution = replace(setup.execution, step_mode=setup.execution.step_mode.without(field, why))


@contextmanager
def rolled_back(model: nn.Module, optimizers: list[torch.optim.Optimizer]) -> Iterator[None]:
    """Undo what the block does to weights, statistics and optimisers; the optimisers must not have taken a step before.

    Every tensor stays at its address. The optimisers' state becomes zero, which is where momentum starts.
    """
    values = tensors(model)
    # Detached: a capture fails while a clone remembers how to send gradients to its parameter.
    before = [value.detach().clone() for value in values]
    try:
        yield
    finally:
        with torch.no_grad():
            for value, old in zip(values, before, strict=True):
                value.copy_(old)
            for optimizer in optimizers:
                for state in optimizer.state.values():
                    for value in state.values():
                        if isinstance(value, Tensor):
                            value.zero_()
