"""Tasks that the tests run in other processes, which can only import them from a module."""

from __future__ import annotations

import os
import signal
import sys
import time
import warnings
from dataclasses import replace
from typing import Any
from unittest.mock import patch

import torch
from torch import nn

from cifar_fast import recipes
from cifar_fast.distributed.ranks import Ranks
from cifar_fast.errors import RecipeError, UserError


def add_ranks(ranks: Ranks) -> tuple[int, int, float, int]:
    total = ranks.sum(torch.tensor(float(ranks.rank))).item()
    return ranks.rank, ranks.agree(ranks.rank + 7), total, torch.get_num_threads()


def gather(ranks: Ranks) -> list[Any]:
    """Gather values of different sizes and types: a number, a long text, nothing."""
    values = {0: 7, 1: "long " * 1000, 2: None}
    return ranks.gather(values.get(ranks.rank, {"rank": ranks.rank}))


def agree_on_execution(ranks: Ranks, different: str) -> str:
    """Agree where the last rank was started with `different` settings; return the error's text or the convolution."""
    from cifar_fast.data.synthetic import synthetic
    from cifar_fast.training.setup import agree_on_execution

    mine = different if ranks.rank == ranks.world_size - 1 else ""
    recipe = replace(recipes.smoke(), precision="float32", convolution="direct")
    try:
        execution = agree_on_execution(
            replace(recipe, epochs=recipe.epochs + 1) if mine == "recipe" else recipe,
            synthetic(80, 20, seed=5 if mine == "data set" else 0),
            5 if mine == "seed" else 0,
            ranks.device,
            ranks,
        )
    except UserError as error:
        return str(error)
    return execution.numerics.convolution


def agree_with_a_rank_without_kernels(ranks: Ranks) -> tuple[str, bool]:
    """Let rank 0 choose Winograd's convolution and fused norms, which the last rank lacks; return what is agreed on."""
    from cifar_fast.data.synthetic import synthetic
    from cifar_fast.hardware.numerics import Numerics
    from cifar_fast.kernels import fused, winograd
    from cifar_fast.training import setup

    chosen = setup.Execution(Numerics(torch.float32, "winograd", reason="fastest here", fuse_norm=True))
    available = (True, "") if ranks.rank < ranks.world_size - 1 else (False, "there is no compiler")
    with (
        patch.object(winograd, "available", lambda: available),
        patch.object(fused, "available", lambda: available),
        patch.object(setup, "choose_execution", lambda *_: chosen),
    ):
        numerics = setup.agree_on_execution(recipes.smoke(), synthetic(80, 20), 0, ranks.device, ranks).numerics
    return numerics.convolution, numerics.fuse_norm


def report_twice(ranks: Ranks, word: str) -> str:
    ranks.report(f"{word} {ranks.rank}")
    ranks.report(f"{word} again {ranks.rank}")
    return word


def warn(ranks: Ranks) -> None:
    warnings.warn(f"a warning of rank {ranks.rank}", stacklevel=1)


def fail(ranks: Ranks, how: str, culprit: int) -> None:
    """Work together for a few steps, then let the rank `culprit` fail while the others wait for it."""
    for _ in range(5):
        ranks.barrier()
        ranks.tick()
    if how == "sleep at the end" and ranks.rank != culprit:
        return
    if ranks.rank == culprit:
        _fail(how)
    while True:
        ranks.barrier()


def take_turns_being_slow(ranks: Ranks, fast: float, slow: float) -> str:
    """Let one rank take a step that is longer than the timeout, but not much longer than the steps before."""
    for seconds in (fast, fast, slow):
        time.sleep(seconds if ranks.rank == 0 else fast)
        ranks.barrier()
        ranks.tick()
    return "done"


def _fail(how: str) -> None:
    if how == "raise":
        raise ZeroDivisionError("thrown on purpose")
    if how == "raise for people":
        raise RecipeError("a mistake to mend")
    if how == "raise what cannot travel":
        raise Stubborn(lambda: None)
    if how == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if how == "stop":
        os.kill(os.getpid(), signal.SIGSTOP)
    if how.startswith("sleep"):
        time.sleep(1000)
    if how == "spin":
        while True:
            pass
    if how == "exit 0":
        os._exit(0)
    if how == "sys.exit":
        sys.exit(0)
    if how == "memory":
        import resource  # Windows has none

        resource.setrlimit(resource.RLIMIT_AS, (4 << 30, 4 << 30))
        torch.ones(8 << 30)


class Stubborn(Exception):
    """An exception that pickle cannot carry."""


def average(ranks: Ranks, half_precision: bool, scale: float) -> list[Any]:
    """Average gradients of this rank's own in two memory layouts, one parameter without any; return them."""
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Linear(5, 2), nn.Linear(1, 1)).to(memory_format=torch.channels_last)
    for p in list(model.parameters())[:-1]:
        p.grad = torch.empty_like(p).copy_(gradient(p.shape, ranks.rank))
    ranks.average_gradients(model, half_precision=half_precision, scale=scale)
    return [None if p.grad is None else p.grad.tolist() for p in model.parameters()]


def average_in_one_buffer(ranks: Ranks, half_precision: bool, scale: float) -> bool:
    """Return whether gradients that are views of one buffer get the same means as separate ones."""
    from cifar_fast.training.gradients import flat_gradients

    means = []
    for in_one in (False, True):
        model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Linear(5, 2)).to(memory_format=torch.channels_last)
        flat = flat_gradients(model) if in_one else None
        for p in model.parameters():
            value = gradient(p.shape, ranks.rank)
            p.grad = torch.empty_like(p).copy_(value) if p.grad is None else p.grad.copy_(value)
        if flat is None:
            ranks.average_gradients(model, half_precision=half_precision, scale=scale)
        else:
            ranks.average_buffer(flat, half_precision=half_precision, scale=scale)
        means.append([p.grad for p in model.parameters()])
        if flat is not None:
            places = {p.grad.untyped_storage().data_ptr() for p in model.parameters() if p.grad is not None}
            assert places == {flat.untyped_storage().data_ptr()}
    # In a longer buffer the ranks' numbers may be added in another order.
    atol = 2e-10 if half_precision else 1e-15
    return all(torch.allclose(a, b, rtol=1e-5, atol=atol) and a.any() for a, b in zip(*means, strict=True))


def gradient(shape: torch.Size, rank: int) -> torch.Tensor:
    """Return numbers too small for float16 unless they are scaled."""
    random = torch.Generator().manual_seed(100 * len(shape) + rank)
    return 1e-8 * torch.randn(shape, generator=random)


def average_statistics(ranks: Ranks) -> tuple[list[float], list[float]]:
    from cifar_fast.training.layers import GhostBatchNorm

    norm = GhostBatchNorm(2, 4, eps=1e-5, momentum=0.1, freeze_scale=False)
    assert norm.running_mean is not None and norm.running_var is not None
    norm.running_mean.fill_(ranks.rank)
    norm.running_var.fill_(10.0 * ranks.rank)
    ranks.average_statistics(norm)
    return norm.running_mean.tolist(), norm.running_var.tolist()


def copy_from_main(ranks: Ranks) -> list[float]:
    layer = nn.Conv2d(2, 3, 3).to(memory_format=torch.channels_last)
    nn.init.constant_(layer.weight, float(ranks.rank + 1))
    ranks.copy_from_main(layer)
    return layer.weight.flatten().tolist()


def print_rank(ranks: Ranks) -> None:
    print(f"printed by rank {ranks.rank}")
