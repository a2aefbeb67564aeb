"""Trains candidates for a recipe on part of the training set and scores them on the rest, without reading the test set.

    python benchmarks/search.py "activation=relu" "activation=relu epochs=8" --out benchmarks/results/search
    python benchmarks/search.py "epochs=8" --recipe speedrun --all "widths=[16,64,64]" --out narrow

Each candidate names the fields that it changes, `field=value`, separated by spaces; a list is written `[64,256]`. The
fields named with `--all` are changed in every run, for instance to narrow a network that takes too long. The last 5,000
training images are held out and replace the test set. The script saves its runs as `ablation.py` does: one line a run
in results.jsonl, a table of all saved runs in table.txt, and no run is trained twice. Only a candidate that wins here
is worth a look at the test set, with `train_seeds.py`.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import runs_file
from ablation import AS_IT_IS, done, line, without_clocks, write_table

from cifar_fast import recipes
from cifar_fast.data.dataset import Dataset
from cifar_fast.data.load import load_cifar10
from cifar_fast.errors import UserError
from cifar_fast.experiments.arithmetic import train_flop
from cifar_fast.recipe import Recipe, changed_fields
from cifar_fast.training.loop import train


def hold_out(data: Dataset, count: int) -> Dataset:
    """Return `data` with its last `count` training images as the test set, under a name and fingerprint of its own."""
    keep = len(data.train_labels) - count
    if not 0 < count < len(data.train_labels):
        raise UserError(
            f"--hold-out {count}: hold out at least 1 of {len(data.train_labels):,} training images, not all"
        )
    return Dataset(
        f"{data.name}, scored on held-out training images",
        data.classes,
        data.train_images[:keep],
        data.train_labels[:keep],
        data.train_images[keep:],
        data.train_labels[keep:],
        f"the first {keep:,} training images and, for scoring, the last {count:,} of: {data.source}",
        f"{data.fingerprint}:held out:{count}",
    )


def candidate(recipe: Recipe, changes: str) -> Recipe:
    """Return `recipe` with `changes` applied; raise `UserError` for a wrong field, value or notation."""
    values: dict[str, Any] = {}
    for change in changes.split():
        field, equals, value = change.partition("=")
        if not equals:
            raise UserError(f"{change!r} is not field=value; write for instance 'activation=relu epochs=8'")
        try:
            values[field] = json.loads(value.lower() if value in ("True", "False") else value)
        except json.JSONDecodeError:
            values[field] = value  # a word, such as relu
        if isinstance(getattr(recipe, field, None), float) and isinstance(values[field], int):
            values[field] = float(values[field])
    changed = Recipe.from_dict(recipe.to_dict() | values)
    if not changed_fields(recipe, changed):
        raise UserError(f"the candidate {changes!r} changes nothing of {recipe.name!r}")
    return changed


def require_same_data(results: Path, data: Dataset) -> None:
    """Raise `UserError` when `results` holds runs that were scored on other images."""
    saved = runs_file.read(results)
    if saved and (there := saved[0]["dataset"]) != data.describe():
        raise UserError(f"{results} was scored on other images ({there['fingerprint']}); choose another --out")


def main() -> None:
    """Train the recipe as it is and each candidate, seed by seed, so that the saved runs can always be compared."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("candidates", nargs="+", metavar="'FIELD=VALUE ...'")
    parser.add_argument("--recipe", default="laptop")
    parser.add_argument("--epochs", type=float, help="shorten the recipe to this many")
    parser.add_argument("--all", metavar="'FIELD=VALUE ...'", help="change these fields in every run")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--hold-out", type=int, default=5_000, metavar="N", help="training images to score on")
    parser.add_argument("--busy", action="store_true", help="other work shares the machine: save no clocks")
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    try:
        recipe = recipes.named(options.recipe)
        recipe = recipe if options.epochs is None else recipes.shortened(recipe, options.epochs)
        recipe = candidate(recipe, options.all) if options.all else recipe
        arms = {AS_IT_IS: recipe} | {changes: candidate(recipe, changes) for changes in options.candidates}
        data = hold_out(load_cifar10(), options.hold_out)
        results = options.out / "results.jsonl"
        require_same_data(results, data)
    except UserError as error:
        raise SystemExit(f"error: {error}") from None
    options.out.mkdir(parents=True, exist_ok=True)
    for seed in options.seeds:
        for arm, arm_recipe in arms.items():
            if (arm, seed) in done(results, recipe):
                continue
            result = train(arm_recipe, data, seed=seed)
            run = line(arm, result)
            runs_file.append(results, [without_clocks(run) if options.busy else run])
            write_table(results)
            tflop = train_flop(arm_recipe, len(data.train_labels)) / 1e12
            print(
                f"{arm}, seed {seed}: {100 * result.accuracy:.2f} %, {result.train_seconds:.0f} s, {tflop:.3g} TFLOP",
                flush=True,
            )


if __name__ == "__main__":
    main()
