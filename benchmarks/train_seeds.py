"""Trains a recipe once for each seed, each run a fresh command, and saves the results.

    python benchmarks/train_seeds.py --recipe laptop --seeds 0 1 2 --out benchmarks/results/laptop

Writes results.jsonl (one line a run: result, clocks, peak memory, environment, commit; appended as each run ends),
summary.json and accuracy_and_time.png (from all lines in that file, beside the published 50 runs), and timing_log.tsv
and learning_curve.png of the first run.
"""

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import runs_file
from matplotlib.figure import Figure
from revision import commit

from cifar_fast.experiments.benchmark import Benchmark
from cifar_fast.experiments.statistics import spread
from cifar_fast.recipe import Recipe
from cifar_fast.teaching.result_plots import accuracy_and_time

FIGURES = ("accuracy", "train_seconds", "evaluate_seconds", "total_seconds", "first_step_seconds", "peak_memory_gb")


def summarise(runs: list[dict]) -> dict:
    """Return n, and the mean with its 95 % interval (Student's t), min, median and max of each figure over `runs`."""
    summary: dict = {"n": len(runs), "recipe": runs[0]["recipe"]["name"], "data set": runs[0]["dataset"]["name"]}
    for figure in FIGURES:
        values = [run[figure] for run in runs]
        found = spread(values)
        interval = found.pop("mean_95")
        half_width = (interval[1] - interval[0]) / 2 if interval else None
        summary[figure] = found | {"mean_95_percent_half_width": half_width}
    summary["commits"] = sorted({run["commit"] for run in runs})
    summary["environment"] = runs[0]["environment"]
    return summary


def require_same_kind(run: dict, results: Path) -> None:
    """Stop when `results` holds runs of another recipe, data set or processor: no mean may mix them with `run`."""
    if not (runs := runs_file.read(results)):
        return
    there = runs[0]
    # Compared as recipes, so that a field that is newer than the file counts as its default.
    before, now = (Recipe.from_dict(each["recipe"]) for each in (there, run))
    if before != now:
        sys.exit(f"error: {results} holds runs of another recipe; choose another --out")
    if there["dataset"] != run["dataset"]:
        sys.exit(f"error: {results} holds runs of another dataset; choose another --out")
    if there["environment"]["cpu"] != run["environment"]["cpu"]:
        sys.exit(f"error: {results} was measured on {there['environment']['cpu']}; choose another --out")


def draw_beside_published(runs: list[dict]) -> Figure:
    """Return the figure of the runs' accuracy and time, with the published 50 runs marked."""
    lines = [run | {"version": run["commit"][:7]} for run in runs]
    return accuracy_and_time(Benchmark(Recipe.from_dict(runs[0]["recipe"]), lines, target=0.94))


def main() -> None:
    """Train, one seed after the other."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", default="laptop")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--world-size", type=int, help="processes that share each run")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    results = arguments.out / "results.jsonl"
    for seed in arguments.seeds:
        with tempfile.TemporaryDirectory() as scratch:
            folder = Path(scratch) / "run"
            command = [sys.executable, "-m", "cifar_fast", "train", "--recipe", arguments.recipe, "--seed", str(seed)]
            command.append("--quiet")  # otherwise `total_seconds` would count the timing of a few steps beforehand
            if arguments.world_size:
                command += ["--world-size", str(arguments.world_size)]
            subprocess.run([*command, "--out", str(folder)], check=True)
            run = json.loads((folder / "result.json").read_text()) | {"commit": commit()}
            require_same_kind(run, results)
            if not results.exists():
                for name in ("timing_log.tsv", "learning_curve.png"):
                    shutil.copy(folder / name, arguments.out / name)
            runs_file.append(results, [run])
    runs = runs_file.read(results)
    (arguments.out / "summary.json").write_text(json.dumps(summarise(runs), indent=2) + "\n")
    draw_beside_published(runs).savefig(arguments.out / "accuracy_and_time.png")
    print(json.dumps(summarise(runs), indent=2))


if __name__ == "__main__":
    main()
