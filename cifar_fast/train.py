"""The training loop: a `Recipe` and a data set in, a `RunResult` out; the only file that knows the order of a step."""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm.auto import tqdm

from cifar_fast import fused
from cifar_fast.batches import TrainBatches, pixel_statistics
from cifar_fast.data import Dataset
from cifar_fast.device import HALF, can_convolve, choose_numerics, environment, keep_freed_memory, select_device
from cifar_fast.ema import EMA
from cifar_fast.errors import TrainingError, UserError
from cifar_fast.evaluate import at_least_float32, evaluate
from cifar_fast.graph import Launch, Recorded, choose_launch, compiled, measured_convolutions, undone
from cifar_fast.layers import GhostBatchNorm
from cifar_fast.model import Network, build_model, whiten_first_layer
from cifar_fast.optim import Lookahead, build_optimizers, fuse, keep_learning_rates_on, lr_schedule, set_learning_rates
from cifar_fast.peers import ALONE, Peers, flat_gradients
from cifar_fast.recipe import Recipe
from cifar_fast.result import EpochResult, RunFolder, RunResult
from cifar_fast.timing import Clock, peak_memory

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
    on_step: Callable[[int, int], None] | None = None,
    peers: Peers = ALONE,
) -> RunResult:
    """Train the recipe's network on `data` in this process, and evaluate it after every epoch.

    `device`: `cpu`, `cuda`, ... or None for the best there is. `out`: a new folder for logs and weights. `started`:
    when the command began (`time.time`), for `total_seconds`; else this call. Each epoch but the last is evaluated on
    single views, the last with the recipe's `tta`. `on_epoch` is called with each epoch's result, `on_step` with the
    steps done and their total. `peers`: the other processes of the same training (`parallel.launch` starts them); each
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
    require_same_training(recipe, data, seed, peers)
    numerics = peers.agree(choose_numerics(recipe, on) if peers.is_main else None)
    assert numerics is not None
    if not peers.all(can_convolve(numerics.convolution)[0]):  # loads it on every rank, before the clock
        why = f"not every rank can compute a {numerics.convolution} convolution: direct instead"
        numerics = replace(numerics, convolution="direct", reason=why)
    if numerics.fuse_norm and not peers.all(fused.available()[0]):
        numerics = replace(numerics, fuse_norm=False)
    if recipe.precision not in ("auto", numerics.describe()["precision"]):
        warnings.warn(f"precision={recipe.precision} is not used: {numerics.reason}", stacklevel=2)
    launch = peers.agree(choose_launch(recipe, on, peers.backend) if peers.is_main else None)
    assert launch is not None
    # The first optimiser has torch import its compiler, most of a second; imports come before the clock.
    torch.optim.SGD([torch.zeros(1)])
    train_clock, evaluate_clock, warm_up_clock = Clock(on), Clock(on), Clock(on)
    network_dtype = torch.float64 if numerics.dtype == torch.float64 else torch.float32
    peers.barrier()  # so that no rank's clock counts how much later another one started

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
            rank=peers.rank,
            world_size=peers.world_size,
        )
        whiten_first_layer(model, recipe, images[:WHITENING_IMAGES].to(on))
        del images
        peers.start_together(model)
        optimizers, schedule = build_optimizers(model, recipe), lr_schedule(recipe)
        if on.type == "cuda":
            fuse(optimizers)
        ema = EMA(model, recipe.ema_decay**recipe.ema_every) if recipe.ema_decay else None
        lookahead = Lookahead(model, recipe.lookahead_alpha) if recipe.lookahead_alpha else None

    gradients = flat_gradients(model) if peers.backend == "nccl" else None
    take = TrainingStep(model, optimizers, recipe, numerics.dtype, peers, gradients)
    step, total_steps = 0, batches.total_steps()

    def is_frozen(step: int) -> bool:
        return step / batches.steps_per_epoch >= recipe.whitening_bias_epochs

    with warm_up_clock.running():  # compiles and records, where the recipe says so; nothing is learned
        steps, launch = prepare_steps(take, batches, launch, {is_frozen(0), is_frozen(total_steps - 1)})
    machine = environment(on) | numerics.describe() | launch.describe()
    machine |= {"world_size": peers.world_size, "backend": peers.backend}
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
                peers.average_statistics(evaluated)
                test_loss, test_accuracy = evaluate_together(
                    evaluated, data, tta, recipe.tta_margin, numerics.dtype, peers
                )
            # Each rank's share of the batches, and the mean over all of them.
            train_loss, train_hits = peers.sum(
                torch.stack([torch.stack(losses).mean(), torch.stack(correct).sum()])
            ).tolist()
            epochs.append(
                EpochResult(
                    epoch=epoch + 1,
                    train_loss=train_loss / peers.world_size,
                    train_accuracy=train_hits / (len(correct) * recipe.global_batch_size),
                    test_loss=test_loss,
                    test_accuracy=test_accuracy,
                    tta=tta,
                    train_seconds=train_clock.seconds,
                )
            )
            bar.set_postfix_str(f"epoch {epoch + 1}: test accuracy {test_accuracy:.2%}")
            if folder:
                with peers.unhurried():
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
        peak_memory_gb=peers.sum(torch.tensor(peak_memory() / 1e9)).item(),
        model=evaluated,
        warm_up_seconds=warm_up_clock.seconds,
    )
    if folder:
        with peers.unhurried():
            folder.finish(result)
    return result


@dataclass
class TrainingStep:
    """One step from a batch to new weights: a function of two tensors, to be called as it is, or recorded and replayed.

    The schedule comes before it, because a recorded step takes no numbers from Python; averages of weights come after.
    """

    model: Network
    optimizers: list[torch.optim.Optimizer]
    recipe: Recipe
    dtype: torch.dtype
    peers: Peers
    gradients: Tensor | None = None
    """The buffer of `flat_gradients`, where they lie in one."""

    def __call__(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Take the step; return what `forward_backward` does."""
        half_precision = self.dtype in HALF
        loss, hits = forward_backward(self.model, images, labels, self.recipe, self.dtype)
        if self.gradients is None:
            self.peers.average_gradients(self.model, half_precision=half_precision, scale=len(images))
        else:
            self.peers.average_buffer(self.gradients, half_precision=half_precision, scale=len(images))
        # The matrices of Muon's Newton-Schulz iterations are multiplied in half precision, too.
        with torch.autocast(images.device.type, self.dtype, enabled=half_precision):
            for optimizer in self.optimizers:
                optimizer.step()
        self.clear_gradients()
        return loss, hits

    def clear_gradients(self) -> None:
        """Make room for the next ones: none are there, or zeros in the buffer where they all lie."""
        if self.gradients is not None:
            self.gradients.zero_()
            return
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none=True)


def prepare_steps(
    take: TrainingStep, batches: TrainBatches, launch: Launch, variants: set[bool]
) -> tuple[dict[bool, Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]], Launch]:
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
        with undone(take.model, take.optimizers), measured_convolutions():
            try:
                for frozen in sorted(variants):
                    freeze_whitening_bias(take.model, frozen)
                    images, labels = compiled_make(*chosen)
                    forward_backward(compiled_model, images, labels, take.recipe, take.dtype)
            except Exception as error:  # a compiler fails in many ways, and none need end a training
                why = f"{type(error).__name__}: {error}".splitlines()[0]
            take.clear_gradients()
        if take.peers.all(not why):
            take, make = replace(take, model=compiled_model), compiled_make
            steps, batches.prepared = dict.fromkeys(variants, take), make
        else:
            launch = launch.without("compile", why or "another rank failed to")
            warnings.warn(f"torch.compile is done without: {why or 'another rank failed to'}", stacklevel=3)
    if launch.cuda_graph:
        keep_learning_rates_on(batches.device, take.optimizers)
        try:
            with undone(take.model, take.optimizers):
                recorded_make = Recorded(make, *chosen) if made_there else make
                images, labels = recorded_make(*chosen)
                for frozen in sorted(variants):
                    freeze_whitening_bias(take.model, frozen)
                    steps[frozen] = Recorded(take, images, labels)
            batches.prepared = recorded_make
        except RuntimeError as error:
            why = str(error).splitlines()[0]
            if take.peers.world_size > 1:  # nobody knows which collective the others are in
                raise TrainingError(
                    f"rank {take.peers.rank} cannot record its step: {why}; train with cuda_graph=off"
                ) from error
            take.clear_gradients()
            launch, steps = launch.without("cuda_graph", why), dict.fromkeys(variants, take)
            warnings.warn(f"the CUDA graph is done without: {why}", stacklevel=3)
    return steps, launch


def forward_backward(
    model: Network, images: Tensor, labels: Tensor, recipe: Recipe, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Leave the gradients of the batch's mean loss in the parameters; return that loss and the number of images hit.

    `images`: (N, 3, H, W), normalised; `labels`: int64 (N,). The convolutions compute in `dtype`. With
    `micro_batch_size` only that many images' activations exist at a time; the gradients add up to the same.
    """
    size = recipe.micro_batch_size or len(images)
    # A mean loss has gradients too small for float16; those of the sum, which the original recipes took, are not.
    loss_scale = len(images) if dtype == torch.float16 else 1
    loss, hits = images.new_zeros(()), images.new_zeros(())
    parts = list(zip(images.split(size), labels.split(size), strict=True))
    for number, (part, target) in enumerate(parts, start=1):
        expect_part(model, number, len(parts))
        with torch.autocast(images.device.type, dtype, enabled=dtype in HALF):
            logits = at_least_float32(model(part))
        smoothing = recipe.label_smoothing
        part_loss = F.cross_entropy(logits, target, reduction="sum", label_smoothing=smoothing) / len(images)
        (part_loss * loss_scale).backward()
        loss += part_loss.detach()
        hits += (logits.detach().argmax(1) == target).sum()
    if loss_scale != 1:
        torch._foreach_div_([p.grad for p in model.parameters() if p.grad is not None], loss_scale)
    return loss, hits


def require_same_training(recipe: Recipe, data: Dataset, seed: int, peers: Peers) -> None:
    """Raise `UserError` on a rank that was started with another recipe, data set or seed than rank 0."""
    ours = {"recipe": recipe.to_dict(), "data set": data.describe(), "seed": seed}
    theirs = peers.agree(ours)
    for name, value in ours.items():
        if value != theirs[name]:
            raise UserError(
                f"rank {peers.rank} was started with another {name} than rank 0: {value}, where rank 0 has "
                f"{theirs[name]}; start all ranks with the same command and the same data"
            )


def evaluate_together(
    model: Network, data: Dataset, tta: str, tta_margin: float, dtype: torch.dtype, peers: Peers
) -> tuple[float, float]:
    """Return the test loss and accuracy, to which each rank contributes an equal share of the test images."""
    own = slice(peers.rank, None, peers.world_size)
    images, labels = data.test_images[own], data.test_labels[own]
    found = evaluate(model, images, labels, tta=tta, tta_margin=tta_margin, dtype=dtype, on_batch=peers.tick)
    if peers.world_size == 1:
        return found.loss, found.accuracy
    sums = torch.tensor([found.loss, found.accuracy], dtype=torch.float64) * len(labels)
    loss, accuracy = (peers.sum(sums) / len(data.test_labels)).tolist()
    return loss, accuracy


def expect_part(model: Network, part: int, n_parts: int) -> None:
    """Tell the batch norms which part of the batch comes next, for their running statistics."""
    for module in model.modules():
        if isinstance(module, GhostBatchNorm):
            module.expect_part(part, n_parts)


def freeze_whitening_bias(model: Network, frozen: bool) -> None:
    """Stop or go on learning the whitening bias; frozen, nothing need be computed back through the first block."""
    whiten = getattr(model.layers, "whiten", None)
    if isinstance(whiten, nn.Conv2d) and whiten.bias is not None:
        whiten.bias.requires_grad = not frozen


def require_finite(loss: Tensor, step: int, optimizers: list[torch.optim.Optimizer]) -> None:
    """Raise `TrainingError` with step, learning rates and advice when the loss is not a finite number."""
    if not math.isfinite(value := loss.item()):
        rates = ", ".join(f"{group['lr']:.3g}" for optimizer in optimizers for group in optimizer.param_groups)
        raise TrainingError(
            f"the loss is {value} at step {step}, with learning rates of {rates}: training has diverged; "
            "lower peak_lr (or muon_lr), raise warmup_fraction, or try precision=float32"
        )
