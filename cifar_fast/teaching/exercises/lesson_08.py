"""Checks the exercises of notebook 08: patch whitening."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from cifar_fast.teaching.exercises.checks import Wrong, exercise, expect_close
from cifar_fast.training.layers import patch_covariance


@exercise(
    "08.1",
    title="Directions needed",
    difficulty=1,
    minutes=5,
    hints=(
        "The first k directions hold the share variances[:k].sum() / variances.sum().",
        "`cumsum` gives that share for every k at once. Count how many lie below `share`, and add one.",
    ),
    wrong=(lambda variances, share: int((variances.cumsum(0) / variances.sum() < share).sum()),),
)
def directions_needed(answer: Callable[[Tensor, float], int]) -> None:
    """Check with variances whose sums are easy to follow."""
    variances = torch.tensor([8.0, 4.0, 2.0, 1.0, 1.0])
    for share, wanted in ((0.4, 1), (0.5, 1), (0.6, 2), (0.75, 2), (0.8, 3), (1.0, 5)):
        expect_close(answer(variances, share), wanted, f"the number for a share of {share:g} of {variances.tolist()}")


@exercise(
    "08.2",
    title="ZCA whitening",
    difficulty=2,
    minutes=10,
    hints=(
        "Start as `whitening_filters` does: patches, covariance, `torch.linalg.eigh`. Its eigenvectors are U.",
        "W = (U / torch.sqrt(variances + eps)) @ U.T is symmetric, and each of its rows is a filter.",
        "Fold the rows with `W.reshape(-1, 3, size, size)`. No `flip` is needed: row i belongs to pixel i.",
    ),
)
def zca_filters(answer: Callable[[Tensor, int, float], Tensor]) -> None:
    """Check the shape, the whitened covariance and the symmetry, then the values, on smooth noise."""
    noise = torch.randn(20, 3, 16, 16, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    images = F.avg_pool2d(noise, 3, stride=1, padding=1) + 0.2 * noise  # neighbours are correlated, as in a photograph
    for size, eps in ((2, 0.0), (3, 1e-2)):
        covariance = patch_covariance(images, size)
        variances, directions = torch.linalg.eigh(covariance)
        wanted = (directions / torch.sqrt(variances + eps)) @ directions.T
        found = answer(images, size, eps)
        if not isinstance(found, Tensor) or found.shape != (3 * size**2, 3, size, size):
            got = tuple(found.shape) if isinstance(found, Tensor) else type(found).__name__
            raise Wrong(f"for size {size} the filters should have the shape {(3 * size**2, 3, size, size)}, not {got}")
        matrix = found.double().flatten(1)
        spread = torch.linalg.eigvalsh(matrix @ covariance @ matrix.T)
        expect_close(
            spread, variances / (variances + eps), "the variances of the outputs, sorted", rtol=1e-4, atol=1e-5
        )
        expect_close(matrix, matrix.T, "a ZCA matrix equals its transpose: it", rtol=1e-4, atol=1e-5)
        expect_close(matrix, wanted, f"the filters for size {size}, eps {eps:g}", rtol=1e-4, atol=1e-5)


@exercise(
    "08.3",
    title="A start that shifts",
    difficulty=2,
    minutes=10,
    hints=(
        "`dirac_` sets one weight of each filter to 1, the centre of the 3 x 3 window. Which neighbour do you want?",
        "The output at x takes the input at x - 1, the left neighbour: row 1, column 0 of the window.",
        "Under `@torch.no_grad()`, for each c below min(K, C): weight[c] = 0, then weight[c, c, 1, 0] = 1.",
    ),
    wrong=(torch.nn.init.dirac_,),
    returns_nothing=True,
)
def shift_right(answer: Callable[[Tensor], None]) -> None:
    """Check what a convolution with these filters gives, and that the other filters are as they were."""
    generator = torch.Generator().manual_seed(0)
    for n_in, n_out in ((2, 5), (3, 3), (4, 2)):
        before = torch.randn(n_out, n_in, 3, 3, generator=generator)
        weight = torch.nn.Parameter(before.clone())
        answer(weight)
        x, n = torch.randn(1, n_in, 5, 6, generator=generator), min(n_in, n_out)
        moved = F.pad(x, (1, 0))[..., :-1]
        found = F.conv2d(x, weight, padding=1)
        kind = f"of {n_in} -> {n_out} channels"
        expect_close(found[:, :n], moved[:, :n], f"the first {n} outputs {kind}")
        expect_close(weight[n:], before[n:], f"the other filters {kind}")
