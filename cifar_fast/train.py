"""The training loop: a `Recipe` and a data set in, a `RunResult` out; the only file that knows the order of a step."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm.auto import tqdm

from cifar_fast.batches import TrainBatches, pixel_statistics
from cifar_fast.data import Dataset
from cifar_fast.device import choose_numerics, environment, keep_freed_memory, select_device
from cifar_fast.ema import EMA
from cifar_fast.errors import TrainingError
from cifar_fast.evaluate import evaluate
from cifar_fast.model import Network, build_model, whiten_first_layer
from cifar_fast.optim import Lookahead, build_optimizers, lr_schedule, set_learning_rates
from cifar_fast.recipe import Recipe
from cifar_fast.result import EpochResult, RunFolder, RunResult
from cifar_fast.timing import Clock

WHITENING_IMAGES = 10_000


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
) -> RunResult:
    """Train the recipe's network on `data` in this process, and evaluate it after every epoch.

    `device`: `cpu`, `cuda`, ... or None for the best there is. `out`: a new folder for logs and weights. `started`: when the command began
    (`time.time`), for `total_seconds`; else this call. Each epoch but the last is evaluated on single views, the last with the recipe's
    `tta`. `on_epoch` is called with each epoch's result.

    The same seed on the same device with the same threads gives the same weights, bit for bit, on a CPU. Raises `TrainingError` when the
    loss is not finite, `RecipeError` when the recipe does not fit the data, `RunError` when `out` cannot be written.
    """
    started = time.time() if started is None else started
    on = select_device(device)
    keep_freed_memory()
    numerics = choose_numerics(recipe, on)
    about_data = {"name": data.name, "fingerprint": data.fingerprint, "n_train": len(data.train_labels), "n_test": len(data.test_labels)}
    about_data["classes"] = list(data.classes)
    machine = environment(on) | {
        "precision": str(numerics.dtype).removeprefix("torch."),
        "convolution": "winograd" if numerics.winograd else "direct",
        "numerics_reason": numerics.reason,
    }
    train_clock, evaluate_clock = Clock(on), Clock(on)

    with train_clock.running():  # from the first byte sent to the device
        mean, std = pixel_statistics(data.train_images)
        model = build_model(recipe, len(data.classes), mean, std, winograd=numerics.winograd, seed=seed).to(on)
        if recipe.channels_last:
            model = model.to(memory_format=torch.channels_last)
        batches = TrainBatches(data.train_images, data.train_labels, recipe, device=on, mean=mean, std=std, seed=seed)
        whiten_first_layer(model, recipe, data.train_images[:WHITENING_IMAGES].to(on))
        optimizers, schedule = build_optimizers(model, recipe), lr_schedule(recipe)
        ema = EMA(model, recipe.ema_decay**recipe.ema_every) if recipe.ema_decay else None
        lookahead = Lookahead(model, recipe.lookahead_alpha) if recipe.lookahead_alpha else None
        # The mean loss of a batch has gradients too small for float16; the sum, as the original recipes had it, has not.
        loss_scale = recipe.global_batch_size if numerics.dtype == torch.float16 else 1
    micro_batch = recipe.micro_batch_size or recipe.global_batch_size
    folder = RunFolder(out, recipe, about_data, machine) if out is not None else None

    evaluated = ema.model if ema else model
    epochs: list[EpochResult] = []
    step, total_steps = 0, batches.total_steps()
    first_step_seconds = time.time() - started
    with tqdm(total=total_steps, desc=f"{recipe.name} on {data.name}", unit="step", disable=not progress) as bar:
        for epoch in range(math.ceil(recipe.epochs)):
            losses: list[Tensor] = []
            correct: list[Tensor] = []
            with train_clock.running():
                freeze_whitening_bias(model, epoch >= recipe.whitening_bias_epochs)
                for images, labels in batches.epoch(epoch):
                    if step == total_steps:
                        break
                    loss, hits = torch.zeros((), device=on), torch.zeros((), device=on)
                    for part, target in zip(images.split(micro_batch), labels.split(micro_batch), strict=True):
                        with torch.autocast(on.type, numerics.dtype, enabled=numerics.dtype != torch.float32):
                            logits = model(part)
                        part_loss = F.cross_entropy(logits.float(), target, label_smoothing=recipe.label_smoothing) * len(part) / len(images)
                        (part_loss * loss_scale).backward()
                        loss += part_loss.detach()
                        hits += (logits.detach().argmax(1) == target).sum()
                    set_learning_rates(optimizers, schedule, step / batches.steps_per_epoch)
                    for optimizer in optimizers:
                        unscale(optimizer, loss_scale)
                        optimizer.step()
                        optimizer.zero_grad()
                    step += 1
                    if ema and step % recipe.ema_every == 0:
                        ema.update(model)
                    if lookahead and step % recipe.lookahead_every == 0:
                        lookahead.move()
                    losses.append(loss)
                    correct.append(hits)
                    if on.type == "cpu":  # on a GPU reading the loss would make it wait at every step
                        require_finite(losses, step, schedule(step / batches.steps_per_epoch) * recipe.peak_lr)
                    bar.update()
                require_finite(losses, step, schedule(step / batches.steps_per_epoch) * recipe.peak_lr)
            tta = recipe.tta if step == total_steps else "none"
            with evaluate_clock.running():
                test = evaluate(evaluated, data.test_images, data.test_labels, tta=tta, dtype=numerics.dtype)
            epochs.append(
                EpochResult(
                    epoch=epoch + 1,
                    train_loss=torch.stack(losses).mean().item(),
                    train_accuracy=torch.stack(correct).sum().item() / (len(correct) * recipe.global_batch_size),
                    test_loss=test.loss,
                    test_accuracy=test.accuracy,
                    tta=tta,
                    train_seconds=train_clock.seconds,
                )
            )
            bar.set_postfix_str(f"epoch {epoch + 1}: test accuracy {test.accuracy:.2%}")
            if folder:
                folder.log(epochs[-1])
            if on_epoch:
                on_epoch(epochs[-1])

    result = RunResult(
        recipe=recipe,
        dataset=about_data,
        environment=machine,
        seed=seed,
        epochs=epochs,
        train_seconds=train_clock.seconds,
        evaluate_seconds=evaluate_clock.seconds,
        total_seconds=time.time() - started,
        first_step_seconds=first_step_seconds,
        model=evaluated,
    )
    if folder:
        folder.finish(result)
    return result


def freeze_whitening_bias(model: Network, frozen: bool) -> None:
    """Stop or go on learning the whitening layer's bias; without it nothing need be computed backwards through the first block."""
    for name, p in model.named_parameters():
        if name.endswith("whiten.bias"):
            p.requires_grad = not frozen


def unscale(optimizer: torch.optim.Optimizer, loss_scale: float) -> None:
    """Divide the gradients by the factor that the loss was multiplied by."""
    if loss_scale != 1:
        torch._foreach_div_([p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None], loss_scale)


def require_finite(losses: list[Tensor], step: int, learning_rate: float) -> None:
    """Raise `TrainingError` with step, learning rate and advice when the newest loss is not a finite number."""
    if losses and not math.isfinite(value := losses[-1].item()):
        raise TrainingError(
            f"the loss is {value} at step {step}, with a learning rate of {learning_rate:.3g}: training has diverged; "
            "lower peak_lr (or muon_lr), raise warmup_fraction, or try precision=float32"
        )


