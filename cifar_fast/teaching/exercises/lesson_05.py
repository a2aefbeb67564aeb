"""The exercises of notebook 05, activations and the place of max-pool."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from cifar_fast.teaching.exercises.checks import Wrong, exercise, expect_close


def _all_of_it(position: str, channels: int, side: int) -> int:
    return 2 * channels * side * side


@exercise(
    "05.1",
    title="Numbers that norm and activation read",
    difficulty=1,
    minutes=5,
    hints=(
        "The convolution gives channels * side * side numbers. After max-pool a quarter of them is left.",
        "Norm and activation each read what comes in. One of the three positions puts max-pool between them.",
        "A max-pool by 2 drops the last row and column of an odd side: use side // 2.",
    ),
    wrong=(_all_of_it, lambda position, channels, side: channels * side**2 // 2),
)
def numbers_read(answer: Callable[[str, int, int], int]) -> None:
    """How many numbers the norm and the activation of a block read together, for one image."""
    for channels, side in ((64, 32), (24, 31)):
        full, pooled = channels * side**2, channels * (side // 2) ** 2
        wanted = {"after_activation": 2 * full, "before_activation": full + pooled, "before_norm": 2 * pooled}
        for position, count in wanted.items():
            found = answer(position, channels, side)
            expect_close(found, count, f"the count for {position!r}, {channels} channels and a side of {side}")


@exercise(
    "05.2",
    title="Activations that commute with max-pool",
    difficulty=2,
    minutes=10,
    hints=(
        "Which property of the curve decided it in the lesson? You can see it on a fine grid of inputs.",
        "Evaluate f on torch.linspace(-10, 10, 10_001) and look at the differences between neighbours (Tensor.diff).",
        "f commutes if no difference is negative. Allow for rounding: compare with -1e-6, not with 0.",
    ),
    wrong=(
        lambda f: True,
        lambda f: bool(f(torch.tensor([-1.0, 1.0])).diff() >= 0),
        lambda f: bool((f(torch.linspace(-10, 10, 10_001)).diff() > 0).all()),
    ),
)
def commutes_with_max_pool(answer: Callable[[Callable[[Tensor], Tensor]], bool]) -> None:
    """Whether a curve never falls."""
    curves: dict[str, tuple[Callable[[Tensor], Tensor], bool]] = {
        "relu": (F.relu, True),
        "silu": (F.silu, False),
        "celu": (F.celu, True),
        "gelu": (F.gelu, False),
        "tanh": (torch.tanh, True),
        "torch.neg": (torch.neg, False),
        "hardswish": (F.hardswish, False),
        "hardtanh": (F.hardtanh, True),
    }
    for name, (f, wanted) in curves.items():
        found = answer(f)
        if bool(found) != wanted:
            raise Wrong(
                f"{name} {'commutes' if wanted else 'does not commute'} with max-pool, but you returned {found}"
            )


@exercise(
    "05.3",
    title="A SiLU that never falls",
    difficulty=2,
    minutes=15,
    hints=(
        "SiLU falls until its lowest point and then rises. What if it kept that lowest value on the left?",
        "The lowest point is the position of F.silu(x).argmin() on a fine grid of x, at about -1.28.",
        "Clamp the input from below before you apply SiLU: F.silu(x.clamp(min=lowest)).",
    ),
    wrong=(F.silu, F.relu, lambda x: F.silu(x.clamp(min=-1.0))),
)
def rising_silu(answer: Callable[[Tensor], Tensor]) -> None:
    """SiLU right of its lowest point, and constant left of it."""
    x = torch.linspace(-8, 8, 16_001)
    y = answer(x)
    lowest = x[F.silu(x).argmin()]
    expect_close(y, F.silu(x.clamp(min=lowest)), "the curve from -8 to 8", rtol=0.0, atol=1e-3)
    if (y.diff() < -1e-6).any():
        place = x[:-1][y.diff() < -1e-6][0].item()
        raise Wrong(f"the curve should never fall, but it falls at x = {place:.3f}")
    maps = 2 * torch.randn(8, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    what = "the activation of the maximum"
    expect_close(answer(F.max_pool2d(maps, 2)), F.max_pool2d(answer(maps), 2), what, rtol=0.0, atol=1e-5)
