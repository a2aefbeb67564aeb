"""Measures one machine's parallel step: two processes against one, and one flat all-reduce against DDP.

    python benchmarks/parallel_step.py --out benchmarks/results/parallel_step.json

Each comparison takes its sides in turns, in the same run, and reports the ratio of their medians and the ratio round
by round, so that what else the machine does disturbs both alike. Random images; nothing is trained to any accuracy.
"""

import argparse
import json
import statistics
import time
from dataclasses import replace
from functools import cache
from pathlib import Path

import torch
from revision import commit
from torch.nn.parallel import DistributedDataParallel

from cifar_fast import recipes
from cifar_fast.distributed.processes import WatchedProcesses
from cifar_fast.distributed.ranks import ALONE, Ranks
from cifar_fast.hardware.clock import synchronize
from cifar_fast.hardware.device import environment, keep_freed_memory, select_device
from cifar_fast.hardware.numerics import HALF, Numerics, choose_numerics
from cifar_fast.recipe import Recipe
from cifar_fast.training.batches import TrainBatches, pixel_statistics
from cifar_fast.training.model import build_model, whiten_first_layer
from cifar_fast.training.optim import build_optimizers, lr_schedule, set_learning_rates
from cifar_fast.training.step import forward_backward

N_IMAGES = 8192


@cache
def prepare(recipe: Recipe, rank: int, world_size: int, device: torch.device, numerics: Numerics, ddp: bool) -> tuple:
    """Return network, batches and optimisers of one rank; made once and kept over the rounds."""
    random = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (N_IMAGES, 3, 32, 32), dtype=torch.uint8, generator=random)
    labels = torch.randint(0, 10, (N_IMAGES,), generator=random)
    mean, std = pixel_statistics(images)
    model = build_model(recipe, 10, mean, std, convolution=numerics.convolution, fuse_norm=numerics.fuse_norm)
    model = model.to(device, memory_format=torch.channels_last)
    whiten_first_layer(model, recipe, images[:1000].to(device))
    batches = TrainBatches(images, labels, recipe, device=device, mean=mean, std=std, rank=rank, world_size=world_size)
    optimizers = build_optimizers(model, recipe)
    if ddp:
        model = DistributedDataParallel(model, gradient_as_bucket_view=True, broadcast_buffers=False)
    return model, batches, optimizers


def time_steps(ranks: Ranks, recipe: Recipe, n_steps: int, way: str) -> float:
    """Return the seconds of `n_steps` training steps, augmentation included, `way` being `flat` or `ddp`."""
    keep_freed_memory()
    device = ranks.device
    numerics = ranks.agree(choose_numerics(recipe, device) if ranks.is_main else None)
    assert numerics is not None
    kept = prepare(recipe, ranks.rank, ranks.world_size, device, numerics, way == "ddp")
    model, batches, optimizers = kept
    schedule = lr_schedule(recipe)
    stream = batches.epoch(0)
    ranks.barrier()
    start = time.perf_counter()
    for step in range(n_steps):
        images, labels = next(stream)
        forward_backward(model, images, labels, recipe, numerics.dtype)
        if way == "flat":
            ranks.average_gradients(model, half_precision=numerics.dtype in HALF, scale=len(images))
        set_learning_rates(optimizers, schedule, step / batches.steps_per_epoch)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=way == "flat")
        ranks.tick()
    synchronize(device)
    return time.perf_counter() - start


def compare(sides: dict, rounds: int) -> dict:
    """Call the two `sides` in turns and return their seconds, after a round that does not count."""
    names = list(sides)
    for side in sides.values():
        side()
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for _ in range(rounds):
        for name, side in sides.items():
            seconds[name].append(side())
    first, second = (seconds[name] for name in names)
    ratios = [b / a for a, b in zip(first, second, strict=True)]
    return {
        "seconds": seconds,
        f"{names[1]} / {names[0]}, ratio of medians": statistics.median(second) / statistics.median(first),
        f"{names[1]} / {names[0]}, round by round": [min(ratios), statistics.median(ratios), max(ratios)],
    }


def main() -> None:
    """Compare, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--world-size", type=int, default=2)
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    from parallel_step import time_steps as task  # as other processes import it, not from `__main__`

    device, n = select_device(), arguments.world_size
    laptop = recipes.laptop()
    # Shards that the processes can share, in batch-norm groups that divide them; the same recipe on both sides.
    group = laptop.global_batch_size // n // 2
    shared = replace(laptop, n_shards=n, ghost_batch_size=group, micro_batch_size=group)
    whole = replace(shared, micro_batch_size=0)  # DDP reduces in each backward pass, so there must be one a step
    backend = "nccl" if device.type == "cuda" else "gloo"
    steps, rounds = arguments.steps, arguments.rounds
    images = steps * laptop.global_batch_size
    report: dict = {
        "commit": commit(),
        "environment": environment(device),
        "world_size": n,
        "images a round": images,
    }
    with WatchedProcesses(n, device=device.type, backend=backend, timeout=60.0) as processes:
        alone = {"one process": lambda: time_steps(ALONE, shared, steps, "flat")}
        together = {f"{n} processes": lambda: max(processes.run(task, shared, steps, "flat"))}
        report["processes"] = compare(alone | together, rounds)
        flat = {"flat": lambda: max(processes.run(task, whole, steps, "flat"))}
        ddp = {"ddp": lambda: max(processes.run(task, whole, steps, "ddp"))}
        report["averaging"] = compare(flat | ddp, rounds)
    for name, seconds in report["processes"]["seconds"].items():
        report["processes"][f"{name}, images/s"] = images / statistics.median(seconds)
    text = json.dumps(report, indent=2)
    print(text)
    if arguments.out:
        arguments.out.write_text(text + "\n")


if __name__ == "__main__":
    main()
