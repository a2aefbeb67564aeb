"""The training loop: a `Recipe` and a data set in, a `RunResult` out; the only file that knows the order of a step."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

from torch import Tensor

from cifar_fast.errors import TrainingError
from cifar_fast.hardware.cuda_graph import (
    CapturedFunction,
    StepMode,
    compiled,
    measured_convolutions,
    rolled_back,
)
from cifar_fast.training.batches import TrainBatches
from cifar_fast.training.optim import keep_learning_rates_on
from cifar_fast.training.step import TrainingStep, forward_backward, freeze_whitening_bias

WHITENING_IMAGES = 10_000


def prepare_steps(
    take: TrainingStep, batches: TrainBatches, launch: StepMode, variants: set[bool]
) -> tuple[dict[bool, Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]], StepMode]:
    """Compile and record as `launch` says; return the step for each of `variants`, and what was done in the end.

    `variants` says whether the whitening bias is frozen, which no recorded step can find out. Weights and optimisers
    are left as they were. What a compiler or a GPU refuses is done without, and a warning says so.
    """
    steps: dict[bool, Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]] = dict.fromkeys(variants, take)
    if not (launch.compile or launch.cuda_graph):
        return steps, launch
    make: Callable[..., tuple[Tensor, Tensor]] = partial(batches.make, batches.side)
    made_there = batches.home == batches.device  # else on the CPU, and sent
    chosen = [values[0].clone() for values in vars(batches.choices(0)).values()]  # of one batch
    batches.forget_choices()  # the clock of training counts them
    if launch.compile:
        compiled_model: Any = compiled(take.model)  # a module around the model, with its parameters
        compiled_make, why = compiled(make) if made_there else make, ""
        with rolled_back(take.model, take.optimizers), measured_convolutions():
            try:
                for frozen in sorted(variants):
                    freeze_whitening_bias(take.model, frozen)
                    images, labels = compiled_make(*chosen)
                    forward_backward(compiled_model, images, labels, take.recipe, take.dtype)
            except Exception as error:  # a compiler fails in many ways, and none need end a training
                why = f"{type(error).__name__}: {error}".splitlines()[0]
            take.clear_gradients()
        if take.ranks.all(not why):
            take, make = replace(take, model=compiled_model), compiled_make
            steps, batches.prepared = dict.fromkeys(variants, take), make
        else:
            launch = launch.without("compile", why or "another rank failed to")
            warnings.warn(f"torch.compile is done without: {why or 'another rank failed to'}", stacklevel=3)
    if launch.cuda_graph:
        keep_learning_rates_on(batches.device, take.optimizers)
        try:
            with rolled_back(take.model, take.optimizers):
                recorded_make = CapturedFunction(make, *chosen) if made_there else make
                images, labels = recorded_make(*chosen)
                for frozen in sorted(variants):
                    freeze_whitening_bias(take.model, frozen)
                    steps[frozen] = CapturedFunction(take, images, labels)
            batches.prepared = recorded_make
        except RuntimeError as error:
            why = str(error).splitlines()[0]
            if take.ranks.world_size > 1:  # nobody knows which collective the others are in
                raise TrainingError(
                    f"rank {take.ranks.rank} cannot record its step: {why}; train with cuda_graph=off"
                ) from error
            take.clear_gradients()
            launch, steps = launch.without("cuda_graph", why), dict.fromkeys(variants, take)
            warnings.warn(f"the CUDA graph is done without: {why}", stacklevel=3)
    return steps, launch
