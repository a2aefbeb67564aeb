"""What one training step costs on this machine, measured at the local batches that more workers would have."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain, count
from statistics import median

import torch
from torch import Tensor
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from cifar_fast.data.dataset import IMAGE_SIZE, Dataset
from cifar_fast.distributed.ranks import choose_backend
from cifar_fast.errors import RecipeError, UserError
from cifar_fast.experiments.world_sizes import planned_world_sizes, require_allowed
from cifar_fast.hardware.clock import Clock, synchronize
from cifar_fast.hardware.device import keep_freed_memory, select_device
from cifar_fast.recipe import Recipe
from cifar_fast.shown import hardware
from cifar_fast.training.alone import Alone
from cifar_fast.training.batches import TrainBatches, steps_per_epoch
from cifar_fast.training.capture import prepare_step
from cifar_fast.training.evaluate import evaluate
from cifar_fast.training.setup import Setup, choose_execution, set_up
from cifar_fast.training.step import TrainingStep, freeze_whitening_bias
from cifar_fast.training.tricks import NO_TRICKS, Tricks

BYTES = {"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2}
"""Bytes of a number."""

REPEATS = 3
"""How many times each step is measured, after a warm-up; the median counts."""

# --- what every script that measures a step needs ---


def random_dataset(n_train: int, n_test: int = 1, n_classes: int = 10) -> Dataset:
    """Return random images and labels: computing on them takes as long as on real ones."""
    random = torch.Generator().manual_seed(0)

    def draw(n: int) -> tuple[Tensor, Tensor]:
        images = torch.randint(0, 256, (n, 3, IMAGE_SIZE, IMAGE_SIZE), dtype=torch.uint8, generator=random)
        return images, torch.randint(0, n_classes, (n,), generator=random)

    return Dataset("random", tuple(map(str, range(n_classes))), *draw(n_train), *draw(n_test), "drawn at random", "")


def with_batch_size(recipe: Recipe, n_images: int) -> Recipe:
    """Return `recipe` with global batches of `n_images`; drop norm groups and micro-batches that do not divide them."""
    local = n_images // recipe.n_shards
    ghost = recipe.ghost_batch_size if recipe.ghost_batch_size and local % recipe.ghost_batch_size == 0 else 0
    micro = recipe.micro_batch_size
    if micro and (n_images % micro or micro % (ghost or local)):
        micro = 0
    return replace(recipe, global_batch_size=n_images, ghost_batch_size=ghost, micro_batch_size=micro)


def steady_step(setup: Setup) -> TrainingStep:
    """Return the training step of `setup`, compiled and captured as in training, in a state that lasts.

    It stands halfway through the training run, where the whitening bias is frozen if most epochs freeze it. All
    learning rates are zero, which costs the same: otherwise random labels could drive the weights to infinity.
    """
    step = prepare_step(setup)
    step.done = math.ceil(setup.batches.total_steps() / 2)
    # The step itself freezes the bias only when it is called: too late for a caller that wraps or copies the network.
    freeze_whitening_bias(step.model, step.done / step.steps_per_epoch >= setup.recipe.whitening_bias_epochs)
    for optimizer in step.optimizers:
        for group in optimizer.param_groups:
            group["peak_lr"] = 0.0
    return step


def endless(batches: TrainBatches) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield the batches of one epoch after the other, without end."""
    return chain.from_iterable(batches.epoch(epoch) for epoch in count())


# --- the costs ---


@dataclass(frozen=True)
class Line:
    """Seconds as a straight line over the images of a batch."""

    fixed_seconds: float
    seconds_per_image: float

    def __call__(self, images: float) -> float:
        """Return the seconds for that many images."""
        return self.fixed_seconds + self.seconds_per_image * images


def fit_line(points: Sequence[tuple[int, float]]) -> Line:
    """Return the line with the least squared relative error through `(images, seconds)`, with neither part negative.

    A single point makes the time proportional to the images.
    """
    # Relative errors, since a tenth too much is as wrong for a small batch as for a large one.
    weighted = [(1 / seconds**2 if seconds else 1.0, images, seconds) for images, seconds in points]
    total = sum(w for w, _, _ in weighted)
    mean_images = sum(w * images for w, images, _ in weighted) / total
    mean_seconds = sum(w * seconds for w, _, seconds in weighted) / total
    spread = sum(w * (images - mean_images) ** 2 for w, images, _ in weighted)
    covariance = sum(w * (images - mean_images) * (seconds - mean_seconds) for w, images, seconds in weighted)
    slope = covariance / spread if spread else math.inf
    if slope < 0:
        return Line(mean_seconds, 0.0)
    if slope * mean_images > mean_seconds:  # it would start below zero: through the origin instead
        products = sum(w * images * seconds for w, images, seconds in weighted)
        return Line(0.0, products / sum(w * images**2 for w, images, _ in weighted))
    return Line(mean_seconds - slope * mean_images, slope)


@dataclass(frozen=True)
class StepPoint:
    """Seconds of one training step of a worker with a local batch of `images`."""

    images: int
    step_seconds: float
    """By the clock, with the device synchronised: from the choices for a batch to new weights."""
    device_seconds: float
    """Time in which the device computes. On a CPU the whole step: nothing runs beside it."""
    launch_seconds: float
    """Time that Python needs to hand the step's work to a GPU, without waiting for it. On a CPU 0: part of the step."""
    spread: float = 0.0
    """Largest relative difference of a repetition from `step_seconds`: large when other work shares the machine."""


@dataclass(frozen=True)
class StepCosts:
    """What one recipe costs on one device, as `measure_step` found it."""

    points: tuple[StepPoint, ...]
    n_parameters: int
    """Trained parameters, whose gradients are averaged."""
    precision: str
    """`float64`, `float32`, `bfloat16` or `float16`."""
    setup_seconds: float
    """From the first byte sent to the device to the first step: statistics, network, data set, whitening."""
    evaluate_seconds_per_image: float
    """Seconds for one view of a test image."""
    hardware: str
    on_gpu: bool

    @property
    def gradient_bytes(self) -> int:
        """Bytes that one all-reduce averages; gradients travel in half precision where the convolutions use it."""
        return self.n_parameters * BYTES[self.precision]

    @property
    def compute_line(self) -> Line:
        """Device time over the local batch.

        The line assumes that each image adds the same time to a fixed cost of the step. Batches too small to fill a GPU
        break that: there the time stops falling, and a line drawn from larger batches promises too much.
        """
        return fit_line([(point.images, point.device_seconds) for point in self.points])

    @property
    def launch_line(self) -> Line:
        """Launch time over the local batch: ghost batch norm launches kernels for every group."""
        return fit_line([(point.images, point.launch_seconds) for point in self.points])

    @property
    def largest_deviation(self) -> float:
        """Largest relative difference between the model's step and a measured one, 0 ... 1."""
        compute, launch = self.compute_line, self.launch_line
        return max(
            abs(max(compute(point.images), launch(point.images)) / point.step_seconds - 1) for point in self.points
        )


# --- the measurement ---


def measure_step(
    recipe: Recipe,
    *,
    tricks: Tricks = NO_TRICKS,
    device: str | None = None,
    n_train: int = 50_000,
    n_test: int = 10_000,
    n_classes: int = 10,
    world_sizes: Sequence[int] | None = None,
    seconds: float = 20.0,
) -> StepCosts:
    """Measure on this machine what a training step costs at the local batches of `world_sizes`, on random images.

    The smallest batch comes first. Larger ones that would exceed the budget of `seconds` are left to the line through
    the others; the first is measured however long it takes. Set-up, compilation and evaluation come on top.

    Args:
        recipe: the recipe to train.
        tricks: functions of your own in place of the recipe's.
        device: `cpu`, `cuda`, ... or None for the best there is.
        n_train: training images.
        n_test: test images.
        n_classes: classes.
        world_sizes: numbers of workers; None for all of 1, 2, 4, ... 64 that the recipe allows.
        seconds: budget for the steps.

    Returns:
        The costs. The steps are those that one rank would take in training, without the all-reduce and without drawing
        each epoch's random choices. A CPU's steps are timed one by one, so the median may miss the averages (EMA,
        Lookahead), which move only every few steps.

    Raises:
        RecipeError: the recipe does not allow a world size, or trains at several resolutions.
        UserError: the device is not there, or there are no test images.
    """
    world_sizes = planned_world_sizes(recipe) if world_sizes is None else world_sizes
    _require_measurable(recipe, n_train, n_test, world_sizes)
    on = select_device(device)
    keep_freed_memory()
    data = random_dataset(n_train, n_test, n_classes)
    points: list[StepPoint] = []
    for images, world_size in sorted((recipe.global_batch_size // number, number) for number in set(world_sizes)):
        if points and _expected_seconds(points[-1], images) > seconds:
            break
        rank = _set_up_rank(recipe, data, on, world_size, tricks)
        points.append(_measure_point(steady_step(rank), rank.batches, images))
        seconds -= _expected_seconds(points[-1], images)
    environment = rank.environment()  # says how the step was launched in the end
    clock = Clock(on)
    with clock.running():  # after the steps: training, too, has loaded and warmed up everything before its clock starts
        whole = set_up(recipe, data, rank.execution, device=on, tricks=tricks)
    return StepCosts(
        points=tuple(points),
        n_parameters=sum(p.numel() for p in whole.model.parameters() if p.requires_grad),
        precision=environment["precision"],
        setup_seconds=clock.seconds,
        evaluate_seconds_per_image=_evaluate_seconds(whole, data),
        hardware=f"{hardware(environment)}; {environment['precision']}, {environment['convolution']} convolution, "
        f"{environment['step_mode']} step; torch {environment['torch']}",
        on_gpu=on.type == "cuda",
    )


def _require_measurable(recipe: Recipe, n_train: int, n_test: int, world_sizes: Sequence[int]) -> None:
    """Find every mistake before minutes are spent."""
    if recipe.resolutions:
        raise RecipeError(
            f"resolutions={recipe.resolutions}: the model of costs knows only one image size; plan with resolutions=()"
        )
    for world_size in world_sizes:
        require_allowed(recipe, world_size)
    if n_test < 1:
        raise UserError(f"n_test={n_test} must be at least 1")
    steps_per_epoch(recipe, n_train)


def _expected_seconds(point: StepPoint, images: int) -> float:
    """Return the time to measure a point of `images`, if each image takes as long as in `point`."""
    return (1 + REPEATS) * point.step_seconds * images / point.images


def _set_up_rank(recipe: Recipe, data: Dataset, device: torch.device, world_size: int, tricks: Tricks) -> Setup:
    """Set up rank 0 of `world_size` as training would: the backend decides how gradients lie and steps are launched."""
    rank = Alone(world_size=world_size, backend=choose_backend(device) if world_size > 1 else None, device=device)
    execution = choose_execution(recipe, device, rank.backend, tricks)
    return set_up(recipe, data, execution, device=device, ranks=rank, tricks=tricks)


def _measure_point(step: TrainingStep, batches: TrainBatches, images: int) -> StepPoint:
    stream, device = endless(batches), batches.device

    def next_step() -> None:
        step(*next(stream))

    if device.type == "cpu":
        next_step()
        typical, spread = _typical_seconds(next_step, device)
        return StepPoint(images, typical, typical, 0.0, spread)

    def ten_steps() -> None:  # Python runs ahead of the device, as in training
        for _ in range(10):
            next_step()

    for _ in range(3):
        next_step()
    typical, spread = _typical_seconds(ten_steps, device)
    # Where the profiler is not allowed to look, the clock's time is the best that is known.
    device_seconds = _kernel_seconds(next_step, device) or typical / 10
    return StepPoint(images, typical / 10, device_seconds, _launch_seconds(next_step, device), spread)


def _typical_seconds(work: Callable[[], None], device: torch.device) -> tuple[float, float]:
    """Return the median time of `work` and the largest relative difference from it."""
    measured = []
    for _ in range(REPEATS):
        clock = Clock(device)
        with clock.running():
            work()
        measured.append(clock.seconds)
    typical = median(measured)
    return typical, max(abs(seconds / typical - 1) for seconds in measured)


def _launch_seconds(step: Callable[[], None], device: torch.device) -> float:
    """Return the median time until Python has handed a step to the idle GPU."""
    measured = []
    for _ in range(REPEATS):
        synchronize(device)
        start = time.perf_counter()
        step()
        measured.append(time.perf_counter() - start)
    return median(measured)


def _kernel_seconds(step: Callable[[], None], device: torch.device) -> float:
    """Return the time that a step's kernels take on the GPU; 0 where the profiler is not allowed to look."""
    synchronize(device)
    with profile(activities=[ProfilerActivity.CUDA]) as profiled:
        step()
        synchronize(device)
    kernels = [event for event in profiled.key_averages() if event.device_type == DeviceType.CUDA]
    return sum(event.self_device_time_total for event in kernels if not event.is_user_annotation) / 1e6  # from us


def _evaluate_seconds(setup: Setup, data: Dataset) -> float:
    some = slice(500 if setup.device.type == "cpu" else 5000)  # whole batches of `evaluate`, if there are enough images
    images, labels, measured = data.test_images[some], data.test_labels[some], []
    for _ in range(REPEATS):
        clock = Clock(setup.device)
        with clock.running():
            evaluate(setup.model, images, labels, dtype=setup.execution.numerics.dtype)
        measured.append(clock.seconds / len(images))
    return median(measured[1:])  # the first warms up
