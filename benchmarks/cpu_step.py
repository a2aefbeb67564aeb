"""Splits one training step on a CPU into its parts, and compares it with this machine's limits and with stock ops.

    python benchmarks/cpu_step.py --out benchmarks/results/cpu_step
    python benchmarks/cpu_step.py --out FOLDER --recipe smoke --rounds 3 --steps 10   # short steps: several per turn

In the folder, `cpu_step.txt` is the table that is printed, and `cpu_step.json` has every round behind it.

The script also measures the machine's limits, before the steps and after them, with as many threads as the steps use:
the rate of square matrix products, and the memory bandwidth. Each side runs in a process of its own. They take turns,
one working while the others wait:

    ours                      the training step, from the choices for a batch to new weights
    ours, default allocator   the same without `keep_freed_memory`, which nothing in that process has called
    ours, norm not fused      the same with batch norm and activation not fused
    ours, torch's convolutions
                              the same with 3x3 convolutions as torch computes them
    reference                 a plain port: the same network, weights and batch in stock torch.nn ops, bfloat16
                              autocast, channels-last, eager, default allocator; timed from a finished batch to new
                              weights
    ours, split               the first side's step again, with a stopwatch that times one part at a time

Random images take as long as real ones. Nothing is learned: the learning rates are 0. The averages (EMA, Lookahead)
are switched off, since the reference has none, and drawing an epoch's random choices is not timed.
"""

from __future__ import annotations

import argparse
import copy
import inspect
import math
import statistics
import sys
import textwrap
import time
from collections import OrderedDict, defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any
from unittest.mock import patch

import psutil
import torch
import torch.nn.functional as F
from revision import commit
from torch import Tensor, nn

from cifar_fast import recipes
from cifar_fast.data.dataset import SYNTHETIC, Dataset
from cifar_fast.data.load import load_cifar10
from cifar_fast.data.synthetic import synthetic
from cifar_fast.distributed.processes import WatchedProcesses
from cifar_fast.errors import UserError
from cifar_fast.experiments.statistics import spread
from cifar_fast.experiments.step_costs import endless, random_dataset, steady_step, with_batch_size
from cifar_fast.hardware.device import environment, keep_freed_memory
from cifar_fast.hardware.numerics import Numerics
from cifar_fast.kernels import amx, fused
from cifar_fast.recipe import Recipe
from cifar_fast.shown import hardware, table
from cifar_fast.training import optim
from cifar_fast.training.alone import Alone
from cifar_fast.training.layers import Block, Conv3x3, GhostBatchNorm, Scale
from cifar_fast.training.model import Network, Residual
from cifar_fast.training.optim import build_optimizers
from cifar_fast.training.result import write_json
from cifar_fast.training.setup import Execution, choose_execution, set_up

RESULT, TABLE = "cpu_step.json", "cpu_step.txt"
RANDOM = "random"
N_IMAGES = 50_000
"""Random images: as many as CIFAR-10 has, so that a batch is gathered from as much memory."""
CPU = torch.device("cpu")
SIDES = (
    "ours",
    "ours, default allocator",
    "ours, norm not fused",
    "ours, torch's convolutions",
    "reference",
    "ours, split",
)
OURS, DEFAULT, UNFUSED, DIRECT, REFERENCE, SPLIT = SIDES
OTHER_NUMERICS: dict[str, dict[str, Any]] = {UNFUSED: {"fuse_norm": False}, DIRECT: {"convolution": "direct"}}
"""The numerics of the sides that differ from ours there."""

# --- what this machine can do ---

PRODUCTS = (512, 1024, 1536, 2048, 2560)
"""Sides of the square matrices that are multiplied; the best rate of all counts."""
REPEATS = 5
SECONDS = 5.0
"""Time after which larger products in a format are left out: not every CPU multiplies bfloat16 fast."""


def best_time(work: Callable[[], object]) -> float:
    """Return the shortest of `REPEATS` times of `work`, after one that does not count."""
    work()
    seconds = []
    for _ in range(REPEATS):
        start = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - start)
    return min(seconds)


def matrix_rate(dtype: torch.dtype) -> float:
    """Return the floating-point operations per second that this process reaches in products of square matrices."""
    best, began = 0.0, time.perf_counter()
    for side in PRODUCTS:
        a, b, c = (torch.randn(side, side).to(dtype) for _ in range(3))
        best = max(best, 2 * side**3 / best_time(lambda a=a, b=b, c=c: torch.mm(a, b, out=c)))  # type: ignore[misc]
        if time.perf_counter() - began > SECONDS:
            break
    return best


def amx_rate() -> float:
    """Return the operations per second of AMX on data that stays in its registers, the most that bfloat16 can reach; 0
    on a machine without AMX."""
    if not amx.available()[0]:
        return 0.0
    products = 4_000_000
    return amx.multiply_in_registers(products) / best_time(lambda: amx.multiply_in_registers(products))


def last_level_cache() -> int:
    """Return the bytes of the largest cache that the system reports; 32 MiB where it reports none."""
    units = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}
    sizes = []
    for file in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        text = file.read_text().strip()
        sizes.append(int(text[:-1]) * units[text[-1]] if text[-1:] in units else int(text or 0))
    return max(sizes, default=32 << 20)


def array_bytes() -> int:
    """Return the size of an array that is larger than any cache but small enough to hold three of them in memory."""
    return min(max(4 * last_level_cache(), 256 << 20), psutil.virtual_memory().available // 8)


def bandwidths(n_bytes: int) -> dict[str, float]:
    """Return the bytes read and written a second by a copy, and by a = b + 3 c, over arrays of `n_bytes`."""
    a, b, c = (torch.ones(n_bytes // 4) for _ in range(3))
    return {
        "copy": 2 * n_bytes / best_time(lambda: a.copy_(b)),
        "triad": 3 * n_bytes / best_time(lambda: torch.add(b, c, alpha=3.0, out=a)),
    }


def measure_limits(dtypes: Sequence[torch.dtype]) -> dict[str, Any]:
    """Measure both limits with the threads of this process."""
    n_bytes = array_bytes()
    products = {str(dtype).removeprefix("torch."): matrix_rate(dtype) for dtype in dtypes}
    return {
        "flops": products | ({"bfloat16": max(products["bfloat16"], amx_rate())} if "bfloat16" in products else {}),
        "products": products,
        "bytes": bandwidths(n_bytes),
        "array_bytes": n_bytes,
        "last_level_cache_bytes": last_level_cache(),
    }


def best_limits(measured: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return the best of each limit, `flops` by format and `bandwidth`, and all measurements behind them."""
    flops = {name: max(each["flops"][name] for each in measured) for name in measured[0]["flops"]}
    bandwidth = max(rate for each in measured for rate in each["bytes"].values())
    return {"flops": flops, "bandwidth": bandwidth, "measured": list(measured)}


# --- the sides: each is prepared once, in a process of its own, and then takes its turns ---


@dataclass(frozen=True)
class Setting:
    """What all sides share; it is sent to their processes."""

    recipe: Recipe
    data: str
    n_images: int
    threads: int
    execution: Execution
    reference_part: int = 0
    """Images that the reference handles at a time; 0: the whole batch at once."""

    @property
    def numerics(self) -> Numerics:
        """How our sides compute the step."""
        return self.execution.numerics

    def with_numerics(self, **values: Any) -> Setting:
        """Return the same with other numerics."""
        return replace(self, execution=replace(self.execution, numerics=replace(self.numerics, **values)))


@dataclass
class Side:
    """What one side computes with: its network, its batches, and the step from a batch to new weights."""

    model: Network
    optimizers: list[torch.optim.Optimizer]
    stream: Iterator[tuple[Tensor, Tensor]]
    step: Callable[[Tensor, Tensor], tuple[Tensor, Any]]
    """Returns the loss, and a second value that is ignored."""
    data: str


def load_images(data: str, n_images: int) -> tuple[Dataset, str]:
    """Return the data set and a description of it; `n_images`: how many random images to make."""
    if data == RANDOM:
        return random_dataset(n_images), f"{n_images:,} random images"
    loaded = synthetic() if data == SYNTHETIC else load_cifar10(data)
    return loaded, f"{len(loaded.train_labels):,} training images of {loaded.name}"


@cache
def prepare(setting: Setting, plain: bool) -> Side:
    """Return what a side needs, with the same weights and batches as every other; `plain`: for the reference."""
    torch.set_num_threads(setting.threads)
    data, words = load_images(setting.data, setting.n_images)
    if plain:
        return plain_side(setting, data, words)
    setup = set_up(setting.recipe, data, setting.execution, device=CPU)
    step = steady_step(setup)
    return Side(setup.model, setup.optimizers, endless(setup.batches), step, words)


def plain_side(setting: Setting, data: Dataset, words: str) -> Side:
    """Return the reference: our network, weights and batches, but stock layers and a step of its own."""
    recipe = replace(setting.recipe, channels_last=True)
    setup = set_up(recipe, data, Execution(Numerics(torch.float32, "direct", "stock ops")), device=CPU)
    model = plain_network(steady_step(setup).model)
    optimizers = build_optimizers(model, recipe)
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = 0.0

    def step(images: Tensor, labels: Tensor) -> tuple[Tensor, None]:
        loss = reference_gradients(model, images, labels, recipe.label_smoothing, setting.reference_part)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        return loss, None

    return Side(model, optimizers, endless(setup.batches), step, words)


def plain_network(model: Network) -> Network:
    """Return a copy of `model` in stock layers; nn.BatchNorm2d takes its statistics over its whole input."""
    model = copy.deepcopy(model)
    for parent in list(model.modules()):
        for name, layer in list(parent.named_children()):
            if isinstance(layer, Conv3x3):
                conv = nn.Conv2d(layer.in_channels, layer.out_channels, 3, padding=1, bias=False)
                conv.weight = layer.weight
                pooled = nn.Sequential(OrderedDict(conv=conv, pool=nn.MaxPool2d(2)))
                setattr(parent, name, pooled if layer.pool else conv)
            elif isinstance(layer, GhostBatchNorm):
                norm = nn.BatchNorm2d(layer.num_features, eps=layer.eps, momentum=layer.batch_momentum)
                norm.load_state_dict(layer.state_dict())
                norm.weight.requires_grad = layer.weight.requires_grad
                setattr(parent, name, norm)
    return model


def reference_gradients(model: Network, images: Tensor, labels: Tensor, smoothing: float, part: int = 0) -> Tensor:
    """Leave the gradients of the batch's mean loss in the plain network's parameters and return that loss.

    `part`: images to handle at a time, 0 for all; batch norm takes its statistics over them.
    """
    loss = torch.zeros(())
    for some, target in zip(images.split(part or len(images)), labels.split(part or len(images)), strict=True):
        with torch.autocast("cpu", torch.bfloat16):
            logits = model(some)
        part_loss = F.cross_entropy(logits.float(), target, reduction="sum", label_smoothing=smoothing) / len(images)
        part_loss.backward()
        loss += part_loss.detach()
    return loss


class Usage:
    """What this process has cost the operating system so far: page faults, and system time in all threads."""

    def __init__(self) -> None:
        """Read both; both are 0 on Windows, which does not report them."""
        self.faults, self.seconds = 0, 0.0
        if sys.platform != "win32":
            import resource

            used = resource.getrusage(resource.RUSAGE_SELF)
            self.faults, self.seconds = used.ru_minflt, used.ru_stime


def choose(ranks: Alone, recipe: Recipe, threads: int) -> Execution:
    """Choose how to compute the step, as training does, in the process that will then compute it."""
    torch.set_num_threads(threads)
    keep_freed_memory()
    return choose_execution(recipe, CPU)


def take_turn(ranks: Alone, setting: Setting, side: str, steps: int) -> dict[str, Any]:
    """Take the side's next steps; return the means per step, with times in seconds.

    A top-level function, so that a process can import it.
    """
    if side in OTHER_NUMERICS:
        keep_freed_memory()  # as ours has done in `choose`
        setting = setting.with_numerics(**OTHER_NUMERICS[side])
    prepared = prepare(setting, side == REFERENCE)
    totals: defaultdict[str, float] = defaultdict(float)
    for _ in range(steps):
        finished = next(prepared.stream) if side == REFERENCE else None  # only its arithmetic is timed
        before, start = Usage(), time.perf_counter()
        images, labels = finished or next(prepared.stream)
        made = time.perf_counter()
        loss, _ = prepared.step(images, labels)
        end, after = time.perf_counter(), Usage()
        totals["seconds"] += end - start
        totals["arithmetic_seconds"] += end - made
        totals["page_faults"] += after.faults - before.faults
        totals["system_seconds"] += after.seconds - before.seconds
        totals["loss"] += loss.item()
    means: dict[str, Any] = {name: total / steps for name, total in totals.items()}
    # Nothing can undo that call, so this says how the process has allocated memory all along.
    return means | {"keeps_freed_memory": bool(keep_freed_memory.cache_info().currsize), "data": prepared.data}


# --- the split: one stopwatch that always times exactly one part ---


@dataclass(frozen=True)
class Part:
    """What a stretch of time is spent on."""

    kind: str
    phase: str = ""
    """`forward`, `backward`, or nothing for a part that is neither."""
    layer: str = ""


@dataclass
class Work:
    """The time of a part, and the least work that it has to do."""

    seconds: float = 0.0
    flops: float = 0.0
    """Operations of its matrix products and convolutions, by the direct algorithm."""
    multiplied: float = 0.0
    """Those really computed: Winograd multiplies fewer numbers, and AMX leaves out taps outside an image."""
    bytes: float = 0.0
    """Inputs, weights and outputs, each once."""

    def add(self, other: Work) -> None:
        """Add `other`."""
        self.seconds += other.seconds
        self.flops += other.flops
        self.multiplied += other.multiplied
        self.bytes += other.bytes


KINDS: tuple[tuple[type[nn.Module], str], ...] = (
    (nn.Conv2d, "convolutions"),
    (nn.BatchNorm2d, "norms"),
    (nn.AdaptiveMaxPool2d, "pooling"),
    (Residual, "additions"),
    (nn.Flatten, "head and loss"),
    (nn.Linear, "head and loss"),
    (Scale, "head and loss"),
    (nn.ReLU, "activations"),
    (nn.CELU, "activations"),
    (nn.GELU, "activations"),
    (nn.SiLU, "activations"),
)
FIRST, NORM_AND_ACTIVATION = "first layer, frozen", "norm and activation"
BATCH, AUTOGRAD, REST = Part("augmentation"), Part("autograd", "backward"), Part("rest")
HEAD = Part("head and loss", "forward")
NEWTON_SCHULZ, OPTIMISER = Part("Newton-Schulz"), Part("optimiser, other")
ORDER = (
    *("augmentation", FIRST, "convolutions", NORM_AND_ACTIVATION, "norms", "activations", "pooling", "additions"),
    *("head and loss", "autograd", "Newton-Schulz", "optimiser, other", "rest"),
)


class Split:
    """Times a step part by part, so that the parts add up to it; counts their arithmetic and least memory traffic.

    Hooks on modules and on autograd's nodes switch from one part to the next; time that none claims is `rest`.
    """

    def __init__(self) -> None:
        """Start with nothing."""
        self.work: defaultdict[Part, Work] = defaultdict(Work)
        self._parts, self._since = [REST], 0.0
        self._nodes: dict[Any, Any] = {}  # autograd's, each with its hook; kept, so that each is recognised

    def _settle(self) -> None:
        now = time.perf_counter()
        self.work[self._parts[-1]].seconds += now - self._since
        self._since = now

    def enter(self, part: Part) -> None:
        """Count what follows towards `part`."""
        self._settle()
        self._parts.append(part)

    def leave(self) -> None:
        """Count what follows towards the previous part."""
        self._settle()
        self._parts.pop()

    @contextmanager
    def within(self, part: Part) -> Iterator[None]:
        """Count the block towards `part`."""
        self.enter(part)
        try:
            yield
        finally:
            self.leave()

    def _timed(self, part: Part | Callable[..., Part], work: Callable, counted: Callable | None = None) -> Callable:
        """Return `work` with its time counted towards `part`, then a call of `counted(part, result, *arguments)`."""

        def timed(*args: Any, **kwargs: Any) -> Any:
            now = part if isinstance(part, Part) else part()
            with self.within(now):
                result = work(*args, **kwargs)
                if counted:
                    counted(now, result, *args)
            return result

        return timed

    @contextmanager
    def watching(self, model: nn.Module, optimizers: Sequence[torch.optim.Optimizer]) -> Iterator[None]:
        """Time the block, in which the network and the optimisers are used; afterwards all hooks are gone."""
        with ExitStack() as stack:
            fused_layers = stack.enter_context(self._norms_with_activations(model))
            for name, module in model.named_modules():
                part = part_of(name.removeprefix("layers."), module)
                if part and module not in fused_layers:
                    for handle in self._hooked(part, module):
                        stack.callback(handle.remove)
            for optimizer in optimizers:
                stack.callback(optimizer.register_step_pre_hook(lambda *_: self.enter(OPTIMISER)).remove)
                stack.callback(optimizer.register_step_post_hook(self._optimised).remove)
            # A max-pool inside a convolution's own forward; Winograd and AMX fuse theirs with the convolution.
            pool = self._timed(lambda: Part("pooling", "forward", self._parts[-1].layer), F.max_pool2d, self._pooled)
            loss = self._timed(HEAD, F.cross_entropy, self._made)
            backward = self._timed(AUTOGRAD, Tensor.backward)
            orthogonalised = self._timed(NEWTON_SCHULZ, optim.orthogonalise_all, self._orthogonalised)
            stack.enter_context(patch.object(F, "max_pool2d", pool))
            stack.enter_context(patch.object(F, "cross_entropy", loss))
            stack.enter_context(patch.object(Tensor, "backward", backward))
            stack.enter_context(patch.object(optim, "orthogonalise_all", orthogonalised))
            stack.callback(self._forget)
            self._since = time.perf_counter()
            yield
            self._settle()

    @contextmanager
    def _norms_with_activations(self, model: nn.Module) -> Iterator[set[nn.Module]]:
        """Time the fused norms and activations without hooks on them, which would prevent the fusion; yield both."""
        names, fused_layers = {}, set()
        for name, block in model.named_modules():
            if isinstance(block, Block) and block.fuse:
                for before, layer in pairwise(block):
                    if isinstance(before, GhostBatchNorm) and type(layer) in fused.ACTIVATIONS:
                        names[before] = name.removeprefix("layers.")
                        fused_layers |= {before, layer}
        then = GhostBatchNorm.then

        def timed(norm: GhostBatchNorm, activation: nn.Module, x: Tensor, *, pool: bool) -> Tensor:
            assert not pool  # on a CPU a convolution pools for itself
            part = Part(NORM_AND_ACTIVATION, "forward", names[norm])
            with self.within(part):
                y = then(norm, activation, x)
                self._made(part, y)
                self._moved(part, [x], list(norm.parameters()), y)
            return y

        with patch.object(GhostBatchNorm, "then", timed):
            yield fused_layers

    def _hooked(self, part: Part, module: nn.Module) -> Iterator[Any]:
        def entered(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            self.enter(part)

        def left(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            names = " ".join(self._made(part, output))
            back = replace(part, phase="backward")
            if isinstance(module, nn.Conv2d):
                self._convolved(part, module, inputs[0], output, names)
            elif not isinstance(module, Residual):
                self._moved(part, inputs, list(module.parameters()), output)
            else:
                self._moved(part, (output, output), [], output)
            if isinstance(module, nn.Linear):
                flops = 2.0 * output.numel() * module.in_features
                self._multiplied(part, flops)
                self._multiplied(back, flops * (inputs[0].requires_grad + module.weight.requires_grad))
            self.leave()

        yield module.register_forward_pre_hook(entered)
        yield module.register_forward_hook(left)

    # What the forward pass made, and the work when its gradient comes back.

    def _made(self, part: Part, made: Tensor, *_: object) -> list[str]:
        """Count the nodes that have computed `made` since the last call towards `part`; return their names."""
        back, names, open_nodes = replace(part, phase="backward"), [], [made.grad_fn]

        def switch(*_: object) -> None:
            self._settle()
            self._parts[-1] = back

        while open_nodes:
            node = open_nodes.pop()
            if node is None or node in self._nodes:
                continue
            names.append(node.name())
            self._nodes[node] = node.register_prehook(switch)
            # Adding up the gradients of a weight counts towards the layer that it belongs to.
            open_nodes += [following for following, _ in node.next_functions]
        return names

    def _forget(self, *_: object) -> None:
        for handle in self._nodes.values():
            handle.remove()
        self._nodes.clear()

    # Arithmetic and memory.

    def _multiplied(self, part: Part, flops: float, multiplied: float | None = None) -> None:
        self.work[part].add(Work(flops=flops, multiplied=flops if multiplied is None else multiplied))

    def _moved(
        self, part: Part, inputs: Sequence[Tensor], weights: Sequence[Tensor], output: Tensor, n_output: int = 0
    ) -> None:
        """Count each tensor once forward; count the output's gradient, inputs, weights and their gradients backward."""
        out = (n_output or output.numel()) * output.element_size()
        self.work[part].bytes += bytes_of(inputs) + bytes_of(weights) + out
        if output.requires_grad:
            wanted = [tensor for tensor in (*inputs, *weights) if tensor.requires_grad]
            back = self.work[replace(part, phase="backward")]
            back.bytes += out + bytes_of(inputs) + bytes_of(weights) + bytes_of(wanted)

    def _convolved(self, part: Part, module: nn.Conv2d, x: Tensor, y: Tensor, names: str) -> None:
        height, width = (
            (size + 2 * int(pad) - kernel) // stride + 1
            for size, pad, kernel, stride in zip(
                x.shape[2:], module.padding, module.kernel_size, module.stride, strict=True
            )
        )
        points = len(x) * module.out_channels * height * width
        flops = 2.0 * points * module.weight[0].numel()
        multiplied, channels = flops, module.in_channels * module.out_channels
        if "Winograd" in names:  # 36 points of each tile of 4x4, multiplied by as many of each filter
            multiplied = 2.0 * 36 * len(x) * math.ceil(height / 4) * math.ceil(width / 4) * channels
        elif "Amx" in names:  # for each pixel the taps inside the image; where it pools, only for whole windows
            pooled = y.shape[2:] != (height, width)
            seen = (size // 2 * 2 if pooled else size for size in (height, width))
            taps = math.prod(taps_inside(*sizes) for sizes in zip(seen, (height, width), strict=True))
            multiplied = 2.0 * len(x) * taps * channels
        times = (x.requires_grad + module.weight.requires_grad) if y.requires_grad else 0
        self._multiplied(part, flops, multiplied)
        self._multiplied(replace(part, phase="backward"), times * flops, times * multiplied)
        # A max-pool that is not fused reads the whole image that is made here.
        pools = "Winograd" in names or "Amx" in names
        self._moved(part, [x], list(module.parameters()), y, 0 if pools else points)

    def _pooled(self, part: Part, y: Tensor, x: Tensor, *_: object) -> None:
        self._made_over(part, y, x)
        self._moved(part, [x], [], y)

    def _made_over(self, part: Part, y: Tensor, x: Tensor) -> None:
        """Claim the node of `y` alone where `x` was made inside a layer that will claim its own when it is left."""
        before = Part("convolutions", "forward", part.layer)
        if x.grad_fn is not None and x.grad_fn not in self._nodes:
            self._made(before, x)
        self._made(part, y)

    def _orthogonalised(self, part: Part, updates: list[Tensor], matrices: list[Tensor]) -> None:
        steps = inspect.signature(optim.orthogonalise).parameters["steps"].default
        flops = 0.0
        for matrix in matrices:
            m, n = sorted(matrix.shape)
            flops += steps * (4.0 * m * m * n + 2.0 * m**3)
        self._multiplied(part, flops)
        self.work[part].bytes += bytes_of(matrices) + bytes_of(updates)

    def _optimised(self, optimizer: torch.optim.Optimizer, *_: object) -> None:
        # The gradient is read, weight and momentum are read and written.
        updated = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        self.work[OPTIMISER].bytes += 5 * bytes_of(updated)
        self.leave()


def taps_inside(n_out: int, n_in: int) -> int:
    """Return how many taps of a filter of three fall inside `n_in` pixels, summed over the first `n_out` of them."""
    return sum(min(n_in, pixel + 2) - max(0, pixel - 1) for pixel in range(n_out))


def bytes_of(tensors: Sequence[Tensor]) -> int:
    """Return the bytes that the tensors' numbers take."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def part_of(name: str, module: nn.Module) -> Part | None:
    """Return the part that a module's forward pass counts towards; None for a max-pool, or if its submodules count."""
    if isinstance(module, nn.Conv2d) and not module.weight.requires_grad:
        return Part(FIRST, "forward", name)
    for kind, word in KINDS:
        if isinstance(module, kind):
            return Part(word, "forward", name)
    if isinstance(module, nn.MaxPool2d) or next(module.children(), None) is not None:
        return None
    return Part(type(module).__name__, "forward", name)


def split_turn(ranks: Alone, setting: Setting, steps: int) -> dict[str, Any]:
    """Take steps as `ours` does, split into parts; return the means per step, and the work of each part."""
    prepared = prepare(setting, False)
    split, seconds, losses = Split(), 0.0, 0.0
    for _ in range(steps):
        with split.watching(prepared.model, prepared.optimizers):
            start = time.perf_counter()
            with split.within(BATCH):
                images, labels = next(prepared.stream)
                n_pixels = images.numel()
                split.work[BATCH].bytes += n_pixels + bytes_of([images]) + 2 * bytes_of([labels])  # from uint8
            loss, _ = prepared.step(images, labels)
            seconds += time.perf_counter() - start
        losses += loss.item()
    parts = [
        {**asdict(part), **{name: value / steps for name, value in asdict(work).items()}}
        for part, work in split.work.items()
    ]
    return {"seconds": seconds / steps, "loss": losses / steps, "parts": parts}


# --- from turns to one report ---


def rows_of(
    parts: Sequence[dict[str, Any]], seconds: float, limits: dict[str, Any], dtype: str, by: Sequence[str]
) -> list:
    """Return the parts, added up over those that agree in `by`, with their shares of the step and of the limits.

    `least_seconds` is the longer of two times: its multiplications at the matrix limit, its bytes at the bandwidth.
    """
    together: defaultdict[tuple[str, ...], Work] = defaultdict(Work)
    for part in parts:
        work = Work(**{name: part[name] for name in ("seconds", "flops", "multiplied", "bytes")})
        together[tuple(part[name] for name in by)].add(work)
    rows = []
    for key, work in together.items():
        if not work.seconds and not work.flops and not work.bytes:
            continue
        rate = limits["flops"][dtype]
        least = max(work.multiplied / rate, work.bytes / limits["bandwidth"])
        rows.append(
            dict(zip(by, key, strict=True))
            | asdict(work)
            | {
                "share": work.seconds / seconds,
                "direct_share_of_matrix_limit": share(work.flops, work.seconds * rate),
                "share_of_matrix_limit": share(work.multiplied, work.seconds * rate),
                "share_of_bandwidth": share(work.bytes, work.seconds * limits["bandwidth"]),
                "least_seconds": least,
            }
        )
    return rows


def share(done: float, possible: float) -> float | None:
    """Return the share of the possible that was done; None where nothing was done, or in no time."""
    return done / possible if done and possible > 0 else None


def middle(seconds: Sequence[float]) -> int:
    """Return the index of the median, or of the lower of two."""
    return sorted(range(len(seconds)), key=lambda number: seconds[number])[(len(seconds) - 1) // 2]


def compare(first: Sequence[float], second: Sequence[float]) -> dict[str, Any]:
    """Return the ratio of two sides round by round, and its median and range."""
    ratios = [a / b for a, b in zip(first, second, strict=True)]
    return {"by_round": ratios, "n": len(ratios), **spread(ratios)}


def summarise(
    setting: Setting, limits: dict[str, Any], turns: dict[str, list[dict[str, Any]]], warm_up: dict[str, dict[str, Any]]
) -> dict[str, Any]:
    """Return the report of all rounds; a turn is what `take_turn` or `split_turn` returned."""
    seconds = {side: [turn["seconds"] for turn in each] for side, each in turns.items()}
    ours, reference = turns[OURS], turns[REFERENCE]
    faults = {side: typical_of(turns[side], "page_faults") or 0.0 for side in (OURS, DEFAULT)}
    arithmetic = [[turn["arithmetic_seconds"] for turn in each] for each in (ours, reference)]
    dtype = str(setting.numerics.dtype).removeprefix("torch.")
    number = middle(seconds[SPLIT])
    taken = turns[SPLIT][number]
    rows = rows_of(taken["parts"], taken["seconds"], limits, dtype, ("kind", "phase"))
    rows.sort(
        key=lambda row: (ORDER.index(row["kind"]) if row["kind"] in ORDER else len(ORDER), row["phase"] != "forward")
    )
    layers = [part for part in taken["parts"] if part["kind"] in ("convolutions", FIRST)]
    flops, multiplied = (sum(row[name] for row in rows) for name in ("flops", "multiplied"))
    typical = statistics.median(seconds[OURS])
    return {
        "limits": limits,
        "sides": {
            side: {
                "seconds": spread(seconds[side]),
                "page_faults": typical_of(each, "page_faults"),
                "system_seconds": typical_of(each, "system_seconds"),
                "keeps_freed_memory": each[0].get("keeps_freed_memory"),
                "first_loss": warm_up[side]["loss"],
                "turns": [{name: value for name, value in turn.items() if name != "parts"} for turn in each],
            }
            for side, each in turns.items()
        },
        "ratios": {
            "our step / the reference's arithmetic": compare(seconds[OURS], seconds[REFERENCE]),
            "our arithmetic / the reference's": compare(*arithmetic),
            "ours with the default allocator / ours": compare(seconds[DEFAULT], seconds[OURS]),
            "ours with norm and activation not fused / ours": compare(seconds[UNFUSED], seconds[OURS]),
            "ours with torch's convolutions / ours": compare(seconds[DIRECT], seconds[OURS]),
            "ours with the stopwatch / ours": compare(seconds[SPLIT], seconds[OURS]),
        },
        "step": {
            "seconds": typical,
            "images_per_second": setting.recipe.global_batch_size / typical,
            "flops": flops,
            "multiplied": multiplied,
            "flops_per_second": flops / typical,
            "share_of_matrix_limit": {name: flops / typical / rate for name, rate in limits["flops"].items()},
            "multiplied_share_of_matrix_limit": {
                name: multiplied / typical / rate for name, rate in limits["flops"].items()
            },
            "least_seconds": sum(row["least_seconds"] for row in rows),
        },
        "allocation": {
            "default_adds_seconds": statistics.median(seconds[DEFAULT]) - typical,
            "default_adds_page_faults": faults[DEFAULT] - faults[OURS],
        },
        "split": {
            "round": number + 1,
            "seconds": taken["seconds"],
            "limit": dtype,
            "rows": rows,
            "convolutions": rows_of(layers, taken["seconds"], limits, dtype, ("layer", "phase")),
        },
    }


def typical_of(turns: Sequence[dict[str, Any]], name: str) -> float | None:
    """Return the median of a figure; None for a side that does not have it."""
    return statistics.median(turn[name] for turn in turns) if name in turns[0] else None


# --- the table ---


def figure(value: float | None, scale: float = 1.0, digits: int = 1) -> str:
    """Return a number as a cell; a dash for None and 0."""
    return f"{value * scale:,.{digits}f}" if value else "-"


def aligned(cells: Sequence[str]) -> list[str]:
    """Return the cells padded to the width of the longest."""
    return [cell.ljust(max(map(len, cells))) for cell in cells]


def split_table(rows: Sequence[dict[str, Any]], names: Sequence[str], seconds: float) -> str:
    """Return rows of the split as text, with their sum."""
    titles = aligned([*names, "sum"])
    blank = " " * len(titles[0])
    head = [
        (blank, "", "of the", "", "GFLOP", "of the matrix", "limit,", "MB at", "of the", "least"),
        (blank, "ms", "step %", "GFLOP", "multiplied", "limit, direct %", "multiplied %", "least", "bandwidth %", "ms"),
    ]
    total = {
        name: sum(row[name] for row in rows) for name in ("seconds", "flops", "multiplied", "bytes", "least_seconds")
    }
    cells = [
        (
            title,
            figure(row["seconds"], 1e3),
            figure(row["seconds"], 100 / seconds),
            figure(row["flops"], 1e-9),
            figure(row["multiplied"], 1e-9),
            figure(row.get("direct_share_of_matrix_limit"), 100),
            figure(row.get("share_of_matrix_limit"), 100),
            figure(row["bytes"], 1e-6),
            figure(row.get("share_of_bandwidth"), 100),
            figure(row["least_seconds"], 1e3),
        )
        for title, row in zip(titles, [*rows, total], strict=True)
    ]
    return table([*head, *cells], right=True)


def title_of(row: dict[str, Any]) -> str:
    """Return the title of a row of the split."""
    return ", ".join(word for word in (row.get("kind", row.get("layer")), row["phase"]) if word)


def text_of(report: dict[str, Any]) -> str:
    """Return the report as text."""
    limits, step, split = report["limits"], report["step"], report["split"]
    machine, ratios = report["environment"], report["ratios"]
    first = limits["measured"][0]
    products = {name: max(each["products"][name] for each in limits["measured"]) for name in limits["flops"]}
    flops = ", ".join(
        f"{name} {rate / 1e9:,.0f} GFLOP/s"
        + (f" (square products {products[name] / 1e9:,.0f})" if products[name] < rate else "")
        for name, rate in limits["flops"].items()
    )
    swept = " and ".join(
        f"{name} {max(each['bytes'][name] for each in limits['measured']) / 1e9:.1f} GB/s" for name in first["bytes"]
    )
    sides = [("", "s a step", "min", "max", "images/s", "page faults", "system s", "first loss")]
    for name, side in report["sides"].items():
        seconds = side["seconds"]
        cells = [f"{seconds[key]:.4f}" for key in ("median", "min", "max")]
        cells.append(f"{report['images'] / seconds['median']:,.0f}")
        cells += [figure(side["page_faults"], digits=0), figure(side["system_seconds"], digits=3)]
        sides.append((name, *cells, f"{side['first_loss']:.4f}"))
    names = aligned([row[0] for row in sides])
    compared = [("", "median", "min", "max", "n")]
    for name, ratio in ratios.items():
        compared.append((name, *(f"{ratio[key]:.3f}" for key in ("median", "min", "max")), str(ratio["n"])))
    ratio_names = aligned([row[0] for row in compared])
    share_of = ", ".join(
        f"{100 * step['share_of_matrix_limit'][name]:.1f} % of the matrix limit in {name} "
        f"({100 * step['multiplied_share_of_matrix_limit'][name]:.1f} % by real multiplications)"
        for name in limits["flops"]
    )
    more = 1e3 * report["allocation"]["default_adds_seconds"]
    array, cached = (first[name] / 1e6 for name in ("array_bytes", "last_level_cache_bytes"))
    notes = [
        f"the matrix limit is the best rate of square products of up to {PRODUCTS[-1]} rows and, on machines with AMX, "
        "of AMX on data that stays in registers; the bandwidth is the better of a copy (2 arrays) and a = b + 3 c (3 "
        f"arrays) over arrays of {array:,.0f} MB, beside a cache of {cached:,.0f} MB, and counts bytes read and bytes "
        "written, not the lines that a processor reads before it writes to them; both are measured before and after "
        "the steps, and the better counts",
        f"the step: {step['flops'] / 1e9:,.1f} GFLOP by the direct algorithm, {step['multiplied'] / 1e9:,.1f} really "
        f"multiplied, {step['flops_per_second'] / 1e9:,.0f} GFLOP/s direct: {share_of}; at both limits its parts would "
        f"take {step['least_seconds']:.3f} s",
        f"the split is that of round {split['round']}, whose time is the median; each moment counts for one part, so "
        f"they add up to the {1e3 * split['seconds']:,.1f} ms of that step; its limit is that of {split['limit']}; "
        "`direct` exceeds 100 % where Winograd's algorithm saves multiplications, or AMX leaves out taps outside an "
        "image",
        "convolutions include Winograd's transforms, AMX's packing, and the max-pool that both fuse; `pooling` is all "
        "other pooling; fused norms and activations are a kind of their own; in the backward pass, freeing a layer's "
        "activations and accumulating its gradients count for the layer; `autograd` is what comes before the first "
        "layer; `rest` is what no part claims",
        "MB at least: inputs, weights and outputs once; backward the output's gradient, inputs and weights, and the "
        "gradients of those that have one; optimiser: 5 times the trained weights; least ms: the longer of two times, "
        "the real multiplications at the matrix limit and these bytes at the bandwidth",
        f"allocation is not a part of its own but spread over all: without `keep_freed_memory` it takes {more:,.1f} ms "
        "more; page faults and system time of both are above; the first losses show that the sides began with the same "
        "weights and images, except the split, which continues from ours",
        "the reference's time begins with a finished batch, ours with the choices for one; the ratio is given both "
        f"ways, with our batch and without; {report['reference']}",
        "the learning rates are 0; averages (EMA, Lookahead) and each epoch's random draws are not in the step",
    ]
    return "\n".join(
        [
            f"A step of {report['recipe']['name']}: {report['images']:,} images, {machine['precision']}, "
            f"{machine['convolution']} convolution, norm and activation {'' if machine['fused_norm'] else 'not '}fused",
            f"{hardware(machine)}; torch {machine['torch']}; {report['data']}; {report['rounds']} rounds, "
            f"{report['steps']} step{'s' * (report['steps'] > 1)} a turn; commit {report['commit'][:12]}",
            "",
            f"matrix limit: {flops}",
            f"bandwidth: {limits['bandwidth'] / 1e9:.1f} GB/s ({swept})",
            "",
            table([(name, *row[1:]) for name, row in zip(names, sides, strict=True)], right=True),
            "",
            table([(name, *row[1:]) for name, row in zip(ratio_names, compared, strict=True)], right=True),
            "",
            split_table(split["rows"], [title_of(row) for row in split["rows"]], split["seconds"]),
            "",
            "the convolutions, layer by layer",
            split_table(split["convolutions"], [title_of(row) for row in split["convolutions"]], split["seconds"]),
            "",
            *(textwrap.fill(note, 118, initial_indent="- ", subsequent_indent="  ") for note in notes),
        ]
    )


# --- the caller ---


def measured_recipe(recipe: Recipe, batch: int | None) -> Recipe:
    """Return the recipe with `batch` images a step, all of full size, and without averages."""
    recipe = replace(recipe, resolutions=(), ema_decay=0.0, lookahead_alpha=0.0)
    if batch is None:
        return recipe
    if batch < 1:
        raise UserError(f"--batch {batch} must be at least 1")
    return with_batch_size(recipe, batch)


def describe_reference(setting: Setting) -> str:
    """Return in words what the reference computes differently from our step."""
    part = setting.reference_part or setting.recipe.global_batch_size
    how = "the whole batch at once" if part == setting.recipe.global_batch_size else f"{part} images at a time"
    group = setting.recipe.norm_group_size
    same = "the same groups as ours" if part == group else f"ours over groups of {group}"
    return (
        f"the reference takes {how}, with batch norm over as many ({same}); its optimisers are ours, which are stock "
        "ops"
    )


def measure(recipe: Recipe, options: argparse.Namespace) -> dict[str, Any]:
    """Measure limits, then the sides in turns, then the limits again."""
    threads, started = torch.get_num_threads(), datetime.now(UTC)
    with ExitStack() as stack:
        processes = {
            side: stack.enter_context(WatchedProcesses(1, device="cpu", backend="gloo", timeout=60.0))
            for side in SIDES[:-1]
        }
        (execution,) = processes[OURS].run(choose, recipe, threads)
        setting = Setting(recipe, options.data, N_IMAGES, threads, execution, options.reference_part)
        steps, turns = options.steps, {side: [] for side in SIDES}
        sides: dict[str, Callable[[], list[dict[str, Any]]]] = {
            side: lambda side=side: processes[side].run(take_turn, setting, side, steps) for side in processes
        }
        sides[SPLIT] = lambda: processes[OURS].run(split_turn, setting, steps)
        warm_up = {side: take()[0] for side, take in sides.items()}
        formats = list(dict.fromkeys((torch.float32, torch.bfloat16, setting.numerics.dtype)))
        limits = [measure_limits(formats)]
        for number in range(1, options.rounds + 1):
            for side, take in sides.items():
                turns[side] += take()
            times = ", ".join(f"{side} {turns[side][-1]['seconds']:.3f} s" for side in SIDES)
            print(f"round {number} of {options.rounds}: {times}", flush=True)
        limits.append(measure_limits(formats))
    part = options.reference_part or recipe.global_batch_size
    return {
        "commit": commit(),
        "started": started.isoformat(timespec="seconds"),
        "environment": environment(CPU) | execution.describe(),
        "recipe": recipe.to_dict(),
        "images": recipe.global_batch_size,
        "data": warm_up[OURS]["data"],
        "rounds": options.rounds,
        "steps": steps,
        "reference_part": part,
        "reference": describe_reference(setting),
        **summarise(setting, best_limits(limits), turns, warm_up),
    }


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """Return the options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help=f"folder for {RESULT} and {TABLE}")
    parser.add_argument("--recipe", default="laptop")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--steps", type=int, default=1, help="steps per turn; take more where a step is short")
    parser.add_argument("--batch", type=int, help="images a step, instead of the recipe's")
    parser.add_argument("--data", default=RANDOM, help=f"folder of CIFAR-10, {SYNTHETIC}, or {RANDOM} (default)")
    parser.add_argument(
        "--reference-part", type=int, default=0, help="images that the reference takes at a time; 0 (default): all"
    )
    return parser.parse_args(argv)


def checked(options: argparse.Namespace) -> Recipe:
    """Return the recipe that the options ask for; raise `UserError` for mistakes before time is spent."""
    recipe = measured_recipe(recipes.named(options.recipe), options.batch)
    for name in ("rounds", "steps"):
        if getattr(options, name) < 1:
            raise UserError(f"--{name} {getattr(options, name)} must be at least 1")
    part, batch = options.reference_part, recipe.global_batch_size
    if part < 0 or part and batch % part:
        raise UserError(f"--reference-part {part} must divide the batch of {batch} images, or be 0")
    try:
        options.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"the folder {options.out} cannot be made: {error.strerror}; choose another --out") from error
    return recipe


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print, write; return the exit status: 0, or 1 after a user's mistake."""
    options = parse(sys.argv[1:] if argv is None else argv)
    try:
        report = measure(checked(options), options)
        text = text_of(report)
        print("", text, sep="\n")
        try:
            write_json(options.out / RESULT, report)
            (options.out / TABLE).write_text(text + "\n")
        except OSError as error:
            raise UserError(
                f"nothing can be written to {options.out}: {error.strerror}; choose another --out"
            ) from error
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    import cpu_step  # other processes can import the tasks from this module, but not from `__main__`

    sys.exit(cpu_step.main())
