"""Exercises of notebook 03: what a format cannot count, the best loss scale, stochastic rounding."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from cifar_fast.teaching.exercises.checks import Wrong, exercise, expect_close


def _last_without_a_gap(dtype: torch.dtype) -> int:
    return round(2 / torch.finfo(dtype).eps)


def _largest(dtype: torch.dtype) -> float:
    return torch.finfo(dtype).max


@exercise(
    "03.1",
    title="The number that is missing",
    difficulty=1,
    minutes=5,
    hints=(
        "Convert whole numbers to dtype and back to float64, and look for the first that changes.",
        "float32 has all whole numbers far beyond a million, so a search one by one is slow. Where must the gap begin?",
        "With p significant bits all numbers up to 2**p exist; the next one does not. finfo(dtype).eps is 2**(1 - p).",
    ),
    wrong=(_last_without_a_gap, _largest),
)
def first_missing(answer: Callable[[torch.dtype], int]) -> None:
    """Compare with what the number of significant bits says."""
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        expect_close(
            answer(dtype), _last_without_a_gap(dtype) + 1, f"the first number that {dtype} lacks", rtol=0, atol=0
        )


def _best_scale(gradients: list[Tensor]) -> float:
    scale = 2.0**100
    while any((gradient.double() * scale).half().isinf().any() for gradient in gradients):
        scale /= 2
    return scale


def _of_the_first(gradients: list[Tensor]) -> float:
    return _best_scale(gradients[:1])


def _no_power_of_two(gradients: list[Tensor]) -> float:
    return 65504 / max(gradient.abs().max().item() for gradient in gradients)


def _forgets_the_sign(gradients: list[Tensor]) -> float:
    return _best_scale([gradient.clamp(min=1e-6) for gradient in gradients])


@exercise(
    "03.2",
    title="The best loss scale",
    difficulty=2,
    minutes=10,
    hints=(
        "Only the largest gradient counts, over all tensors and whatever its sign.",
        "torch.finfo(torch.float16).max is the largest finite number. By how much may the largest gradient grow?",
        "Take the quotient of the two, and round it down to a power of two: 2.0 ** math.floor(math.log2(quotient)).",
    ),
    wrong=(_of_the_first, _no_power_of_two, _forgets_the_sign),
)
def best_scale(answer: Callable[[list[Tensor]], float]) -> None:
    """Compare with a search by halving, for gradients of several sizes, some of them negative."""
    random = torch.Generator().manual_seed(0)
    for size in (1e-6, 3e-3, 1.0, 700.0):
        gradients = [size * torch.randn(50, 40, generator=random), torch.zeros(10), -3 * size * torch.rand(300)]
        gradients[2][7] = -6 * size  # the largest, and negative
        found = answer([gradient.clone() for gradient in gradients])
        expect_close(
            float(found), _best_scale(gradients), f"the scale for gradients up to {6 * size:g}", rtol=0, atol=0
        )


def _to_nearest(x: Tensor, generator: torch.Generator) -> Tensor:
    return x.bfloat16().float()


def _always_down(x: Tensor, generator: torch.Generator) -> Tensor:
    return (x.view(torch.int32) & -(1 << 16)).view(torch.float32)


def _coin(x: Tensor, generator: torch.Generator) -> Tensor:
    down = _always_down(x, generator)
    up = ((x.view(torch.int32) + 0xFFFF) & -(1 << 16)).view(torch.float32)
    return torch.where(torch.rand(x.shape, generator=generator) < 0.5, up, down)


def _not_rounded(x: Tensor, generator: torch.Generator) -> Tensor:
    return x + 1e-3 * (torch.rand(x.shape, generator=generator) - 0.5)


@exercise(
    "03.3",
    title="Stochastic rounding",
    difficulty=3,
    minutes=15,
    hints=(
        "Look at round_fraction: it adds half of the last bit that stays, and cuts. What if it adds something random?",
        "The 16 bits that are cut say how far a number lies above the lower neighbour, in parts of 65536.",
        "Add torch.randint(0, 1 << 16, x.shape, generator=generator, dtype=torch.int32) to the raw bits, then cut.",
    ),
    wrong=(_to_nearest, _always_down, _coin, _not_rounded),
)
def round_stochastically(answer: Callable[[Tensor, torch.Generator], Tensor]) -> None:
    """Check that results are neighbours in bfloat16, that they are right on average, and that the generator decides."""
    random = torch.Generator().manual_seed(0)
    for value in (1.001, -0.3, 7e-5, 1.0):
        x = torch.full((100_000,), value)
        found = answer(x.clone(), random)
        if not isinstance(found, Tensor) or found.shape != x.shape or found.dtype != torch.float32:
            raise Wrong(f"the result should be a float32 tensor of shape {tuple(x.shape)}")
        if not torch.equal(found.bfloat16().float(), found):
            raise Wrong(f"for {value:g} there are results that bfloat16 does not have, such as {found[0].item():.9g}")
        gap = abs(_always_down(x[:1], random).item()) * 2**-7
        if (found - x).abs().max() > gap:
            raise Wrong(f"for {value:g} there are results further away than its two neighbours in bfloat16")
        mean = found.double().mean().item()
        if abs(mean - x[0].item()) > 0.02 * gap:
            raise Wrong(f"{value:g} is rounded to {mean:.6g} on average; it should stay {value:g}")
    x = torch.randn(1000, generator=random)
    first, again = (answer(x, torch.Generator().manual_seed(1)) for _ in range(2))
    if not torch.equal(first, again):
        raise Wrong("the same generator should give the same result: pass it on to the call that draws")
