"""Measures the parallel step on one machine: two processes against one, and one flat all-reduce against DDP.

    python benchmarks/parallel_step.py --out benchmarks/results/parallel_step.json

The sides of each comparison take turns in the same run, so that other work on the machine disturbs both alike. The
report has the ratio of their medians, and the ratio round by round. Random images; nothing is learned.
"""

import argparse
import inspect
import json
import statistics
import time
from dataclasses import replace
from pathlib import Path

from revision import commit
from torch.nn.parallel import DistributedDataParallel

from cifar_fast import recipes
from cifar_fast.distributed.processes import WatchedProcesses
from cifar_fast.distributed.ranks import choose_backend
from cifar_fast.experiments.step_costs import random_dataset, steady_step
from cifar_fast.hardware.clock import synchronize
from cifar_fast.hardware.device import environment, keep_freed_memory, select_device
from cifar_fast.recipe import Recipe
from cifar_fast.training.alone import Alone
from cifar_fast.training.batches import TrainBatches
from cifar_fast.training.setup import Setup, agree_on_execution, set_up
from cifar_fast.training.step import TrainingStep, Update

# torch 2.13 renamed the argument that says whether DDP synchronises buffers.
NEW_NAME = "forward_sync_buffers" in inspect.signature(DistributedDataParallel).parameters
SYNC_BUFFERS = "forward_sync_buffers" if NEW_NAME else "broadcast_buffers"
N_IMAGES = 8192
PREPARED: dict[tuple[Recipe, int, str], tuple[TrainingStep, TrainBatches]] = {}
"""The step and the batches of this process by recipe, number of processes and way, kept over the rounds."""


def prepare(ranks: Alone, recipe: Recipe, way: str) -> tuple[TrainingStep, TrainBatches]:
    """Return the training step and the batches of one rank; `way`: average gradients as training does, or by `ddp`."""
    keep_freed_memory()
    data = random_dataset(N_IMAGES)
    execution = agree_on_execution(recipe, data, 0, ranks.device, ranks)
    setup = set_up(recipe, data, execution, device=ranks.device, ranks=ranks)
    step = steady_step(setup)
    if way == "ddp":
        step.updates = dict.fromkeys((False, True), update_by_ddp(setup))
    return step, setup.batches


def update_by_ddp(setup: Setup) -> Update:
    """Return the update of `setup`, with gradients averaged by DDP bucket by bucket during the backward pass."""
    setup.model.zero_grad(set_to_none=True)
    model = DistributedDataParallel(setup.model, gradient_as_bucket_view=True, **{SYNC_BUFFERS: False})
    return replace(setup.update(), model=model, ranks=Alone(), gradients=None)


def time_steps(ranks: Alone, recipe: Recipe, n_steps: int, way: str) -> float:
    """Return the seconds of `n_steps` training steps, augmentation included, `way` being `flat` or `ddp`."""
    key = (recipe, ranks.world_size, way)
    if key not in PREPARED:
        PREPARED[key] = prepare(ranks, recipe, way)
    step, batches = PREPARED[key]
    stream = batches.epoch(0)
    ranks.barrier()
    start = time.perf_counter()
    for _ in range(n_steps):
        step(*next(stream))
        ranks.tick()
    synchronize(ranks.device)
    return time.perf_counter() - start


def compare(sides: dict, rounds: int) -> dict:
    """Call the two `sides` in turns; return their seconds and ratios, after a round that does not count."""
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
    from parallel_step import time_steps as task  # other processes can import it from this module, not `__main__`

    device, n = select_device(), arguments.world_size
    laptop = recipes.laptop()
    # A shard for each process, in batch-norm groups that divide it; the same recipe on both sides.
    group = laptop.global_batch_size // n // 2
    shared = replace(laptop, n_shards=n, ghost_batch_size=group, micro_batch_size=group)
    whole = replace(shared, micro_batch_size=0)  # DDP averages in each backward pass, so a step must have only one
    backend = choose_backend(device)
    steps, rounds = arguments.steps, arguments.rounds
    images = steps * laptop.global_batch_size
    report: dict = {
        "commit": commit(),
        "environment": environment(device),
        "world_size": n,
        "images a round": images,
    }
    with WatchedProcesses(n, device=device.type, backend=backend, timeout=60.0) as processes:
        alone = {"one process": lambda: task(Alone(device=device), shared, steps, "flat")}
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
