"""The training loop: a `Recipe` and a data set in, a `RunResult` out; the only file that knows the order of a step."""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable
from dataclasses import replace
from itertools import islice
from pathlib import Path

import torch
from torch import Tensor
from tqdm.auto import tqdm

from cifar_fast.data.dataset import Dataset
from cifar_fast.distributed.ranks import ALONE, Ranks, flat_gradients
from cifar_fast.errors import TrainingError, UserError
from cifar_fast.hardware.clock import Clock, peak_memory
from cifar_fast.hardware.cuda_graph import (
    choose_step_mode,
)
from cifar_fast.hardware.device import environment, keep_freed_memory, select_device
from cifar_fast.hardware.numerics import can_convolve, choose_numerics
from cifar_fast.kernels import fused
from cifar_fast.recipe import Recipe
from cifar_fast.training.averaging import EMA, Lookahead
from cifar_fast.training.batches import TrainBatches, pixel_statistics
from cifar_fast.training.evaluate import evaluate
from cifar_fast.training.model import Network, build_model, whiten_first_layer
from cifar_fast.training.optim import build_optimizers, fuse, lr_schedule, set_learning_rates
from cifar_fast.training.result import EpochResult, RunFolder, RunResult
from cifar_fast.training.setup import WHITENING_IMAGES, prepare_steps
from cifar_fast.training.step import TrainingStep, freeze_whitening_bias


def train(
    recipe: Recipe,
    data: Dataset,
    *,
    device: str | None = None,
    seed: int = 0,
    out: Path | str | None = None,
    progress: bool = True,
    started: float | None = None,
    on_epoch: Callable[[EpochResult], None] | None = None,
    on_step: Callable[[int, int], None] | None = None,
    ranks: Ranks = ALONE,
) -> RunResult:
    """Train the recipe's network on `data` in this process, and evaluate it after every epoch.

    `device`: `cpu`, `cuda`, ... or None for the best there is. `out`: a new folder for logs and weights. `started`:
    when the command began (`time.time`), for `total_seconds`; else this call. Each epoch but the last is evaluated on
    single views, the last with the recipe's `tta`. `on_epoch` is called with each epoch's result, `on_step` with the
    steps done and their total. `ranks`: the other processes of the same training (`parallel.launch` starts them); each
    calls this function, rank 0 alone with `out`, and all get the same result with the clocks of rank 0.

    The same seed on the same CPU with the same threads gives the same weights, bit for bit; `precision` and
    `convolution`, which `auto` measures, are in the result's `environment` and can be fixed in the recipe. Raises
    `TrainingError` when the loss is not finite, `RecipeError` when the recipe does not fit the data, `RunError` when
    `out` cannot be written.
    """
    started = time.time() if started is None else started
    if seed < 0:
        raise UserError(f"seed={seed} must be at least 0")
    on = select_device(device)
    keep_freed_memory()
    require_same_training(recipe, data, seed, ranks)
    numerics = ranks.agree(choose_numerics(recipe, on) if ranks.is_main else None)
    assert numerics is not None
    if not ranks.all(can_convolve(numerics.convolution)[0]):  # loads it on every rank, before the clock
        why = f"not every rank can compute a {numerics.convolution} convolution: direct instead"
        numerics = replace(numerics, convolution="direct", reason=why)
    if numerics.fuse_norm and not ranks.all(fused.available()[0]):
        numerics = replace(numerics, fuse_norm=False)
    if recipe.precision not in ("auto", numerics.describe()["precision"]):
        warnings.warn(f"precision={recipe.precision} is not used: {numerics.reason}", stacklevel=2)
    launch = ranks.agree(choose_step_mode(recipe, on, ranks.backend) if ranks.is_main else None)
    assert launch is not None
    # The first optimiser has torch import its compiler, most of a second; imports come before the clock.
    torch.optim.SGD([torch.zeros(1)])
    train_clock, evaluate_clock, warm_up_clock = Clock(on), Clock(on), Clock(on)
    network_dtype = torch.float64 if numerics.dtype == torch.float64 else torch.float32
    ranks.barrier()  # so that no rank's clock counts how much later another one started

    with train_clock.running():  # from the first byte sent to the device
        images = data.train_images.to(on) if recipe.preload else data.train_images
        mean, std = pixel_statistics(images)
        model = build_model(
            recipe,
            data.n_classes,
            mean,
            std,
            convolution=numerics.convolution,
            fuse_norm=numerics.fuse_norm,
            seed=seed,
        )
        model = model.to(on, network_dtype)
        model = model.to(memory_format=torch.channels_last if recipe.channels_last else torch.preserve_format)
        batches = TrainBatches(
            images,
            data.train_labels,
            recipe,
            device=on,
            dtype=network_dtype,
            mean=mean,
            std=std,
            seed=seed,
            rank=ranks.rank,
            world_size=ranks.world_size,
        )
        whiten_first_layer(model, recipe, images[:WHITENING_IMAGES].to(on))
        del images
        ranks.start_together(model)
        optimizers, schedule = build_optimizers(model, recipe), lr_schedule(recipe)
        if on.type == "cuda":
            fuse(optimizers)
        ema = EMA(model, recipe.ema_decay**recipe.ema_every) if recipe.ema_decay else None
        lookahead = Lookahead(model, recipe.lookahead_alpha) if recipe.lookahead_alpha else None

    gradients = flat_gradients(model) if ranks.backend == "nccl" else None
    take = TrainingStep(model, optimizers, recipe, numerics.dtype, ranks, gradients)
    step, total_steps = 0, batches.total_steps()

    def is_frozen(step: int) -> bool:
        return step / batches.steps_per_epoch >= recipe.whitening_bias_epochs

    with warm_up_clock.running():  # compiles and records, where the recipe says so; nothing is learned
        steps, launch = prepare_steps(take, batches, launch, {is_frozen(0), is_frozen(total_steps - 1)})
    machine = environment(on) | numerics.describe() | launch.describe()
    machine |= {"world_size": ranks.world_size, "backend": ranks.backend}
    for field in ("cuda_graph", "compile"):
        if getattr(recipe, field) == "on" and not getattr(launch, field):
            warnings.warn(f"{field}=on is not used: {launch.describe()['launch_reason']}", stacklevel=2)
    folder = RunFolder(out, recipe, data.describe(), machine) if out is not None else None  # the recipe fits the data
    evaluated = model
    epochs: list[EpochResult] = []
    first_step_seconds = time.time() - started
    with tqdm(total=total_steps, desc=f"{recipe.name} on {data.name}", unit="step", disable=not progress) as bar:
        for epoch in range(math.ceil(recipe.epochs)):
            if epoch >= recipe.epochs - recipe.ema_off_epochs:
                ema = None
            losses, correct = [], []
            with train_clock.running():
                for images, labels in islice(batches.epoch(epoch), total_steps - step):
                    freeze_whitening_bias(model, is_frozen(step))
                    set_learning_rates(optimizers, schedule, step / batches.steps_per_epoch)
                    loss, hits = steps[is_frozen(step)](images, labels)
                    step += 1
                    if ema and step % recipe.ema_every == 0:
                        ema.update(model)
                    if lookahead and step % recipe.lookahead_every == 0:
                        lookahead.move()
                    losses.append(loss.clone())  # a recorded step writes the next one to the same place
                    correct.append(hits.clone())
                    if on.type == "cpu" or step % batches.steps_per_epoch == 0 or step == total_steps:
                        # Not at every step: reading the loss makes a GPU wait.
                        require_finite(loss, step, optimizers)
                    bar.update()
                    if on_step:
                        on_step(step, total_steps)
            evaluated = ema.model if ema else model
            tta = recipe.tta if step == total_steps else "none"
            with evaluate_clock.running():
                ranks.average_statistics(evaluated)
                test_loss, test_accuracy = evaluate_together(
                    evaluated, data, tta, recipe.tta_margin, numerics.dtype, ranks
                )
            # Each rank's share of the batches, and the mean over all of them.
            train_loss, train_hits = ranks.sum(
                torch.stack([torch.stack(losses).mean(), torch.stack(correct).sum()])
            ).tolist()
            epochs.append(
                EpochResult(
                    epoch=epoch + 1,
                    train_loss=train_loss / ranks.world_size,
                    train_accuracy=train_hits / (len(correct) * recipe.global_batch_size),
                    test_loss=test_loss,
                    test_accuracy=test_accuracy,
                    tta=tta,
                    train_seconds=train_clock.seconds,
                )
            )
            bar.set_postfix_str(f"epoch {epoch + 1}: test accuracy {test_accuracy:.2%}")
            if folder:
                with ranks.unhurried():
                    folder.log(epochs[-1])
            if on_epoch:
                on_epoch(epochs[-1])

    result = RunResult(
        recipe=recipe,
        dataset=data.describe(),
        environment=machine,
        seed=seed,
        epochs=epochs,
        train_seconds=train_clock.seconds,
        evaluate_seconds=evaluate_clock.seconds,
        total_seconds=time.time() - started,
        first_step_seconds=first_step_seconds,
        peak_memory_gb=ranks.sum(torch.tensor(peak_memory() / 1e9)).item(),
        model=evaluated,
        warm_up_seconds=warm_up_clock.seconds,
    )
    if folder:
        with ranks.unhurried():
            folder.finish(result)
    return result


def require_same_training(recipe: Recipe, data: Dataset, seed: int, ranks: Ranks) -> None:
    """Raise `UserError` on a rank that was started with another recipe, data set or seed than rank 0."""
    ours = {"recipe": recipe.to_dict(), "data set": data.describe(), "seed": seed}
    theirs = ranks.agree(ours)
    for name, value in ours.items():
        if value != theirs[name]:
            raise UserError(
                f"rank {ranks.rank} was started with another {name} than rank 0: {value}, where rank 0 has "
                f"{theirs[name]}; start all ranks with the same command and the same data"
            )


def evaluate_together(
    model: Network, data: Dataset, tta: str, tta_margin: float, dtype: torch.dtype, ranks: Ranks
) -> tuple[float, float]:
    """Return the test loss and accuracy, to which each rank contributes an equal share of the test images."""
    own = slice(ranks.rank, None, ranks.world_size)
    images, labels = data.test_images[own], data.test_labels[own]
    found = evaluate(model, images, labels, tta=tta, tta_margin=tta_margin, dtype=dtype, on_batch=ranks.tick)
    if ranks.world_size == 1:
        return found.loss, found.accuracy
    sums = torch.tensor([found.loss, found.accuracy], dtype=torch.float64) * len(labels)
    loss, accuracy = (ranks.sum(sums) / len(data.test_labels)).tolist()
    return loss, accuracy


def require_finite(loss: Tensor, step: int, optimizers: list[torch.optim.Optimizer]) -> None:
    """Raise `TrainingError` with step, learning rates and advice when the loss is not a finite number."""
    if not math.isfinite(value := loss.item()):
        rates = ", ".join(f"{group['lr']:.3g}" for optimizer in optimizers for group in optimizer.param_groups)
        raise TrainingError(
            f"the loss is {value} at step {step}, with learning rates of {rates}: training has diverged; "
            "lower peak_lr (or muon_lr), raise warmup_fraction, or try precision=float32"
        )
