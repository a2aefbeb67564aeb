"""What more workers would do: step costs measured on this machine, a published all-reduce, and a plain model of both.

Nothing here is a measurement of several GPUs; every table and figure drawn from it says PREDICTION.
"""

from __future__ import annotations

import math
import textwrap
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain, count
from statistics import median

import torch
from torch import Tensor
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from cifar_fast.data.dataset import IMAGE_SIZE
from cifar_fast.distributed.processes import WatchedProcesses
from cifar_fast.distributed.ranks import Ranks, choose_backend
from cifar_fast.errors import RecipeError, UserError
from cifar_fast.experiments.statistics import hardware
from cifar_fast.hardware.clock import Clock, synchronize
from cifar_fast.hardware.device import cores, environment, keep_freed_memory, select_device
from cifar_fast.hardware.numerics import Numerics, choose_numerics
from cifar_fast.recipe import Recipe
from cifar_fast.training.batches import TrainBatches, pixel_statistics, steps_per_epoch
from cifar_fast.training.evaluate import evaluate
from cifar_fast.training.model import Network, build_model, whiten_first_layer
from cifar_fast.training.optim import PiecewiseLinear, build_optimizers, set_learning_rates
from cifar_fast.training.setup import WHITENING_IMAGES
from cifar_fast.training.step import forward_backward, freeze_whitening_bias

PREDICTION = "PREDICTION, not a measurement"
WORLD_SIZES = (1, 2, 4, 8, 16, 32, 64)
VIEWS = {"none": 1, "flip": 2, "flip_shift": 6}
"""Times that each test-time augmentation shows an image to the network."""

BYTES = {"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2}
"""Bytes of a number."""

REPEATS = 3
"""Times that each step is measured, after a warm-up; the median counts."""

# --- the link: what others measured of one all-reduce ---


@dataclass(frozen=True)
class AllReduceTime:
    """One published time of one all-reduce among `n_workers`, as a range."""

    link: str
    n_workers: int
    n_bytes: float
    low_seconds: float
    high_seconds: float
    source: str


_NCCL = "others' measurement on 8 H100 over NVLink, NCCL"
_MULTICAST = "others' measurement on 8 H100, NVLink multicast (symmetric memory)"
ALL_REDUCE_TIMES = (
    AllReduceTime("nvlink_nccl", 8, 8e6, 0.08e-3, 0.09e-3, f"{_NCCL}: 8 MB in 0.08 to 0.09 ms"),
    AllReduceTime("nvlink_nccl", 8, 16e6, 0.12e-3, 0.14e-3, f"{_NCCL}: 16 MB in 0.12 to 0.14 ms"),
    AllReduceTime("nvlink_multicast", 8, 8e6, 0.05e-3, 0.05e-3, f"{_MULTICAST}: 8 MB in 0.05 ms"),
    AllReduceTime("nvlink_multicast", 8, 16e6, 0.09e-3, 0.09e-3, f"{_MULTICAST}: 16 MB in 0.09 ms"),
)
"""All published times that we know, 1 MB taken as 10^6 bytes. None is of more than one machine."""


@dataclass(frozen=True)
class Link:
    """What joins the workers: an all-reduce takes the latency, and the time of the bytes that each worker sends."""

    name: str
    latency_seconds: float
    bytes_per_second: float
    """Bytes that each worker sends in a second; an all-reduce of B bytes among N sends 2 (N - 1) / N x B."""
    source: str
    most_workers: int = 8
    """Largest number of workers that the figures hold for; beyond it a prediction is a lower bound."""


def published_link(name: str) -> Link:
    """Return the link called `name` in `ALL_REDUCE_TIMES`: the line through the middles of its two published ranges.

    Raises `UserError` for a name that is not there.
    """
    rows = [row for row in ALL_REDUCE_TIMES if row.link == name]
    if not rows:
        names = ", ".join(dict.fromkeys(row.link for row in ALL_REDUCE_TIMES))
        raise UserError(f"no all-reduce over a link {name!r} is in the table; the links are {names}")
    small, large = rows
    seconds = [(row.low_seconds + row.high_seconds) / 2 for row in rows]
    seconds_per_byte = (seconds[1] - seconds[0]) / (large.n_bytes - small.n_bytes)
    return Link(
        name,
        latency_seconds=seconds[0] - seconds_per_byte * small.n_bytes,
        bytes_per_second=_ring_share(small.n_workers) / seconds_per_byte,
        source=f"{small.source}, {large.source.split(': ')[-1]}",
        most_workers=small.n_workers,
    )


def _ring_share(world_size: int) -> float:
    return 2 * (world_size - 1) / world_size


def link_all_reduce_seconds(n_bytes: float, world_size: int, link: Link) -> float:
    """Return the time of one all-reduce of `n_bytes` among `world_size` workers; one worker alone needs none.

    Two assumptions carry it from the 8 workers of the published times to others: each worker sends 2 (N - 1) / N times
    the bytes, as in a ring, and the latency is the same for every N. A ring's own latency would grow with N.
    """
    if world_size == 1:
        return 0.0
    return link.latency_seconds + _ring_share(world_size) * n_bytes / link.bytes_per_second


@torch.no_grad()
def ring_all_reduce(gradients: Sequence[Tensor]) -> Iterator[int]:
    """Replace the gradient of each of N workers, (numel,), by the sum of all, each worker sending to the next one only.

    For study: plain tensors of one process stand for the workers. Yields after each of the 2 (N - 1) rounds how many
    numbers a worker has sent in it, at most.
    """
    n = len(gradients)
    pieces = [gradient.tensor_split(n) for gradient in gradients]  # views: what is done to a piece is done to the whole
    for step in range(2 * (n - 1)):
        summing = step < n - 1  # first each piece gathers its sum on a way round the ring, then the sums go round
        travelling = [(rank - step) % n for rank in range(n)]  # the piece that each worker passes on
        sent = [pieces[rank][travelling[rank]].clone() for rank in range(n)]  # all at the same moment
        for rank in range(n):
            received = pieces[(rank + 1) % n][travelling[rank]]
            received.copy_(received + sent[rank] if summing else sent[rank])
        yield max(map(len, sent))


# --- the step: what is measured here ---


@dataclass(frozen=True)
class Line:
    """Seconds as a straight line over the images of a batch."""

    fixed_seconds: float
    seconds_per_image: float

    def __call__(self, images: float) -> float:
        """Return the seconds for that many images."""
        return self.fixed_seconds + self.seconds_per_image * images


def fit_line(points: Sequence[tuple[int, float]]) -> Line:
    """Return the line with the least squared relative error through `(images, seconds)`, neither part of it negative.

    One point makes the time proportional to the images.
    """
    # Relative errors, since a tenth too much is as wrong for a small batch as for a large one.
    weighted = [(1 / seconds**2 if seconds else 1.0, images, seconds) for images, seconds in points]
    total = sum(w for w, _, _ in weighted)
    mean_images = sum(w * images for w, images, _ in weighted) / total
    mean_seconds = sum(w * seconds for w, _, seconds in weighted) / total
    spread = sum(w * (images - mean_images) ** 2 for w, images, _ in weighted)
    together = sum(w * (images - mean_images) * (seconds - mean_seconds) for w, images, seconds in weighted)
    slope = together / spread if spread else math.inf
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
    """By the clock, the device synchronised: making the batch, forward, backward, optimiser."""
    device_seconds: float
    """Time in which the device computes. On a CPU the whole step: nothing runs beside it."""
    launch_seconds: float
    """Time that Python needs to hand the step's work to a GPU, without waiting for it. On a CPU 0: part of the step."""
    spread: float = 0.0
    """Largest relative difference of a repetition from `step_seconds`: large where other work shared the machine."""


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
    """Of one view of a test image."""
    hardware: str
    on_gpu: bool

    @property
    def gradient_bytes(self) -> int:
        """Bytes that one all-reduce averages; gradients travel in half precision where the convolutions have it."""
        return self.n_parameters * BYTES[self.precision]

    @property
    def compute_line(self) -> Line:
        """Device time over the local batch.

        The line assumes that each image costs the same, beside what every step costs. Kernels of a batch too small to
        fill a GPU break that: there the time stops falling, and a line drawn from larger batches promises too much.
        """
        return fit_line([(point.images, point.device_seconds) for point in self.points])

    @property
    def launch_line(self) -> Line:
        """StepMode time over the local batch: ghost batch norm launches kernels for every group."""
        return fit_line([(point.images, point.launch_seconds) for point in self.points])

    @property
    def largest_deviation(self) -> float:
        """Largest relative difference between the model's step and a measured one, 0 ... 1."""
        compute, launch = self.compute_line, self.launch_line
        return max(
            abs(max(compute(point.images), launch(point.images)) / point.step_seconds - 1) for point in self.points
        )


def measure_step(
    recipe: Recipe,
    *,
    device: str | None = None,
    n_train: int = 50_000,
    n_test: int = 10_000,
    n_classes: int = 10,
    world_sizes: Sequence[int] | None = None,
    seconds: float = 20.0,
) -> StepCosts:
    """Measure on this machine what a training step costs at the local batches of `world_sizes`, on random images.

    The smallest batch comes first, and those that would take longer than `seconds` in all are left to the line through
    the others; the first is measured however long it takes. Set-up and evaluation come on top: a few seconds on a CPU.

    Args:
        recipe: what is trained.
        device: `cpu`, `cuda`, ... or None for the best there is.
        n_train: training images; the set-up handles all of them.
        n_test: test images.
        n_classes: classes.
        world_sizes: numbers of workers; None for all of 1, 2, 4, ... 64 that the recipe allows.
        seconds: budget for the steps.

    Returns:
        The costs. EMA, Lookahead and the drawing of each epoch's random choices are not in them.

    Raises:
        RecipeError: the recipe does not allow a world size, or trains at several resolutions.
        UserError: the device is not there, or there are no test images.
    """
    if recipe.resolutions:
        raise RecipeError(
            f"resolutions={recipe.resolutions}: the model of costs knows one size of image; plan with resolutions=()"
        )
    world_sizes = planned_world_sizes(recipe) if world_sizes is None else world_sizes
    for world_size in world_sizes:
        require_allowed(recipe, world_size)
    if n_test < 1:
        raise UserError(f"n_test={n_test} must be at least 1")
    total_steps(recipe, n_train)  # a set that is too small is found here, before minutes are spent
    on = select_device(device)
    keep_freed_memory()
    numerics = choose_numerics(recipe, on)
    generator = torch.Generator().manual_seed(0)
    shape = (n_train, 3, IMAGE_SIZE, IMAGE_SIZE)
    images = torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)
    labels = torch.randint(0, n_classes, (n_train,), generator=generator)

    for _ in range(1 if on.type == "cpu" else 2):  # a GPU's first use compiles and loads, which a warm-up takes away
        setup_clock = Clock(on)
        with setup_clock.running():
            model = _set_up(recipe, images, labels, on, numerics, n_classes)
    dtype = next(model.parameters()).dtype
    n_parameters = sum(p.numel() for p in model.parameters() if p.requires_grad)
    optimizers = build_optimizers(model, recipe)
    # What is computed back through the first block in most epochs is what is measured.
    freeze_whitening_bias(model, recipe.whitening_bias_epochs < recipe.epochs / 2)
    # Random labels must not drive the weights to where arithmetic is special; a rate of zero costs the same.
    set_learning_rates(optimizers, PiecewiseLinear((0.0,), (0.0,)), math.inf)

    def step_of(stream: Iterator[tuple[Tensor, Tensor]]) -> Callable[[], None]:
        def step() -> None:
            batch, targets = next(stream)
            forward_backward(model, batch, targets, recipe, numerics.dtype)
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()

        return step

    points: list[StepPoint] = []
    end = time.perf_counter() + seconds
    for world_size in sorted(set(world_sizes), reverse=True):
        size = recipe.global_batch_size // world_size
        if points:
            expected = points[-1].step_seconds * size / points[-1].images
            if time.perf_counter() + expected * (1 + REPEATS) > end:
                break
        batches = TrainBatches(images, labels, recipe, device=on, dtype=dtype, world_size=world_size)
        stream = chain.from_iterable(batches.epoch(epoch) for epoch in count())
        points.append(_measure_point(step_of(stream), size, on))

    machine, words = environment(on), numerics.describe()
    where = hardware(machine)
    return StepCosts(
        points=tuple(points),
        n_parameters=n_parameters,
        precision=words["precision"],
        setup_seconds=setup_clock.seconds,
        evaluate_seconds_per_image=_evaluate_seconds(model, images[:n_test], labels[:n_test], numerics.dtype),
        hardware=f"{where}; {words['precision']}, {words['convolution']} convolution; torch {machine['torch']}",
        on_gpu=on.type == "cuda",
    )


def _set_up(
    recipe: Recipe, images: Tensor, labels: Tensor, device: torch.device, numerics: Numerics, n_classes: int
) -> Network:
    mean, std = pixel_statistics(images)
    dtype = torch.float64 if numerics.dtype == torch.float64 else torch.float32
    model = build_model(
        recipe, n_classes, mean, std, convolution=numerics.convolution, fuse_norm=numerics.fuse_norm
    ).to(device, dtype)
    model = model.to(memory_format=torch.channels_last if recipe.channels_last else torch.preserve_format)
    TrainBatches(images, labels, recipe, device=device, mean=mean, std=std)
    whiten_first_layer(model, recipe, images[:WHITENING_IMAGES].to(device))
    return model


def _evaluate_seconds(model: Network, images: Tensor, labels: Tensor, dtype: torch.dtype) -> float:
    device = next(model.parameters()).device
    some = slice(500 if device.type == "cpu" else 5000)  # whole batches of `evaluate`, where there are as many images
    images, labels, measured = images[some], labels[some], []
    for _ in range(REPEATS):
        clock = Clock(device)
        with clock.running():
            evaluate(model, images, labels, dtype=dtype)
        measured.append(clock.seconds / len(images))
    return median(measured[1:])  # the first warms up


def _measure_point(step: Callable[[], None], images: int, device: torch.device) -> StepPoint:
    # On a GPU several steps follow each other without waiting, as in training: Python then runs ahead of the device.
    warm_up, at_once = (1, 1) if device.type == "cpu" else (3, 10)
    for _ in range(warm_up):
        step()
    step_seconds, launch_seconds = [], []
    for _ in range(REPEATS):
        synchronize(device)
        start = time.perf_counter()
        for _ in range(at_once):
            step()
        synchronize(device)
        step_seconds.append((time.perf_counter() - start) / at_once)
    typical = median(step_seconds)
    spread = max(abs(seconds / typical - 1) for seconds in step_seconds)
    if device.type == "cpu":
        return StepPoint(images, typical, typical, 0.0, spread)
    for _ in range(REPEATS):
        synchronize(device)
        start = time.perf_counter()
        step()
        launch_seconds.append(time.perf_counter() - start)
    with profile(activities=[ProfilerActivity.CUDA]) as profiled:
        step()
        synchronize(device)
    kernels = [event for event in profiled.key_averages() if event.device_type == DeviceType.CUDA]
    busy = sum(event.self_device_time_total for event in kernels if not event.is_user_annotation) / 1e6  # from us
    # Where the profiler may not look, the clock's time is the best that is known.
    return StepPoint(images, typical, busy or typical, median(launch_seconds), spread)


# --- the model ---


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """What `predict` expects of one training run; a prediction, not a measurement."""

    recipe: str
    n_train: int
    n_test: int
    world_size: int
    local_batch_size: int
    """Images of one worker in a step."""
    steps: int
    gradient_bytes: int
    setup_seconds: float
    compute_seconds: float
    all_reduce_seconds: float
    launch_seconds: float
    """What launching adds: the time in which a device waits for Python."""
    evaluate_seconds: float
    """Not part of `train_seconds`."""
    lower_bound: bool
    """No published all-reduce covers so many workers: the link's own figures are used, and more is to be expected."""
    link: Link
    hardware: str

    @property
    def terms(self) -> dict[str, float]:
        """What `train_seconds` is the sum of, in seconds."""
        return {
            "compute": self.compute_seconds,
            "all-reduce": self.all_reduce_seconds,
            "launch overhead": self.launch_seconds,
            "set-up": self.setup_seconds,
        }

    @property
    def train_seconds(self) -> float:
        """The sum of the terms."""
        return sum(self.terms.values())


def predict(
    measured: StepCosts,
    recipe: Recipe,
    n_train: int,
    n_test: int,
    world_size: int,
    link: Link,
    *,
    all_reduce_seconds: float | None = None,
) -> Prediction:
    """Predict the clocks of `recipe` on `world_size` devices, each like the one that was measured.

    The global batch stays as it is, so that each worker computes its share of every step (strong scaling): the local
    batch is `global_batch_size / world_size` and the number of steps does not depend on the workers. In a step the
    device computes and then averages all gradients at once; Python does not wait for either, so launching counts
    only as far as it takes longer than both. Set-up is taken to be the same for every number of workers; the test
    images are split over them.

    Args:
        measured: costs of the recipe's network on one device.
        recipe: what is trained; it must allow `world_size`.
        n_train: training images.
        n_test: test images.
        world_size: number of workers.
        link: what joins them.
        all_reduce_seconds: measured time of one all-reduce among them, to be taken instead of the link's.

    Returns:
        The terms, in seconds.

    Raises:
        RecipeError: the recipe does not allow `world_size`, or a shard holds less than a batch of it.
    """
    require_allowed(recipe, world_size)
    steps = total_steps(recipe, n_train)
    local_batch_size = recipe.global_batch_size // world_size
    compute, launch = measured.compute_line(local_batch_size), measured.launch_line(local_batch_size)
    views = math.ceil(recipe.epochs) - 1 + VIEWS[recipe.tta]  # single views after every epoch but the last
    one_all_reduce = link_all_reduce_seconds(measured.gradient_bytes, world_size, link)
    if all_reduce_seconds is not None and world_size > 1:
        one_all_reduce = all_reduce_seconds
    return Prediction(
        recipe=recipe.name,
        n_train=n_train,
        n_test=n_test,
        world_size=world_size,
        local_batch_size=local_batch_size,
        steps=steps,
        gradient_bytes=measured.gradient_bytes,
        setup_seconds=measured.setup_seconds,
        compute_seconds=steps * compute,
        all_reduce_seconds=steps * one_all_reduce,
        launch_seconds=steps * max(0.0, launch - compute - one_all_reduce),
        evaluate_seconds=views * math.ceil(n_test / world_size) * measured.evaluate_seconds_per_image,
        lower_bound=all_reduce_seconds is None and world_size > link.most_workers,
        link=link,
        hardware=measured.hardware,
    )


def predict_all(
    measured: StepCosts,
    recipe: Recipe,
    n_train: int,
    n_test: int,
    link: Link,
    *,
    world_size: int | None = None,
    seen: SeenAllReduce | None = None,
) -> list[Prediction]:
    """Return a prediction for each of 1, 2, 4, ... 64 workers that the recipe allows, and for `world_size`.

    Among as many GPUs as `seen` was measured among, its time stands in for the link's.
    """
    asked = planned_world_sizes(recipe, world_size)
    known = {seen.world_size: seen.seconds} if seen is not None and seen.backend == "nccl" else {}
    return [
        predict(measured, recipe, n_train, n_test, number, link, all_reduce_seconds=known.get(number))
        for number in asked
    ]


# --- the all-reduce that can be seen on this machine ---


@dataclass(frozen=True)
class SeenAllReduce:
    """What averaging a network's gradients costs between processes of this machine, flattening included."""

    world_size: int
    backend: str
    n_gradients: int
    seconds: float


def measure_all_reduce(n_gradients: int, *, precision: str, device: str | None = None) -> SeenAllReduce | None:
    """Measure how long it takes to average `n_gradients` numbers between processes of this machine, one for each GPU.

    On a CPU there are two, over gloo. None where nothing can be seen: one GPU, or one core.
    """
    on = select_device(device)
    world_size = torch.cuda.device_count() if on.type == "cuda" else min(2, cores())
    if world_size < 2:
        return None
    backend = choose_backend(on)
    with WatchedProcesses(world_size, device=on.type, backend=backend, timeout=60.0) as processes:
        times = processes.run(all_reduce_task, n_gradients, precision in ("float16", "bfloat16"))
    return SeenAllReduce(world_size, backend, n_gradients, max(times))


def all_reduce_task(ranks: Ranks, n_gradients: int, half_precision: bool) -> float:
    """Return this rank's median time of averaging `n_gradients` numbers; a top-level function, so that it can be
    imported."""
    network = torch.nn.ParameterList([torch.nn.Parameter(torch.zeros(n_gradients, device=ranks.device))])
    network[0].grad = torch.ones_like(network[0])
    times = []
    for _ in range(1 + 2 * REPEATS):
        ranks.barrier()
        start = time.perf_counter()
        ranks.average_gradients(network, half_precision=half_precision)
        synchronize(ranks.device)
        times.append(time.perf_counter() - start)
        ranks.tick()
    return median(times[1:])


def total_steps(recipe: Recipe, n_train: int) -> int:
    """Return the number of optimiser steps, as `TrainBatches` counts them; the number of workers does not change it.

    Raises `RecipeError` when a shard holds less than its part of a batch.
    """
    return math.ceil(recipe.epochs * steps_per_epoch(recipe, n_train))


# --- which numbers of workers a recipe allows ---


def allowed_world_sizes(recipe: Recipe) -> tuple[int, ...]:
    """Return every number of workers among which the recipe's shards can be shared equally."""
    return tuple(number for number in range(1, recipe.n_shards + 1) if recipe.n_shards % number == 0)


def planned_world_sizes(recipe: Recipe, world_size: int | None = None) -> tuple[int, ...]:
    """Return those of 1, 2, 4, ... 64 workers that the recipe allows, and `world_size`, in order.

    Raises `RecipeError` when the recipe does not allow `world_size`.
    """
    asked = set(WORLD_SIZES) & set(allowed_world_sizes(recipe))
    if world_size is not None:
        require_allowed(recipe, world_size)
        asked.add(world_size)
    return tuple(sorted(asked))


def require_allowed(recipe: Recipe, world_size: int) -> None:
    """Raise `RecipeError`, with what the recipe allows and how it would allow more, for another `world_size`."""
    if world_size not in allowed_world_sizes(recipe):
        raise RecipeError(f"world_size={world_size} does not fit: {describe_world_sizes(recipe)}")


def describe_world_sizes(recipe: Recipe) -> str:
    """Return in words which numbers of workers the recipe allows, and which `n_shards` would allow others."""
    workers = ", ".join(map(str, allowed_world_sizes(recipe)))
    shards = [number for number in range(1, max(WORLD_SIZES) + 1) if _can_have_shards(recipe, number)]
    batch = f"global_batch_size={recipe.global_batch_size}"
    if recipe.ghost_batch_size:
        batch += f" in whole groups of ghost_batch_size={recipe.ghost_batch_size}"
    text = (
        f"{recipe.name} has n_shards={recipe.n_shards}, which {workers} worker{'s' * (recipe.n_shards > 1)} can share"
    )
    if shards == [1]:
        return f"{text}; {batch} cannot be cut into more shards: lower ghost_batch_size or change global_batch_size"
    text += f"; {batch} can be cut into n_shards of {', '.join(map(str, shards))} (--n-shards)"
    if not recipe.ghost_batch_size:
        text += ", which makes the groups of batch norm smaller and so trains another recipe"
    return text


def _can_have_shards(recipe: Recipe, n_shards: int) -> bool:
    try:
        replace(recipe, n_shards=n_shards)
    except RecipeError:
        return False
    return True


# --- the table ---


def plan_table(
    predictions: Sequence[Prediction], measured: StepCosts, recipe: Recipe, seen: SeenAllReduce | None = None
) -> str:
    """Return the predictions as a text table, with what they stand on below it."""
    rows = [
        ["", "", "", *["PREDICTED"] * 7],
        ["", "images a", "", "compute", "all-reduce", "launch", "set-up", "train_", "evaluate_", "speed-"],
        ["workers", "worker", "steps", "s", "s", "s", "s", "seconds", "seconds", "up"],
    ]
    first = predictions[0]
    for now in predictions:
        bound = ">= " if now.lower_bound else ""
        compute, all_reduce, launch, setup = (f"{value:.3f}" for value in now.terms.values())
        speed_up = first.train_seconds / now.train_seconds
        rows.append(
            [
                str(now.world_size),
                f"{now.local_batch_size:,}",
                f"{now.steps:,}",
                compute,
                bound + all_reduce,
                launch,
                setup,
                f"{bound}{now.train_seconds:.2f}",
                f"{now.evaluate_seconds:.2f}",
                f"{'<= ' * now.lower_bound}{speed_up:.2f}",
            ]
        )
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    title = f"{PREDICTION}: {recipe.name}, {first.n_train:,} training and {first.n_test:,} test images"
    return "\n".join([title, "", *lines, "", *_notes(predictions, measured, recipe, seen)])


def _notes(
    predictions: Sequence[Prediction], measured: StepCosts, recipe: Recipe, seen: SeenAllReduce | None
) -> list[str]:
    link, line = predictions[0].link, measured.compute_line
    points = ", ".join(f"{point.images:,} images {1000 * point.step_seconds:.2f} ms" for point in measured.points)
    spread = max(point.spread for point in measured.points)
    sizes = [point.images for point in measured.points]
    outside = [str(now.world_size) for now in predictions if not min(sizes) <= now.local_batch_size <= max(sizes)]
    notes = [
        f"measured on one {measured.hardware}",
        f"measured steps: {points}; repetitions differ by up to {100 * spread:.0f} %, and the model from them by up "
        f"to {100 * measured.largest_deviation:.1f} %",
        f"compute of a step: {1000 * line.fixed_seconds:.2f} ms + {1e6 * line.seconds_per_image:.2f} us an image",
        f"all-reduce of a step: {measured.n_parameters:,} gradients, {measured.gradient_bytes / 1e6:.2f} MB, over "
        f"{link.name}: {1e3 * link.latency_seconds:.3f} ms + 2 (N - 1) / N x bytes / "
        f"({link.bytes_per_second / 1e9:.0f} GB/s); source: {link.source}",
        "taken for granted: every worker has a device like the measured one to itself, none waits for another, and "
        "set-up does not shrink; EMA, Lookahead and each epoch's random draws are left out; evaluation is split over "
        "the workers and is not part of train_seconds",
        f"workers: {describe_world_sizes(recipe)}",
    ]
    if seen is None:
        notes.append("all-reduce on this machine: none can be seen, with one GPU or one core")
    else:
        rows = [now for now in predictions if now.world_size == seen.world_size]
        taken = "taken for that row" if seen.backend == "nccl" and rows else "not taken for any row"
        notes.append(
            f"all-reduce on this machine: {seen.world_size} processes over {seen.backend} average {seen.n_gradients:,} "
            f"gradients in {1e3 * seen.seconds:.2f} ms (measured; {taken})"
        )
    if outside:
        how = "in proportion to the one that was" if len(sizes) == 1 else "on the line through those that were"
        notes.append(f"no step was measured at the local batch of {', '.join(outside)} workers: predicted {how}")
    if not measured.on_gpu and len(predictions) > 1:
        notes.append("measured on a CPU: workers with such a CPU each; this says nothing about GPUs")
    if any(now.lower_bound for now in predictions):
        notes.append(
            f">=: a lower bound; no published all-reduce among more than {link.most_workers} workers, on several "
            "machines, is known to us, and the link within one machine stands in for it"
        )
    return [textwrap.fill(note, width=110, initial_indent="- ", subsequent_indent="  ") for note in notes]
