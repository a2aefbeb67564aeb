"""Trains the rungs of the classroom ladder, and the tricks beside it, at several numbers of epochs; saves the runs.

    python benchmarks/classroom_ladder.py --epochs 2 4 --seeds 0 1 2 --out benchmarks/results/classroom_ladder

Each run becomes a line of results.jsonl: rung, epochs, arithmetic (FLOP), commit, and what `RunResult.to_dict` gives.
No run is trained twice, so the script can be stopped and started again, with more seeds or epochs; it refuses a folder
whose runs used other recipes or other data. Clocks are saved only with --quiet, when nothing else ran on the machine.
After each number of epochs, table.txt and curves.png are redrawn from all saved runs.
The rungs of test-time augmentation need no training of their own: they evaluate the network of the last rung below.
"""

import argparse
from collections.abc import Callable, Collection
from pathlib import Path

import runs_file
from ablation import line, without_clocks

from cifar_fast import recipes
from cifar_fast.data.dataset import Dataset
from cifar_fast.data.load import load_cifar10
from cifar_fast.errors import UserError
from cifar_fast.experiments.ablation import evaluate_as_trained
from cifar_fast.experiments.arithmetic import train_flop
from cifar_fast.experiments.rungs import ladder_runs, ladder_table
from cifar_fast.files import write_text, written_whole
from cifar_fast.recipe import Recipe
from cifar_fast.teaching.result_plots import ladder_curves
from cifar_fast.training.loop import train
from cifar_fast.training.result import RunResult


def done(results: Path, data: Dataset) -> set[tuple[str, float, int]]:
    """Return the rung, epochs and seed of every saved run; raise `UserError` if one is not of this ladder and data."""
    runs = runs_file.read(results)
    for run in runs:
        arm = recipes.classroom_arms(run["recipe"]["epochs"]).get(run["arm"])
        if arm is None or arm.recipe != Recipe.from_dict(run["recipe"]):
            raise UserError(f"{results} has a run of {run['arm']!r} with another recipe; choose another --out")
        if run["dataset"] != data.describe():
            raise UserError(f"{results} has runs on other data ({run['dataset']['name']}); choose another --out")
    return {(run["arm"], run["recipe"]["epochs"], run["seed"]) for run in runs}


def train_rungs(
    epochs: float,
    seed: int,
    data: Dataset,
    results: Path,
    quiet: bool,
    tricks: Collection[str] | None = None,
    device: str | None = None,
    on_run: Callable[[RunResult], None] | None = None,
) -> None:
    """Train those of `tricks` (default: all) that are missing at `epochs` with `seed`; append each run as it ends.

    `on_run` is called after each is saved.
    """
    last, above = recipes.last_trained(epochs)
    saved = done(results, data)
    for name, rung in recipes.classroom_arms(epochs).items():
        if rung.recipe in above or (name, epochs, seed) in saved or (tricks and name not in tricks):
            continue
        result = train(rung.recipe, data, seed=seed, device=device, progress=False)
        flop = {"train_flop": train_flop(rung.recipe, len(data.train_labels))}
        lines = [line(rung.recipe.name, result) | flop]
        for top in above if rung.recipe == last else ():
            found = evaluate_as_trained(result, data, top.tta)
            changed = {"accuracy": found.accuracy, "loss": found.loss, "recipe": top.to_dict()}
            lines.append(line(top.name, result) | flop | changed)
        runs_file.append(results, [run if quiet else without_clocks(run) for run in lines])
        print(f"{rung.recipe.name}, {epochs:g} epochs, seed {seed}: {100 * result.accuracy:.2f} %", flush=True)
        if on_run:
            on_run(result)


def show(results: Path) -> None:
    """Write what the saved runs say to table.txt, and draw it in curves.png."""
    runs = runs_file.read(results)
    if ladder_runs(runs):
        write_text(results.parent / "table.txt", ladder_table(runs) + "\n")
        with written_whole(results.parent / "curves.png") as temporary:
            temporary.write_bytes(ladder_curves(runs).png())


def main() -> None:
    """Train seed by seed, so that the saved runs can be compared at any time."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--epochs", type=float, nargs="+", default=[1.0, 2.0, 3.0, 4.0, 6.0, 8.0])
    parser.add_argument("--only", nargs="+", metavar="TRICK", help="train only these; default: all")
    parser.add_argument("--seeds", type=int, nargs="+", default=list(range(5)))
    parser.add_argument("--quiet", action="store_true", help="nothing else runs on this machine: save the clocks")
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    try:
        data = load_cifar10()
        options.out.mkdir(parents=True, exist_ok=True)
        for seed in options.seeds:
            for epochs in options.epochs:
                train_rungs(epochs, seed, data, options.out / "results.jsonl", options.quiet, options.only)
                show(options.out / "results.jsonl")
    except UserError as error:
        raise SystemExit(f"error: {error}") from None


if __name__ == "__main__":
    main()
