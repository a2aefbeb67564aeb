"""Times a training step of each rung of the classroom ladder, and draws the saved runs over seconds.

    python benchmarks/ladder_seconds.py --out benchmarks/results/classroom_ladder

The runs of the ladder share a machine with other work, so their clocks mean nothing. Run this when nothing else runs.
The steps take turns, batch and optimiser included, on random images, each at the sizes that its rung trains at. The
seconds, round by round, become step_seconds.json; with the accuracies in results.jsonl, seconds.png is drawn.
"""

import argparse
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from statistics import median

import runs_file
import torch
from revision import commit

from cifar_fast import recipes
from cifar_fast.data.dataset import Dataset
from cifar_fast.errors import UserError
from cifar_fast.experiments.rungs import StepSeconds
from cifar_fast.experiments.step_costs import endless, random_dataset, steady_step
from cifar_fast.files import write_text, written_whole
from cifar_fast.hardware.clock import in_turns
from cifar_fast.hardware.device import environment, keep_freed_memory, select_device
from cifar_fast.recipe import Recipe
from cifar_fast.shown import hardware
from cifar_fast.teaching.result_plots import ladder_curves
from cifar_fast.training.setup import choose_execution, set_up

EPOCHS = 8.0
"""The most that the ladder is trained for, so that small images have all their sizes."""
N_IMAGES = 8192


def sides(recipe: Recipe) -> list[int]:
    """Return the sides in pixels of the images that `recipe` trains on, in the order of its epochs."""
    return list(dict.fromkeys(recipe.resolution(epoch) for epoch in range(int(recipe.epochs))))


def step(recipe: Recipe, side: int, data: Dataset, device: torch.device) -> Callable[[], object]:
    """Return a call that makes a batch with images of `side` pixels and takes a training step of `recipe` on it."""
    fixed = replace(recipe, resolutions=(side,))
    setup = set_up(fixed, data, choose_execution(fixed, device), device=device)
    train, batches = steady_step(setup), endless(setup.batches)
    return lambda: train(*next(batches))


def measure(data: Dataset, device: torch.device, rounds: int) -> list[dict]:
    """Return the seconds of a step, round by round, for each rung that trains a network and each size of its images."""
    last, _ = recipes.last_trained(EPOCHS)
    ladder = [rung.recipe for rung in recipes.classroom_ladder(EPOCHS)]
    arms = [(recipe, side) for recipe in ladder[: ladder.index(last) + 1] for side in sides(recipe)]
    ways = {f"{recipe.name}, {side}": step(recipe, side, data, device) for recipe, side in arms}
    found = in_turns(ways, rounds=rounds, device=device)
    return [
        {"arm": recipe.name, "side": side, "seconds": seconds}
        for (recipe, side), seconds in zip(arms, found.values(), strict=True)
    ]


def medians(steps: list[dict]) -> StepSeconds:
    """Return the median seconds of a step by rung and side."""
    found: dict[str, dict[int, float]] = {}
    for each in steps:
        found.setdefault(each["arm"], {})[each["side"]] = median(each["seconds"])
    return found


def main() -> None:
    """Measure, save, draw."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    try:
        runs = runs_file.read(options.out / "results.jsonl")
        if not runs:
            raise UserError(f"{options.out} has no results.jsonl; benchmarks/classroom_ladder.py trains the runs")
        keep_freed_memory()
        device = select_device(None)
        steps = measure(random_dataset(N_IMAGES), device, options.rounds)
        report = {"commit": commit(), "environment": environment(device), "steps": steps}
        write_text(options.out / "step_seconds.json", json.dumps(report, indent=1) + "\n")
        for name, found in medians(steps).items():
            print(name, ", ".join(f"{side} pixels: {1e3 * seconds:.1f} ms" for side, seconds in found.items()))
        figure = ladder_curves(runs, medians(steps), machine=hardware(report["environment"]))
        with written_whole(options.out / "seconds.png") as temporary:
            temporary.write_bytes(figure.png())
    except UserError as error:
        raise SystemExit(f"error: {error}") from None


if __name__ == "__main__":
    main()
