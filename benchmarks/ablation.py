"""Trains a recipe with each trick switched off (or on, if the recipe lacks it), one at a time, and saves the runs.

    python benchmarks/ablation.py --recipe laptop --seeds 0 1 2 --out benchmarks/results/ablation
    python benchmarks/ablation.py --trained runs/A runs/B --out benchmarks/results/ablation  # trained before
    python benchmarks/ablation.py --epochs 2 --out benchmarks/results/ablation_2_epochs  # as notebooks do
    python benchmarks/ablation.py --leave-one-out benchmarks/results/classroom_ladder --epochs 1 \\
        --out benchmarks/results/leave_one_out

When a run ends, the script appends a line to results.jsonl (`arm`, commit, and what `RunResult.to_dict` gives) and
rewrites table.txt. It does not repeat saved runs, so it can be stopped and started again. Test-time augmentation needs
no training of its own: the networks of the unchanged recipe are evaluated with each kind. `--trained` takes runs of the
unchanged recipe from folders that `cifar-fast train --out` has written. `--leave-one-out` trains the top of the
classroom ladder without each of the ladder's tricks, and takes runs of the top itself from what
`benchmarks/classroom_ladder.py` has saved in the folder.
"""

import argparse
from pathlib import Path

import runs_file
from revision import commit

from cifar_fast import recipes
from cifar_fast.data.dataset import Dataset
from cifar_fast.data.load import load_cifar10
from cifar_fast.errors import RunError
from cifar_fast.experiments.ablation import AS_IT_IS, Ablation, evaluate_as_trained
from cifar_fast.hardware.device import environment, select_device
from cifar_fast.recipe import Recipe, changed_fields, choices
from cifar_fast.training.loop import train
from cifar_fast.training.result import RunResult, load_run

ARMS: dict[str, dict[str, object]] = {
    AS_IT_IS: {},
    "label_smoothing=0": {"label_smoothing": 0.0},
    # Norm groups must fit into micro-batches, which change nothing else.
    "ghost_batch_size=0": {"ghost_batch_size": 0, "micro_batch_size": 0},
    "whitening_size=0": {"whitening_size": 0},
    "freeze_bn_scale=False": {"freeze_bn_scale": False},
    "activation=relu": {"activation": "relu"},
    "pool_position=after_activation": {"pool_position": "after_activation"},
    # Page's decay averages over about 100 steps, which suits runs with many more.
    "ema_decay=0.99": {"ema_decay": 0.99, "ema_off_epochs": 0.0},
    "ema_decay=0.8": {"ema_decay": 0.8, "ema_off_epochs": 0.0},
    "resolutions=()": {"resolutions": ()},
    # laptop ends without an average, so switching the average off altogether would not change its final accuracy.
    "ema_off_epochs=0": {"ema_off_epochs": 0.0},
    "bend_fraction=0": {"bend_fraction": 0.0, "bend_lr_fraction": 0.0},
    "flip=random": {"flip": "random"},
    "color_jitter=0": {"color_jitter": 0.0},
    "convolution=direct": {"convolution": "direct"},
    "fuse_norm=False": {"fuse_norm": False},
    "preload=False": {"preload": False},
}


CLOCKS = ("train_seconds", "evaluate_seconds", "total_seconds", "first_step_seconds")


def line(arm: str, result: RunResult) -> dict:
    """Return the line that is saved for a run."""
    return {"arm": arm, "commit": commit(), **result.to_dict()}


def without_clocks(run: dict) -> dict:
    """Return a run without its clocks, which mean nothing when other work shared the machine."""
    epochs = [epoch | {"train_seconds": None} for epoch in run["epochs"]]
    return run | dict.fromkeys(CLOCKS) | {"epochs": epochs}


def tta_lines(result: RunResult, data: Dataset) -> list[dict]:
    """Return a line for each other kind of TTA on the network of `result`, with the clocks of its training."""
    lines = []
    for tta in choices("tta"):
        if tta != result.recipe.tta:
            found = evaluate_as_trained(result, data, tta)
            other = line(f"tta={tta}", result)
            lines.append(other | {"accuracy": found.accuracy, "loss": found.loss, "evaluate_seconds": None})
    return lines


def trained(folders: list[Path], recipe: Recipe, data: Dataset) -> list[RunResult]:
    """Return the runs in `folders`; exit when one used another recipe or data set."""
    runs = []
    for folder in folders:
        try:
            run = load_run(folder)
        except RunError as error:
            raise SystemExit(f"error: {error}") from None
        if changes := changed_fields(recipe, run.recipe):
            raise SystemExit(f"error: {folder} was trained with another recipe ({changes}); leave it out")
        if run.dataset != data.describe():
            raise SystemExit(f"error: {folder} was trained on {run.dataset['name']}, from another source; leave it out")
        runs.append(run)
    return runs


def top_and_without(epochs: float) -> tuple[Recipe, dict[str, Recipe]]:
    """Return the top of the classroom ladder and, by the name of their arm, the top and the top without each trick.

    TTA has no arm: every network of the unchanged recipe is also evaluated with each other kind of it.
    """
    top = recipes.classroom_ladder(epochs)[-1].recipe
    without = {
        f"without {name}": recipe for name, recipe in recipes.leave_one_out(epochs).items() if recipe.tta == top.tta
    }
    return top, {AS_IT_IS: top, **without}


def top_lines(ladder: Path, top: Recipe, data: Dataset) -> list[dict]:
    """Return this machine's saved runs of the top of the ladder, with each kind of TTA, as lines of an ablation.

    The rungs of the other kinds evaluate the same networks.
    """
    if not ladder.exists():
        raise SystemExit(f"error: there is no {ladder}; name a folder that benchmarks/classroom_ladder.py has written")
    last, above = recipes.last_trained(top.epochs)
    arms = [(AS_IT_IS if recipe.name == top.name else f"tta={recipe.tta}", recipe) for recipe in (last, *above)]
    here = environment(select_device(None))
    return [
        run | {"arm": arm, "recipe": top.to_dict()}
        for run in runs_file.read(ladder)
        for arm, recipe in arms
        if run["recipe"] == recipe.to_dict() and run["dataset"] == data.describe()
        # A difference is taken between runs of one machine.
        if all(run["environment"][key] == here[key] for key in ("cpu", "cpu_capability", "gpu", "torch"))
    ]


def save_run(results: Path, arm: str, result: RunResult, data: Dataset, busy: bool) -> None:
    """Append the run (for the unchanged recipe, also with each other kind of TTA) and rewrite the table."""
    lines = [line(arm, result), *(tta_lines(result, data) if arm == AS_IT_IS else [])]
    runs_file.append(results, [without_clocks(run) if busy else run for run in lines])
    write_table(results)
    print(f"{arm}, seed {result.seed}: {100 * result.accuracy:.2f} %, {result.train_seconds:.0f} s", flush=True)


def done(results: Path, recipe: Recipe) -> set[tuple[str, int]]:
    """Return the saved arms and seeds; exit when they were measured with another recipe."""
    lines = runs_file.read(results)
    for there in lines:
        if there["arm"] == AS_IT_IS and (changes := changed_fields(Recipe.from_dict(there["recipe"]), recipe)):
            raise SystemExit(f"error: {results} was measured with another recipe ({changes}); choose another --out")
    return {(there["arm"], there["seed"]) for there in lines}


def write_table(results: Path) -> None:
    """Rewrite table.txt from all saved runs."""
    arms: dict[str, list[dict]] = {}
    for run in runs_file.read(results):
        arms.setdefault(run["arm"], []).append(run)
    if AS_IT_IS in arms:
        ordered = {AS_IT_IS: arms.pop(AS_IT_IS), **arms}
        (results.parent / "table.txt").write_text(Ablation(ordered).table() + "\n")


def main() -> None:
    """Train every arm with every seed, seed by seed, so that the saved runs can be compared at any time."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--recipe", default="laptop")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument(
        "--epochs", type=float, help="shorten the recipe to this many epochs; of the ladder, 2 unless another is given"
    )
    parser.add_argument(
        "--leave-one-out",
        type=Path,
        metavar="FOLDER",
        help="take tricks from the top of this ladder, not from --recipe",
    )
    parser.add_argument("--arms", nargs="+", help="train only these; default: all")
    parser.add_argument(
        "--trained", type=Path, nargs="+", default=[], metavar="FOLDER", help="finished runs of the unchanged recipe"
    )
    parser.add_argument("--busy", action="store_true", help="other work shares the machine: save no clocks")
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    results, data = options.out / "results.jsonl", load_cifar10()
    if options.leave_one_out:
        recipe, arms = top_and_without(options.epochs or 2.0)
    else:
        recipe = recipes.named(options.recipe)
        if options.epochs is not None:
            recipe = recipes.shortened(recipe, options.epochs)
        arms = {arm: Recipe.from_dict(recipe.to_dict() | changes) for arm, changes in ARMS.items()}
    if unknown := set(options.arms or ()) - set(arms):
        raise SystemExit(f"error: --arms {' '.join(sorted(unknown))}: the arms are {', '.join(arms)}")
    options.out.mkdir(parents=True, exist_ok=True)
    if options.leave_one_out:
        known = done(results, recipe)
        lines = top_lines(options.leave_one_out / "results.jsonl", recipe, data)
        runs_file.append(results, [line for line in lines if (line["arm"], line["seed"]) not in known])
        write_table(results)
    for run in trained(options.trained, recipe, data):
        if (AS_IT_IS, run.seed) not in done(results, recipe):
            save_run(results, AS_IT_IS, run, data, options.busy)
    for seed in options.seeds:
        for arm in options.arms or arms:
            arm_recipe = arms[arm]
            changes_nothing = arm != AS_IT_IS and not changed_fields(recipe, arm_recipe)
            if changes_nothing or (arm, seed) in done(results, recipe):
                continue
            save_run(results, arm, train(arm_recipe, data, seed=seed), data, options.busy)


if __name__ == "__main__":
    main()
