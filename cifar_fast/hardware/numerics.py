"""Which number format and which convolution algorithm are fastest on this machine."""

from __future__ import annotations

import json
import math
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from cifar_fast.errors import UserError
from cifar_fast.files import cache_folder, write_text
from cifar_fast.hardware.cuda_graph import no_triton
from cifar_fast.hardware.device import OTHER_GPUS, cpu_name
from cifar_fast.kernels import amx, fused, fused_gpu, winograd
from cifar_fast.recipe import Recipe

DTYPES = {"float64": torch.float64, "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
HALF = (torch.float16, torch.bfloat16)


class Way(NamedTuple):
    """A way to compute a convolution on a CPU, in a recipe's words."""

    precision: str
    convolution: str

    def __str__(self) -> str:
        return f"{self.precision} {self.convolution}"


WAYS = (Way("float32", "winograd"), Way("float32", "direct"), Way("bfloat16", "direct"), Way("bfloat16", "amx"))
"""All of them; of two that are about equally fast, the earlier one is taken."""

CLEARLY = 1.25
"""How many times as fast as an earlier one of `WAYS` a later one must be to be taken instead."""


@dataclass(frozen=True)
class Capabilities:
    """What a machine can compute with the package's kernels: plain values, which ranks send each other."""

    unavailable: Mapping[str, str]
    """The reason for each convolution algorithm that the machine cannot run."""
    fused_norm: bool
    """Whether it can compute a norm and the activation after it in one fused kernel."""


@dataclass(frozen=True)
class Numerics:
    """How a device computes the convolutions, and why, and whether it fuses each norm with its activation."""

    dtype: torch.dtype
    convolution: str
    reason: str
    fuse_norm: bool = False

    def describe(self) -> dict[str, Any]:
        """Return them as plain values, for results."""
        return {
            "precision": str(self.dtype).removeprefix("torch."),
            "convolution": self.convolution,
            "numerics_reason": self.reason,
            "fused_norm": self.fuse_norm,
        }

    def restricted_to(self, others: Sequence[Capabilities]) -> Numerics:
        """Return the same without what one of `others`, the ranks of a run, lacks: all ranks must compute alike."""
        numerics = self
        if any(self.convolution in rank.unavailable for rank in others):
            reason = f"not every rank can compute a {self.convolution} convolution: direct instead"
            numerics = replace(numerics, convolution="direct", reason=reason)
        return replace(numerics, fuse_norm=self.fuse_norm and all(rank.fused_norm for rank in others))


def capabilities() -> Capabilities:
    """Find out what this machine can compute; the first call in a process loads the kernels, compiled if need be."""
    found = {"winograd": winograd.available(), "amx": amx.available()}
    unavailable = {convolution: reason for convolution, (usable, reason) in found.items() if not usable}
    return Capabilities(unavailable, fused_norm=fused.available()[0])


def choose_numerics(recipe: Recipe, device: torch.device, rates: Mapping[Way, float] | None = None) -> Numerics:
    """Return how `device` computes the recipe: precision, convolution, and whether it fuses norm and activation.

    `rates` are those of this CPU, where they are known; None: they are measured if the choice depends on them.
    """
    numerics = choose_precision_and_convolution(recipe, device, rates)
    if not recipe.fuse_norm:
        return numerics
    if device.type == "cuda":
        return replace(numerics, fuse_norm=_fuses_on_a_gpu(recipe, device, numerics.dtype))
    on_a_cpu = device.type == "cpu" and numerics.dtype in fused.DTYPES
    return replace(numerics, fuse_norm=on_a_cpu and capabilities().fused_norm)


def _fuses_on_a_gpu(recipe: Recipe, device: torch.device, dtype: torch.dtype) -> bool:
    """Return whether the fused kernels run on this GPU; warn if Triton is here but they fail."""
    if no_triton() or not recipe.channels_last:  # the kernels read channels-last images only
        return False
    alpha = recipe.celu_alpha if recipe.activation == "celu" else 1.0
    why = fused_gpu.failure(device, dtype, recipe.activation, alpha, recipe.bn_eps)
    if why:
        warnings.warn(
            f"batch norm and activation are not fused, because Triton's kernels do not work on this GPU: {why}",
            stacklevel=6,
        )
    return not why


def choose_precision_and_convolution(
    recipe: Recipe, device: torch.device, rates: Mapping[Way, float] | None = None
) -> Numerics:
    """Return the recipe's precision and convolution on `device`; what it leaves to `auto` is measured on a CPU.

    A precision or a convolution that the device lacks is replaced by one that it has, and the reason says so.
    """
    if device.type in OTHER_GPUS:
        return _on_another_gpu(recipe.precision, device)
    if recipe.precision == "float64":
        return Numerics(torch.float64, "direct", "the recipe asks for it: everything, not only the convolutions")
    if device.type == "cuda":
        return _on_a_gpu(recipe.precision, device)
    if recipe.precision == "float16":
        return Numerics(torch.float32, "direct", "CPUs have no fast backward pass in float16: float32 instead")
    possible = _possible_ways(recipe.precision)
    wanted = [way for way in possible if recipe.convolution in ("auto", way.convolution)]
    if not wanted:
        return _direct_instead(recipe.convolution, possible)
    if len(wanted) == 1:
        return _numerics(wanted[0], "the only way that the recipe allows on this machine")
    return _fastest(wanted, rates or convolution_rates())


def _on_a_gpu(precision: str, device: torch.device) -> Numerics:
    lacks_bfloat16 = torch.cuda.get_device_capability(device) < (8, 0)
    if precision == "auto":
        why = "half precision on the GPU's tensor cores, with three bits more than bfloat16"
        return Numerics(torch.float16, "direct", why)
    if precision == "bfloat16" and lacks_bfloat16:
        why = "this GPU has no bfloat16 arithmetic (compute capability below 8.0): float16 instead"
        return Numerics(torch.float16, "direct", why)
    return Numerics(DTYPES[precision], "direct", "the recipe asks for it")


def _on_another_gpu(precision: str, device: torch.device) -> Numerics:
    """Return the numerics of a GPU that nobody has measured: half precision only where it proves itself first."""
    if precision == "float64":
        raise UserError(f"precision=float64: a device of type {device.type} has no float64; use --device cpu")
    if precision == "float32":
        return Numerics(torch.float32, "direct", "the recipe asks for it")
    # bfloat16 has the range of float32, but an Apple GPU may lack it.
    half = DTYPES[precision] if precision != "auto" else torch.float16 if device.type == "mps" else torch.bfloat16
    name = str(half).removeprefix("torch.")
    if not half_precision_is_right(device, half):
        return Numerics(torch.float32, "direct", f"a convolution in {name} is missing or wrong here: float32 instead")
    return Numerics(
        half, "direct", f"a convolution in {name} agrees with the CPU's in float32; its speed is unmeasured"
    )


def half_precision_is_right(device: torch.device, dtype: torch.dtype) -> bool:
    """Say whether a small convolution in `dtype` on `device`, forward and backward, agrees with the CPU's in float32.

    Also False where the device cannot compute it at all.
    """
    random = torch.Generator().manual_seed(0)
    x, weight, dy = (torch.randn(shape, generator=random) for shape in ((8, 16, 8, 8), (16, 16, 3, 3), (8, 16, 8, 8)))

    def computed(on: torch.device, half: torch.dtype | None) -> list[Tensor]:
        inputs, filters = (value.to(on).requires_grad_() for value in (x, weight))
        with torch.autocast(on.type, half, enabled=half is not None):
            y = F.conv2d(inputs, filters, padding=1)
        gradients = torch.autograd.grad(y, (inputs, filters), dy.to(on, y.dtype))
        return [value.detach().cpu().float() for value in (y, *gradients)]

    expected = computed(torch.device("cpu"), None)
    try:
        found = computed(device, dtype)
    except (RuntimeError, TypeError):  # NotImplementedError, of an operator that is not there, is a RuntimeError
        return False
    return all((one - other).norm() <= 0.02 * other.norm() for one, other in zip(found, expected, strict=True))


def _possible_ways(precision: str = "auto") -> list[Way]:
    """Return the ways that this CPU can compute with that precision."""
    unavailable = capabilities().unavailable
    return [way for way in WAYS if precision in ("auto", way.precision) and way.convolution not in unavailable]


def _direct_instead(convolution: str, possible: Sequence[Way]) -> Numerics:
    """Replace a convolution that the machine lacks, or that does not exist in the recipe's precision."""
    formats = " and ".join(way.precision for way in WAYS if way.convolution == convolution)
    detail = capabilities().unavailable.get(convolution, f"it exists only in {formats}")
    direct = next(way for way in possible if way.convolution == "direct")
    return _numerics(direct, f"no {convolution} convolution here: {detail}; direct instead")


def _fastest(wanted: Sequence[Way], rates: Mapping[Way, float]) -> Numerics:
    best, *others = [way for way in wanted if way in rates]
    for way in others:
        # Only a clear win counts: the same machine must choose the same way each time, however noisy its clock.
        if rates[way] > CLEARLY * rates[best]:
            best = way
    measured = ", ".join(f"{way} {rate:.0f}" for way, rate in rates.items())
    return _numerics(best, f"measured on this CPU, in GFLOP/s of direct convolution: {measured}")


def _numerics(way: Way, reason: str) -> Numerics:
    return Numerics(DTYPES[way.precision], way.convolution, reason)


TIMED_IMAGES = 128
"""Images in the convolution whose timing decides."""

FIRST_IMAGES = 8
"""Images in the convolution that rules out what is far too slow."""


def needs_measuring(recipe: Recipe, device: torch.device) -> bool:
    """Say whether `choose_numerics` would measure, and no earlier measurement of this machine is saved."""
    if device.type != "cpu" or recipe.precision in ("float64", "float16"):
        return False
    ways = [way for way in _possible_ways(recipe.precision) if recipe.convolution in ("auto", way.convolution)]
    return len(ways) > 1 and saved_rates() is None


def saved_rates() -> dict[Way, float] | None:
    """Return what `convolution_rates` last measured on this machine; None if it never did, or something has changed."""
    with suppress(OSError, ValueError, KeyError):
        saved = json.loads(_rates_file().read_text())
        if saved["machine"] == _machine():
            return {way: saved["rates"][str(way)] for way in _possible_ways()}
    return None


def _rates_file() -> Path:
    return cache_folder() / "convolution_rates.json"


def _machine() -> list[str | int]:
    """Return what the rates depend on."""
    kernels = [Path(detail).name for usable, detail in (winograd.available(), amx.available()) if usable]
    return [cpu_name(), torch.__version__, torch.get_num_threads(), *kernels]


@cache
def convolution_rates(n: int = TIMED_IMAGES) -> dict[Way, float]:
    """Measure the GFLOP/s of one typical convolution of `n` images on this CPU, forward and backward, each way.

    It takes about two seconds; the cache folder keeps the result for `doctor`, never for training.
    Winograd's rate counts the multiplications of the direct algorithm, so that rates compare as speeds do. The ways
    take turns and the best time of each counts, so that another process slows all of them down alike. Two turns on few
    images come first, and a way that `_not_far_too_slow` rules out keeps the rate of these.
    """
    channels, side = 256, 7  # as in the layers with most of the arithmetic
    weight = torch.randn(channels, channels, 3, 3).contiguous(memory_format=torch.channels_last)
    functions: dict[str, Callable[..., Tensor]] = {
        "winograd": winograd.winograd_conv2d,
        "amx": amx.amx_conv2d,
        "direct": partial(F.conv2d, padding=1),
    }
    rates: dict[Way, float] = {}
    ways = _possible_ways()
    for n_images, turns in ((min(n, FIRST_IMAGES), 2), (n, 4)):
        x, dy = (
            torch.randn(n_images, channels, side, side).contiguous(memory_format=torch.channels_last) for _ in range(2)
        )
        best = dict.fromkeys(ways, math.inf)
        for _ in range(turns):
            for way in ways:
                inputs, filters, gradient = (value.to(DTYPES[way.precision]) for value in (x, weight, dy))
                start = time.perf_counter()
                y = functions[way.convolution](inputs.requires_grad_(), filters.requires_grad_())
                torch.autograd.grad(y, (inputs, filters), gradient)
                best[way] = min(best[way], time.perf_counter() - start)
        flops = 3 * 2 * n_images * channels**2 * 9 * side**2
        rates |= {way: flops / seconds / 1e9 for way, seconds in best.items()}
        ways = _not_far_too_slow(best, n / n_images)
    if n == TIMED_IMAGES:
        with suppress(OSError):  # a cache folder that cannot be written costs `doctor` an answer, and training nothing
            cache_folder().mkdir(parents=True, exist_ok=True)
            saved = {"machine": _machine(), "rates": {str(way): rate for way, rate in rates.items()}}
            write_text(_rates_file(), json.dumps(saved))
    return rates


def _not_far_too_slow(seconds: Mapping[Way, float], times_the_images: float) -> list[Way]:
    """Return the ways worth timing on `times_the_images` as many images as those that took `seconds`.

    Being slow on few images is not enough to rule a way out: Winograd's algorithm transforms the filters once, however
    many images follow. It must also take long, as bfloat16 does on a processor without instructions for it.
    """
    fastest = min(seconds.values())
    return [way for way, took in seconds.items() if took < 4 * fastest or took * times_the_images < 1]
