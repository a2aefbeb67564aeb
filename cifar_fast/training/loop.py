"""The training loop: a `Recipe` and a data set in, a `RunResult` out."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from itertools import islice
from pathlib import Path

import torch
from torch import Tensor

from cifar_fast.data.dataset import Dataset, require_variation
from cifar_fast.errors import TrainingError
from cifar_fast.hardware.clock import Clock, peak_memory
from cifar_fast.hardware.device import keep_freed_memory, select_device
from cifar_fast.recipe import Recipe
from cifar_fast.training.alone import ALONE, Alone
from cifar_fast.training.capture import prepare_step
from cifar_fast.training.evaluate import evaluate
from cifar_fast.training.model import Network
from cifar_fast.training.progress import Progress
from cifar_fast.training.result import EpochResult, RunFolder, RunResult, halved
from cifar_fast.training.seeds import Seeds
from cifar_fast.training.setup import Setup, agree_on_execution, set_up
from cifar_fast.training.step import TrainingStep
from cifar_fast.training.tricks import NO_TRICKS, Tricks


def train(
    recipe: Recipe,
    data: Dataset,
    *,
    tricks: Tricks = NO_TRICKS,
    device: str | None = None,
    seed: int | Seeds = 0,
    out: Path | str | None = None,
    save_logits: bool = False,
    progress: bool = True,
    expected_seconds: float | None = None,
    started: float | None = None,
    on_epoch: Callable[[EpochResult], None] | None = None,
    on_step: Callable[[int, int], None] | None = None,
    ranks: Alone = ALONE,
) -> RunResult:
    """Train the recipe's network on `data` in this process, and evaluate it after every epoch.

    The same seed on the same CPU with the same number of threads gives the same weights, bit for bit. `precision` and
    `convolution`, which `auto` measures, are in the result's `environment` and can be fixed in the recipe.

    Args:
        recipe: what is trained. Only the last epoch is evaluated with its `tta`, the others on single views.
        data: the training and test images.
        tricks: functions of your own in place of the recipe's.
        device: `cpu`, `cuda`, ... or None for the best one here.
        seed: seed of the weights and of every random choice; `Seeds` to give each kind of choice its own.
        out: a new folder for logs and weights.
        save_logits: keep the logits of the last evaluation, in the result and in `out`.
        progress: whether to show epoch, time left and accuracy: as a bar, or as lines where there is no terminal.
        expected_seconds: how long the run should take; the time left rests on it until the run's own pace is known.
        started: when the command began (`time.time`), for `total_seconds`; None: now.
        on_epoch: called with the result of each epoch.
        on_step: called with the number of steps done and the number of all steps.
        ranks: the processes that share this run (`distributed.launch` starts them). Each calls this function, only
            rank 0 with `out`, and each gets the same result, with the clocks of rank 0.

    Raises:
        TrainingError: the loss is not finite.
        RecipeError: the recipe does not fit the data.
        TricksError: a function of your own does not fit.
        DataError: the images hold nothing to learn from.
        RunError: `out` cannot be written.
    """
    started = time.time() if started is None else started
    seeds = Seeds.of(seed)
    on = select_device(device)
    _prepare_process()
    require_variation(data)
    execution = agree_on_execution(recipe, data, seeds, on, ranks, tricks)
    clocks = _Clocks(on)
    ranks.barrier()  # so that no rank's clock counts how much later another one started
    with clocks.train.running():  # from the first byte sent to the device
        setup = set_up(recipe, data, execution, device=on, seed=seeds, ranks=ranks, tricks=tricks)
    with clocks.warm_up.running():
        step = prepare_step(setup)
    environment = setup.environment()
    indices = data.selection.indices if data.selection else None
    made_by = tricks.describe()
    folder = RunFolder(out, recipe, data.describe(), environment, made_by, indices) if out is not None else None
    epochs: list[EpochResult] = []
    first_step_seconds = time.time() - started
    total_steps = setup.batches.total_steps()
    title = f"{tricks.titled(recipe)} on {data.name}"
    with (
        Progress(recipe, data, title=title, seed=seeds, show=progress, expected_seconds=expected_seconds) as shown,
        tricks.seeded(seeds.augmentation, ranks.rank, on),
    ):

        def after_step(accuracy: float | None) -> None:
            shown.step(step.done, accuracy)
            if tricks.on_step:
                tricks.on_step(step)
            if on_step:
                on_step(step.done, total_steps)

        for epoch in range(math.ceil(recipe.epochs)):
            result, logits = _train_and_evaluate(setup, step, epoch, clocks, after_step, shown.tick)
            epochs.append(result)
            shown.evaluated(result)
            if folder:
                with ranks.slow_work():
                    folder.log(result)
            if tricks.on_epoch:
                tricks.on_epoch(result, step)
            if on_epoch:
                on_epoch(result)

    run = RunResult(
        recipe=recipe,
        dataset=data.describe(),
        environment=environment,
        seed=seeds.simplest,
        epochs=epochs,
        train_seconds=clocks.train.seconds,
        evaluate_seconds=clocks.evaluate.seconds,
        warm_up_seconds=clocks.warm_up.seconds,
        total_seconds=time.time() - started,
        first_step_seconds=first_step_seconds,
        peak_memory_gb=ranks.sum(torch.tensor(peak_memory(on) / 1e9)).item(),
        model=step.evaluated,
        train_indices=indices,
        tricks=made_by,
    )
    if save_logits:  # after every clock has stopped
        run.logits, run.test_labels = halved(gather_logits(setup, logits)), data.test_labels
    if folder:
        with ranks.slow_work():
            folder.finish(run)
    return run


def _prepare_process() -> None:
    """Do what no clock of training should count."""
    keep_freed_memory()
    torch.optim.SGD([torch.zeros(1)])  # the first optimiser makes torch import its compiler, for most of a second


class _Clocks:
    """The clocks of one run; `hardware.clock` says what each of them counts."""

    def __init__(self, device: torch.device) -> None:
        self.train, self.evaluate, self.warm_up = Clock(device), Clock(device), Clock(device)


def _train_and_evaluate(
    setup: Setup,
    step: TrainingStep,
    epoch: int,
    clocks: _Clocks,
    after_step: Callable[[float | None], None],
    after_test_batch: Callable[[], None],
) -> tuple[EpochResult, Tensor]:
    with clocks.train.running():
        train_loss, train_accuracy = train_epoch(setup, step, epoch, after_step)
    tta = setup.recipe.tta if step.done == setup.batches.total_steps() else "none"
    with clocks.evaluate.running():
        test_loss, test_accuracy, logits = evaluate_together(setup, step.evaluated, tta, after_test_batch)
    result = EpochResult(
        epoch=epoch + 1,
        train_loss=train_loss,
        train_accuracy=train_accuracy,
        test_loss=test_loss,
        test_accuracy=test_accuracy,
        tta=tta,
        train_seconds=clocks.train.seconds,
    )
    return result, logits


def train_epoch(
    setup: Setup, step: TrainingStep, epoch: int, after_step: Callable[[float | None], None]
) -> tuple[float, float]:
    """Train for one epoch, or for what is left of the last; return loss and accuracy on its augmented batches.

    `after_step` is called after each step with the accuracy on its batch, or with None where reading it takes time.
    """
    steps_left = setup.batches.total_steps() - step.done
    step.start_epoch(epoch)
    losses, correct = [], []
    for images, labels in islice(setup.batches.epoch(epoch), steps_left):
        loss, hits = step(images, labels)
        losses.append(loss.clone())  # a captured step writes the next one to the same place
        correct.append(hits.clone())
        accuracy = None
        if setup.device.type == "cpu":  # reading the loss makes a GPU wait, so there once an epoch
            require_finite(loss, step)
            accuracy = hits.item() / len(labels)
        after_step(accuracy)
    require_finite(losses[-1], step)
    # Each rank has its share of the batches.
    sums = setup.ranks.sum(torch.stack([torch.stack(losses).mean(), torch.stack(correct).sum()]))
    loss_sum, n_correct = sums.tolist()
    return loss_sum / setup.ranks.world_size, n_correct / (len(losses) * setup.recipe.global_batch_size)


def evaluate_together(
    setup: Setup, model: Network, tta: str, after_test_batch: Callable[[], None]
) -> tuple[float, float, Tensor]:
    """Return the test loss and accuracy of `model`, and the logits of the test images that this rank evaluated: each
    takes an equal share.
    """
    ranks = setup.ranks

    def after_batch() -> None:
        ranks.tick()
        after_test_batch()

    ranks.average_statistics(model)
    images, labels = setup.test_set
    dtype, margin = setup.execution.numerics.dtype, setup.recipe.tta_margin
    found = evaluate(model, images, labels, tta=tta, tta_margin=margin, dtype=dtype, on_batch=after_batch)
    if ranks.world_size == 1:
        return found.loss, found.accuracy, found.logits
    sums = torch.tensor([found.loss, found.accuracy], dtype=torch.float64) * len(labels)
    loss, accuracy = (ranks.sum(sums) / len(setup.data.test_labels)).tolist()
    return loss, accuracy, found.logits


def gather_logits(setup: Setup, share: Tensor) -> Tensor:
    """Return the logits of all test images in their order, (n_test, classes) on the CPU, from each rank's `share`."""
    ranks = setup.ranks
    if ranks.world_size == 1:
        return share.cpu()
    # Each rank fills its own rows, and leaves zeros elsewhere, so that the sum holds all rows.
    rows = share.new_zeros(len(setup.data.test_labels), share.shape[1])
    rows[ranks.rank :: ranks.world_size] = share
    return ranks.sum(rows)


def require_finite(loss: Tensor, step: TrainingStep) -> None:
    """Raise `TrainingError` with step, learning rates and advice when the loss is not a finite number."""
    if not math.isfinite(value := loss.item()):
        rates = ", ".join(f"{group['lr']:.3g}" for optimizer in step.optimizers for group in optimizer.param_groups)
        raise TrainingError(
            f"the loss is {value} at step {step.done}, with learning rates of {rates}: training has diverged; "
            f"{_advice(step.own)}, or try precision=float32"
        )


def _advice(own: frozenset[str]) -> str:
    """Return what to try when training diverges; `own` names the parts that are the reader's."""
    lower = "lower peak_lr (or muon_lr)"
    if "optimizers" in own:
        lower = "lower the learning rates that `optimizers` gives"
    warm_up = "let `schedule` rise more slowly" if "schedule" in own else "raise warmup_fraction"
    check = ["look for a logarithm or a division of zero in your `loss`"] if "loss" in own else []
    check += ["look for values in your `model` that grow without bound"] if "model" in own else []
    return ", ".join([*check, lower, warm_up])
