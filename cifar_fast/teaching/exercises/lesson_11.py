"""Checks the exercises of notebook 11: sharing images, a reduce-scatter, gradient accumulation."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DistributedSampler

from cifar_fast.teaching.exercises.checks import Wrong, exercise, expect_close


def _all_shares(order: list[int], world_size: int, rank: int) -> list[int]:
    return order[rank::world_size]  # of unequal lengths


@exercise(
    "11.1",
    title="A sampler that drops",
    difficulty=1,
    minutes=5,
    hints=(
        "How many images does each rank get, if all get the same number?",
        "Cut the order to world_size * (len(order) // world_size) images, then take every world_size-th one.",
    ),
    wrong=(_all_shares,),
)
def dropping(answer: Callable[[list[int], int, int], Any]) -> None:
    """Compare with torch's sampler, which drops if it is told to."""
    order = torch.randperm(23, generator=torch.Generator().manual_seed(5)).tolist()
    for n, world_size in ((20, 4), (23, 4), (22, 8)):
        given = order[:n]
        for rank in range(world_size):
            numbers: Any = range(n)  # the sampler asks a data set for its length alone
            theirs: Any = DistributedSampler(numbers, world_size, rank, shuffle=False, drop_last=True)
            wanted = [given[place] for place in theirs]
            found = answer(list(given), world_size, rank)
            expect_close(found, wanted, f"the share of rank {rank} of {world_size}, of {n} images,")


def _sum_everywhere(gradients: list[Tensor]) -> list[Tensor]:
    return [torch.stack(gradients).sum(0)] * len(gradients)  # that would be the whole all-reduce


@exercise(
    "11.2",
    title="Reduce-scatter",
    difficulty=2,
    minutes=10,
    hints=(
        "Worker r needs one piece from each gradient: its r-th.",
        "For each r, add up gradient.tensor_split(n)[r] over the gradients.",
    ),
    wrong=(_sum_everywhere,),
)
def reduce_scatter(answer: Callable[[list[Tensor]], Any]) -> None:
    """Compare with the pieces of the sum, also where they are of unequal size."""
    generator = torch.Generator().manual_seed(0)
    for n, size in ((2, 6), (4, 10)):
        gradients = [torch.randn(size, dtype=torch.float64, generator=generator) for _ in range(n)]
        wanted = torch.stack(gradients).sum(0).tensor_split(n)
        found = answer([gradient.clone() for gradient in gradients])
        if len(found) != n:
            raise Wrong(f"for {n} gradients there should be {n} pieces, not {len(found)}")
        for rank, (piece, sum_of_piece) in enumerate(zip(found, wanted, strict=True)):
            expect_close(piece, sum_of_piece, f"the piece of worker {rank} of {n}")


def _sum_of_means(model: nn.Module, images: Tensor, labels: Tensor, n_parts: int) -> None:
    for part, target in zip(images.chunk(n_parts), labels.chunk(n_parts), strict=True):
        F.cross_entropy(model(part), target).backward()


def _last_part(model: nn.Module, images: Tensor, labels: Tensor, n_parts: int) -> None:
    model.zero_grad()
    F.cross_entropy(model(images.chunk(n_parts)[-1]), labels.chunk(n_parts)[-1]).backward()


@exercise(
    "11.3",
    title="Gradient accumulation",
    difficulty=3,
    minutes=15,
    hints=(
        "`backward` adds to the gradients that are there already.",
        "The sum of the parts' mean losses is n_parts times the mean loss of the batch.",
        "For each part: (F.cross_entropy(model(part), target) / n_parts).backward().",
    ),
    wrong=(_sum_of_means, _last_part),
    returns_nothing=True,
)
def accumulate(answer: Callable[[nn.Module, Tensor, Tensor, int], Any]) -> None:
    """Compare with one backward pass over the whole batch, and check that no pass saw more than a part."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(12, 3, 4, 4, dtype=torch.float64, generator=generator)
    labels = torch.arange(12) % 10
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Flatten(), nn.Linear(48, 10)).double()
    F.cross_entropy(model(images), labels).backward()
    wanted = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    sizes: list[int] = []
    model.register_forward_pre_hook(lambda module, given: sizes.append(len(given[0])))
    for n_parts in (1, 3):
        model.zero_grad()
        sizes.clear()
        answer(model, images, labels, n_parts)
        for (name, p), gradient in zip(model.named_parameters(), wanted, strict=True):
            expect_close(
                torch.zeros_like(p) if p.grad is None else p.grad, gradient, f"with {n_parts} parts, {name}.grad"
            )
        if sizes != [12 // n_parts] * n_parts:
            raise Wrong(f"with {n_parts} parts the network should see {12 // n_parts} images at a time, not {sizes}")
