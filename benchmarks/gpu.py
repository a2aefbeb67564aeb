"""The first hour with a GPU: one command measures everything that needs one, and saves it in one JSON file.

    python benchmarks/gpu.py --out benchmarks/results/gpu --data FOLDER     # every part, half an hour in all
    python benchmarks/gpu.py --out benchmarks/results/gpu --minutes 14      # fewer runs of each
    python benchmarks/gpu.py --out benchmarks/results/gpu --only speedrun   # this part, again; the others are kept
    python benchmarks/gpu.py --out /tmp/rehearsed --rehearse                # the same command, small, without a GPU

It first says which packages and data are missing here and how to get them, and stops if it cannot do without them.
Each part is a process of its own that gets its share of `--minutes`; the later parts share the time that an earlier one
leaves over. A part that is stopped keeps what it has finished. Run again, the command skips parts that are done at
this commit, and `speedrun`, `apple`, `recipes` and `ladder` add the runs that are missing:

    tests     pytest -m gpu
    speedrun  up to 50 runs on one GPU, and 10 on all of them where there are several
    airbench  up to 50 runs of PyPI's airbench (train94), if installed, on the same data in the same hour
    apple     up to 50 runs of apple_8gpu with its 8 shards, on as many GPUs as can share them
    kernels   one full-size step of speedrun: kernels by time, gaps, share of the matrix limit measured beside it
    ways      what the CUDA graph, torch.compile and fused norms are each worth
    start     two fresh commands, `cifar-fast train --recipe speedrun`: with nothing compiled, then with what the first
              has compiled
    recipes   every other named recipe, Page's ladder first, in rounds of one run each
    ladder    the classroom ladder, each trick added, as classroom_ladder.py trains it

After each part the script rewrites `gpu.json` in the folder, whole or not at all; `PART.log` has what the part printed.
Notebooks 03, 11 and 12 show what is saved in benchmarks/results/gpu, and so does benchmarks/results/README.md, which is
rewritten after each part; a dry run (another device, recipe or data set) cannot be saved there. After copying results
from another machine there, rewrite that README with `--out benchmarks/results/gpu --readme`.

Then check, in this order:

 1. `tests`: look first at test_a_captured_function_repeats_its_work_on_new_inputs, then at
    test_the_captured_step_gives_the_eager_steps_weights (muon, then sgd), then at the compiled ones, NCCL last.
 2. `cifar-fast train --recipe speedrun --cuda-graph on --compile off`, then `--cuda-graph off --compile on`, then both:
    no warning, and `step_mode` in result.json as asked for. If there is a warning, deal with its cause first; it is
    also in `step_mode_reason`.
 3. `ways`: which of the three pays. `kernels`: the gaps (none above a few microseconds inside a graph) and the slowest
    kernels. Kernels whose names start with `norm_` are ours: each should take about as long as memory needs to deliver
    its bytes; if not, change the tile sizes at the top of kernels/fused_triton.py. If another batch norm or the
    augmentation is among the slowest although the step is compiled, it was not fused. If
    `orthogonalise_us` is lower by shape, use that (`optim.orthogonalise_all`). If a scatter in the max-pool's backward
    pass is slow, remove its decomposition from Inductor before the first compilation, with another
    TORCHINDUCTOR_CACHE_DIR:
    `torch._inductor.decomposition.decompositions.pop(torch.ops.aten.max_pool2d_with_indices_backward.default)`.
 4. `speedrun` and `airbench`: mean accuracy at least 94.0 %, mean train_seconds at most 0.9, three times airbench's
    speed. If accuracy falls short: n_shards=1 (batch norm over all 1536 images, as in Hiverge's), then more epochs, or
    more of them at full size. If there is accuracy to spare: fewer. float16 against bfloat16 (`--precision
    bfloat16`) at the same epochs.
 5. `tta_margin=0.5` against 1: the same accuracy to within 0.01 points over the runs' networks, else a larger margin.
 6. `apple`: Apple published 41 of 50 runs at 94 % and a median of 94.19 %.
 7. `start`: under 20 s the first time, under 12 s the second.
 8. With several GPUs: the parallel tests, then speedrun and apple on all; each rank's graph holds the all-reduce.
 9. `--only recipes`, until there are three rounds; then `cifar-fast notebooks 03 11 12 --execute`.
"""

# ruff: noqa: E402

from __future__ import annotations

import argparse
import importlib.util
import io
import itertools
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import redirect_stdout
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import needs
import runs_file
from revision import commit


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """Return the options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--out", type=Path, required=True, help="folder for gpu.json, logs and runs: a new one, or one to continue")
    add("--minutes", type=float, default=30.0, help="the most that all parts may take together")
    add("--only", nargs="+", choices=PARTS, metavar="PART", help=f"measure these again: {', '.join(PARTS)}")
    add("--runs", type=int, default=50, help="the most runs of speedrun, apple and airbench")
    add("--data", help="folder of CIFAR-10, or synthetic")
    add("--device", help="cuda, or cpu for a dry run")
    add("--recipe", help="train this recipe instead of all others, for a dry run")
    add("--rehearse", action="store_true", help="run small on a simulated GPU, to see that the command works here")
    add("--readme", action="store_true", help="measure nothing; write what is in --out into the README")
    add("--child", choices=PARTS, help=argparse.SUPPRESS)
    add("--seconds", type=float, help=argparse.SUPPRESS)  # the time that a child may take
    return parser.parse_args(argv)


MINUTES = {
    "tests": 2.0, "speedrun": 3.0, "airbench": 3.0, "apple": 8.0, "kernels": 1.0, "ways": 2.0, "start": 1.0,
    "recipes": 5.0, "ladder": 5.0,
}  # fmt: skip
"""The parts, in order, and how half an hour is shared among them; other budgets are shared in proportion."""
PARTS = tuple(MINUTES)
LEAST_SECONDS = {"tests": 120.0, "kernels": 60.0}
"""The least that a part gets, however small its share: it has nothing to save before its end."""


def rehearse(argv: Sequence[str]) -> int:
    """Run this command again on the simulated GPU; return its exit status."""
    sys.path.insert(0, str(needs.REPOSITORY / "tests"))
    from gpu_rehearsal.runtime import CannotBuild, build, environment

    with tempfile.TemporaryDirectory() as folder:
        try:
            simulated = environment(build(Path(folder)), mode="numeric")
        except CannotBuild as error:
            print(f"error: {error}", file=sys.stderr)
            return 2
        return subprocess.run([sys.executable, str(Path(__file__).resolve()), *argv], env=simulated).returncode


if __name__ == "__main__":
    _options = parse(sys.argv[1:])
    # In the first second, before anything that may be missing is imported.
    if not (_options.child or _options.readme or "REHEARSAL_MODE" in os.environ):
        _said, _enough = needs.report(needs.SYNTHETIC if _options.rehearse else _options.data)
        print(_said or "no package is missing", flush=True)
        if not _enough:
            sys.exit(2)
        if _options.rehearse:
            sys.exit(rehearse(sys.argv[1:]))

import torch
from classroom_ladder import show, train_rungs

import cifar_fast as cf
from cifar_fast.data.dataset import SYNTHETIC, Dataset
from cifar_fast.data.load import load_cifar10
from cifar_fast.data.synthetic import synthetic
from cifar_fast.errors import UserError
from cifar_fast.experiments import gpu_report
from cifar_fast.experiments.rungs import gain
from cifar_fast.experiments.statistics import summarise
from cifar_fast.files import write_text
from cifar_fast.hardware.cuda_graph import CapturedFunction
from cifar_fast.hardware.device import environment, select_device
from cifar_fast.recipe import Recipe
from cifar_fast.training.batches import steps_per_epoch
from cifar_fast.training.model import build_model
from cifar_fast.training.optim import orthogonalise_by_shape, orthogonalise_padded
from cifar_fast.training.result import RunResult, write_json

ROUNDS = 3
"""Runs of each recipe in `recipes`."""
LADDER_EPOCHS, LADDER_SEEDS = (1.0, 2.0, 4.0, 8.0), 10
PROFILED_STEPS = 10
KERNELS_SHOWN = 25
TARGET = 0.94
REPOSITORY = needs.REPOSITORY
SAVED = REPOSITORY / "benchmarks" / "results" / "gpu"
"""The README and the notebooks show what is saved here."""
README = SAVED.parent / "README.md"
BEGIN, END = "<!-- gpu.json: begin -->\n", "\n<!-- gpu.json: end -->"
"""The lines around what this script writes in the README."""
RESUMED = ("speedrun", "apple", "recipes", "ladder")
"""Parts that add to the runs they find; the others start from nothing each time."""
NO_TIME = "no time was left"
OUT_OF_TIME = 75
"""The exit status of a part that stopped because its time was up."""
BAD = ("failure", "error", "skipped")
"""JUnit's tags of a test that did not pass."""
COMMITS = "commits.txt"


class OutOfTime(UserError):
    """The part's time is up; what it has finished is saved."""


# --- the parts: each runs in a process of its own and saves what it finds as it goes ---


def part_kernels(options: argparse.Namespace) -> None:
    """Measure the GPU's limit, then look at the kernels of a few full-size steps."""
    recipe, data = replace(chosen("speedrun", options), resolutions=()), load(options)
    found: dict[str, Any] = {"about": {"recipe": recipe.name, "dataset": data.describe()}}
    path = options.out / "kernels.json"
    if select_device(options.device).type != "cuda":
        write_json(path, found | {"left_out": "there is no GPU"})
        return
    device = torch.device(options.device or "cuda")
    found["limit"] = matrix_limit(device, **({"side": 64, "repeats": 2} if options.rehearse else {}))
    write_json(path, found)
    for way in (recipe, replace(recipe, cuda_graph="off")):
        try:
            found["step"] = analyse(*profiled_kernels(way, data, options.device))
            break
        except UserError as error:  # in some versions of CUPTI a profiler started after the capture sees no kernel
            found.setdefault("not_profiled", []).append(f"cuda_graph={way.cuda_graph}: {error}")
            write_json(path, found)
    if "step" in found:
        best = max(found["limit"]["tflops"].values()) * 1e12
        found["step"]["network_flops"] = flops = training_flops(recipe) * recipe.global_batch_size
        found["step"]["share_of_limit"] = flops / (found["step"]["us_a_step"] * 1e-6) / best
    write_json(path, found)


def part_ways(options: argparse.Namespace) -> None:
    """Compare graph, compiler and fused norms in turns, on full-size images, and the ways to orthogonalise."""
    # A single size: every way that compiles has to compile for each size anew.
    recipe, data = replace(chosen("speedrun", options), resolutions=()), load(options)
    found: dict[str, Any] = {"about": {"recipe": recipe.name, "dataset": data.describe()}, "ways": {}}
    path = options.out / "ways.json"
    # The last way, which the others are compared with, comes first, in case the time is too short for all.
    for name, changes in reversed(gpu_report.WAYS.items()):
        if options.rehearse and changes["compile"] != "off":
            continue
        way = replace(recipe, **changes)
        runs = [cf.train(way, data, device=options.device, seed=seed, progress=False) for seed in range(2)]
        # The second run counts: in the first, everything is loaded, compiled and measured for the first time.
        found["ways"][name] = [brief(run) for run in runs]
        write_json(path, found)
    if select_device(options.device).type != "cuda":
        return
    try:
        found["orthogonalise_us"] = orthogonalising(recipe, torch.device(options.device or "cuda"))
    except RuntimeError as error:  # a failed capture must not cost what has been measured
        found["orthogonalise_us"] = f"not measured: {error}".partition("\n")[0]
    write_json(path, found)


def part_speedrun(options: argparse.Namespace) -> None:
    """Run it many times on one GPU, then a few times on all."""
    recipe = chosen("speedrun", options)
    repeat(recipe, options, options.out / "speedrun", options.runs, world_size=1)
    n_gpus = torch.cuda.device_count() if select_device(options.device).type == "cuda" else 0
    if n_gpus > 1:
        repeat(recipe, options, options.out / "speedrun_all_gpus", min(10, options.runs), world_size=None)


def part_apple(options: argparse.Namespace) -> None:
    """Run Apple's recipe many times."""
    repeat(chosen("apple_8gpu", options), options, options.out / "apple_8gpu", options.runs, world_size=None)


def part_recipes(options: argparse.Namespace) -> None:
    """Run every recipe that has no part of its own, in rounds, until the time is up."""
    names = (
        [options.recipe]
        if options.recipe
        else [name for name in reversed(cf.recipes.names()) if name not in gpu_report.OWN_PARTS]
    )
    names = names[:1] if options.rehearse else names
    for round_ in range(1, ROUNDS + 1):
        for name in names:
            recipe = chosen(name, options)
            repeat(recipe, options, options.out / "recipes" / name, min(round_, options.runs), world_size=None)


def part_ladder(options: argparse.Namespace) -> None:
    """Train the rungs of the classroom ladder and the tricks beside it, seed by seed, until the time is over."""
    end, results = last_start(options), options.out / "ladder" / "results.jsonl"
    results.parent.mkdir(exist_ok=True)

    def look(result: RunResult) -> None:
        if time.monotonic() + result.total_seconds > end:
            raise OutOfTime(f"a part of the ladder is saved in {results}; run the part again")

    if options.rehearse:
        train_rungs(1.0, 0, synthetic(512, 20), results, True, ("plain",), options.device)
    else:
        data = load(options)
        for seed, epochs in itertools.product(range(LADDER_SEEDS), LADDER_EPOCHS):
            train_rungs(epochs, seed, data, results, True, device=options.device, on_run=look)
    show(results)


def part_airbench(options: argparse.Namespace) -> None:
    """Run PyPI's airbench on the same images, and save its own clock and accuracy."""
    found: dict[str, Any] = {"runs": []}
    path = options.out / "airbench.json"
    if importlib.util.find_spec("airbench") is None:
        write_json(path, found | {"left_out": "airbench is not installed: pip install airbench"})
        return
    if select_device(options.device).type != "cuda" or options.rehearse:
        write_json(path, found | {"left_out": "airbench needs a GPU"})
        return
    from importlib.metadata import version

    import airbench

    data, end = load(options), last_start(options)
    found["about"] = {"version": version("airbench"), "recipe": "train94", "dataset": data.describe()}
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        lay_out_for_airbench(data, Path("cifar10"))
        start = time.monotonic()
        airbench.warmup94()
        found["about"]["warm_up_seconds"] = time.monotonic() - start
        for number in range(options.runs):
            if time.monotonic() > end:
                break
            printed = io.StringIO()
            with redirect_stdout(printed):
                airbench.train94(run=number)
            found["runs"].append(read_airbench(printed.getvalue()))
            write_json(path, found)
        os.chdir(REPOSITORY)


def part_start(options: argparse.Namespace) -> None:
    """Run the command twice: with nothing compiled, then with what the first has compiled."""
    found: dict[str, Any] = {}
    name = options.recipe or "speedrun"
    with tempfile.TemporaryDirectory() as folder:
        for which in ("first", "second"):
            out = Path(folder) / which
            command = [sys.executable, "-m", "cifar_fast", "train", "--recipe", name, "--out", str(out)]
            command += ["--device", options.device] if options.device else []
            command += ["--data", options.data] if options.data else []
            caches = {"TORCHINDUCTOR_CACHE_DIR": "compiled", "TRITON_CACHE_DIR": "kernels"}
            compiled = os.environ | {variable: str(Path(folder) / name) for variable, name in caches.items()}
            start = time.monotonic()
            subprocess.run(command, check=True, env=compiled)
            keys = ("total_seconds", "warm_up_seconds", "first_step_seconds", "train_seconds", "evaluate_seconds")
            result = json.loads((out / "result.json").read_text())
            # The command's own choices: without CIFAR-10 it trains on the synthetic set, and it takes every GPU it can.
            found["about"] = about(result)
            found[which] = {key: result[key] for key in ("accuracy", *keys)}
            found[which]["command_seconds"] = time.monotonic() - start
            write_json(options.out / "start.json", found)


WORK: dict[str, Callable[[argparse.Namespace], None]] = {
    "speedrun": part_speedrun,
    "airbench": part_airbench,
    "apple": part_apple,
    "kernels": part_kernels,
    "ways": part_ways,
    "start": part_start,
    "recipes": part_recipes,
    "ladder": part_ladder,
}


# --- what they use ---


def about(run: Mapping[str, Any]) -> dict[str, Any]:
    """Return what `gpu_report` must know about a run, given as by `RunResult.to_dict`, to compare it with others."""
    return {"recipe": run["recipe"]["name"], "dataset": run["dataset"], "environment": run["environment"]}


def chosen(name: str, options: argparse.Namespace) -> Recipe:
    """Return the named recipe, or the one that a dry run trains instead."""
    if options.rehearse:
        from gpu_rehearsal.small import small

        return small(name, cuda_graph="auto", precision="float32", tta="none")
    return cf.recipes.named(options.recipe or name)


def load(options: argparse.Namespace) -> Dataset:
    """Return CIFAR-10, or what `--data` names."""
    if options.rehearse:
        return synthetic(96, 20)
    return synthetic() if options.data == SYNTHETIC else load_cifar10(options.data)


def brief(result: RunResult) -> dict[str, Any]:
    """Return the figures by which the ways to run a step are compared."""
    words = ("precision", "step_mode", "step_mode_reason")
    clocks = ("accuracy", "train_seconds", "warm_up_seconds", "evaluate_seconds", "total_seconds")
    return {name: getattr(result, name) for name in clocks} | {word: result.environment[word] for word in words}


def repeat(recipe: Recipe, options: argparse.Namespace, out: Path, runs: int, world_size: int | None) -> None:
    """Benchmark a recipe, counting the runs in `out`; raise `OutOfTime` when another run would take too long."""
    end, revision = last_start(options), commit()

    def look(line: dict[str, Any]) -> None:
        if revision not in commits(out):  # a later call may add runs at another commit
            with (out / COMMITS).open("a") as file:
                file.write(revision + "\n")
        print(f"{recipe.name}: run {line['run']}: {line['accuracy']:.2%} in {line['train_seconds']:.3f} s", flush=True)
        if line["run"] + 1 < runs and time.monotonic() + line["total_seconds"] > end:
            raise OutOfTime(f"{line['run'] + 1} of {runs} runs of {recipe.name} are saved; run the part again")

    if time.monotonic() > end:
        raise OutOfTime(f"no time was left for {recipe.name}; run the part again")
    cf.benchmark(
        recipe, load(options), runs=runs, world_size=world_size, device=options.device, out=out, progress=False,
        on_run=look, target=TARGET,
    )  # fmt: skip


def last_start(options: argparse.Namespace) -> float:
    """Return when a part should have ended by itself: some time before it is stopped."""
    return options.end - min(30.0, options.seconds / 10)


def commits(folder: Path) -> list[str]:
    """Return the commits at which the runs in a benchmark folder were measured."""
    path = folder / COMMITS
    return path.read_text().split() if path.exists() else []


def matrix_limit(device: torch.device, side: int = 8192, repeats: int = 20) -> dict[str, Any]:
    """Measure how many TFLOP/s a product of two square half-precision matrices reaches, best of `repeats`."""
    tflops = {}
    for dtype in (torch.float16, torch.bfloat16):
        a, b = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
        seconds = []
        for _ in range(repeats):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            a @ b
            end.record()
            torch.cuda.synchronize(device)
            seconds.append(start.elapsed_time(end) / 1e3)
        tflops[str(dtype).removeprefix("torch.")] = 2 * side**3 / min(seconds) / 1e12
    return {"side": side, "repeats": repeats, "tflops": tflops}


def orthogonalising(recipe: Recipe, device: torch.device, repeats: int = 50) -> dict[str, float]:
    """Return how long each way to orthogonalise a step's filters takes when captured: the median in microseconds."""
    model = build_model(recipe, 10, torch.zeros(3), torch.ones(3))
    filters = [p for p in model.parameters() if p.requires_grad and p.ndim == 4]
    matrices = [torch.randn(len(p), p[0].numel(), device=device) for p in filters]
    ways = {"all at once, padded": orthogonalise_padded, "by shape": orthogonalise_by_shape}
    captured: dict[str, CapturedFunction] = {}
    for name, way in ways.items():

        def half(*given: torch.Tensor, way: Callable = way) -> list[torch.Tensor]:
            with torch.autocast("cuda", torch.float16):
                return way(list(given))

        captured[name] = CapturedFunction(half, *matrices)
    seconds: defaultdict[str, list[float]] = defaultdict(list)
    for _ in range(repeats):
        for name, replay in captured.items():
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            replay(*matrices)
            end.record()
            torch.cuda.synchronize(device)
            seconds[name].append(start.elapsed_time(end) * 1e3)
    return {name: statistics.median(each) for name, each in seconds.items()}


def profiled_kernels(recipe: Recipe, data: Dataset, device: str | None) -> tuple[list[tuple[str, float, float]], int]:
    """Return what the GPU ran in a few steps, as name, start and end in microseconds, and the number of steps."""
    from torch.autograd import DeviceType
    from torch.profiler import ProfilerActivity, profile

    profiler = profile(activities=[ProfilerActivity.CUDA])
    an_epoch = steps_per_epoch(recipe, len(data.train_labels))
    n_steps = min(PROFILED_STEPS, an_epoch - 1)
    first = min(an_epoch + 5, 2 * an_epoch - n_steps)  # when the whitening bias is frozen, and before an evaluation

    def watch(done: int, total: int) -> None:
        if done in (first, first + n_steps):
            torch.cuda.synchronize()
            (profiler.start if done == first else profiler.stop)()

    recipe = replace(recipe, epochs=2.0, flat_epochs=0.0, tta="none")
    cf.train(recipe, data, device=device, progress=False, on_step=watch)
    events = [event for event in profiler.events() if event.device_type == DeviceType.CUDA]
    kernels = [(event.name, float(event.time_range.start), float(event.time_range.end)) for event in events]
    return kernels, n_steps


def analyse(kernels: Iterable[tuple[str, float, float]], n_steps: int) -> dict[str, Any]:
    """Return kernels by time, and how long the GPU was busy and idle; `kernels`: (name, start, end) in microseconds."""
    in_order = sorted(kernels, key=lambda kernel: kernel[1])
    if not in_order:
        raise UserError("the profiler has seen no kernel: CUPTI is missing, or this user may not use it")
    times: defaultdict[str, list[float]] = defaultdict(list)
    gaps, busy, reached = [], 0.0, in_order[0][1]
    for name, start, end in in_order:
        times[name].append(end - start)
        if start > reached:
            gaps.append(start - reached)
        busy += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    span = reached - in_order[0][1]
    by_time = sorted(times.items(), key=lambda item: -sum(item[1]))
    total = sum(sum(each) for each in times.values())
    return {
        "steps": n_steps,
        "us_a_step": span / n_steps,
        "busy_share": busy / span,
        "gaps": {"us_a_step": (span - busy) / n_steps, "count": len(gaps), "longest_us": sorted(gaps)[-10:][::-1]},
        "n_kernels_a_step": len(in_order) / n_steps,
        "kernels": [
            {
                "name": name,
                "share": sum(each) / total,
                "us_a_step": sum(each) / n_steps,
                "calls_a_step": len(each) / n_steps,
            }
            for name, each in by_time[:KERNELS_SHOWN]
        ],
    }


def training_flops(recipe: Recipe, side: int = 32) -> float:
    """Return the floating-point operations of the network's convolutions and products for one image, both passes."""
    from torch.utils.flop_counter import FlopCounterMode

    n = recipe.norm_group_size
    model = build_model(recipe, 10, torch.zeros(3), torch.ones(3)).to("meta")
    with FlopCounterMode(display=False) as counter:
        model(torch.empty(n, 3, side, side, device="meta")).sum().backward()
    return counter.get_total_flops() / n


def lay_out_for_airbench(data: Dataset, folder: Path) -> None:
    """Write the two files that airbench looks for before it downloads any."""
    folder.mkdir()
    for name, images, labels in (
        ("train", data.train_images, data.train_labels),
        ("test", data.test_images, data.test_labels),
    ):
        content = {"images": images.permute(0, 2, 3, 1).contiguous(), "labels": labels, "classes": list(data.classes)}
        torch.save(content, folder / f"{name}.pt")


def read_airbench(printed: str) -> dict[str, float]:
    """Return accuracy and seconds of one run from the table that airbench prints.

    The time in its last line includes the evaluation with TTA; the line before it is the end of training.
    """
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in printed.splitlines() if line.startswith("|")]
    rows = [row for row in rows if len(row) == 7 and (row[1].isdigit() or row[1] == "eval")]
    if len(rows) < 2 or rows[-1][1] != "eval":
        raise UserError(f"airbench printed a different table from that of version 0.1.8: {printed[-500:]!r}")
    return {"accuracy": float(rows[-1][5]), "train_seconds": float(rows[-2][6]), "with_tta_seconds": float(rows[-1][6])}


# --- from files to one JSON ---


def read_runs(folder: Path) -> dict[str, Any] | None:
    """Return the summary of a benchmark folder, and what its runs have in common; None where no run is finished."""
    try:
        runs = cf.load_benchmark(folder).runs
    except UserError:
        return None
    return {
        "about": about(runs[-1]) | {"commits": commits(folder)},
        "summary": summarise(runs, TARGET),
        "warm_up_seconds_mean": statistics.mean(run.get("warm_up_seconds", 0.0) for run in runs),
    }


def read_folders(folders: Mapping[str, Path]) -> dict[str, Any] | None:
    """Return what `read_runs` finds, by name, in those folders that hold a finished run; None where none does."""
    return {name: found for name, folder in folders.items() if (found := read_runs(folder))} or None


def read_ladder(results: Path) -> dict[str, Any] | None:
    """Return how many runs of each rung of the classroom ladder are saved, and its gain in words; None for no run."""
    if not (runs := runs_file.read(results)):
        return None
    counts = Counter(run["arm"] for run in runs)
    gains = {name: " ".join(gain(name, runs).sentences()) for name in counts if name != "plain"}
    return {"about": about(runs[-1]), "runs": counts, "gains": gains}


def read_json(path: Path) -> Any:
    """Return a JSON file's content; None where there is none."""
    return json.loads(path.read_text()) if path.exists() else None


def read_tests(path: Path) -> dict[str, Any] | None:
    """Return how many tests of a JUnit file passed, and the names of those that did not."""
    if not path.exists():
        return None
    cases = list(ElementTree.parse(path).getroot().iter("testcase"))
    outcome = {
        f"{case.get('classname', '')}::{case.get('name', '')}": next(
            (child.tag for child in case if child.tag in BAD), "passed"
        )
        for case in cases
    }
    names = {tag: sorted(name for name, found in outcome.items() if found == tag) for tag in BAD}
    return {"passed": list(outcome.values()).count("passed"), **names}


def collect(part: str, out: Path) -> Any:
    """Return what a part has saved so far, finished or not; None for nothing."""
    if part == "tests":
        return read_tests(out / "tests.xml")
    if part == "speedrun":
        return read_folders({name: out / name for name in ("speedrun", "speedrun_all_gpus")})
    if part == "apple":
        return read_folders({"apple_8gpu": out / "apple_8gpu"})
    if part == "ladder":
        return read_ladder(out / "ladder" / "results.jsonl")
    if part == "recipes":
        return read_folders({name: out / "recipes" / name for name in cf.recipes.names()})
    return read_json(out / f"{part}.json")


def verdicts(parts: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return what is required of a GPU, what was found, and whether it is enough, for parts that found something."""
    found: dict[str, Any] = {name: entry["found"] or {} for name, entry in parts.items()}
    checks = [
        *_test_checks(found.get("tests")),
        *_speedrun_checks(found.get("speedrun", {}).get("speedrun"), found.get("airbench", {}).get("runs")),
        *_apple_checks(found.get("apple", {}).get("apple_8gpu")),
        *_start_checks(found.get("start", {})),
    ]
    return [dict(zip(("what", "found", "required", "met"), check, strict=True)) for check in checks]


Check = tuple[str, float, float, bool]


def _test_checks(tests: Mapping[str, Any] | None) -> list[Check]:
    if not tests:
        return []
    bad = sum(len(tests[tag]) for tag in BAD)
    return [("GPU tests that failed or were skipped", bad, 0, bad == 0)]


def _speedrun_checks(
    speedrun: Mapping[str, Any] | None, airbench_runs: Sequence[Mapping[str, float]] | None
) -> list[Check]:
    if not speedrun:
        return []
    accuracy, seconds = (speedrun["summary"][key]["mean"] for key in ("accuracy", "train_seconds"))
    checks = [
        ("speedrun: mean accuracy", accuracy, TARGET, accuracy >= TARGET),
        ("speedrun: mean train_seconds", seconds, 0.9, seconds <= 0.9),
    ]
    if airbench_runs:
        speed = statistics.mean(run["train_seconds"] for run in airbench_runs) / seconds
        checks.append(("speedrun: times as fast as airbench, both without evaluation", speed, 3, speed >= 3))
    return checks


def _apple_checks(apple: Mapping[str, Any] | None) -> list[Check]:
    if not apple:
        return []
    summary = apple["summary"]
    median, share, published = summary["accuracy"]["median"], summary["share_at_target"], 41 / 50
    return [
        ("apple_8gpu: median accuracy", median, 0.9419, median >= 0.9419),
        ("apple_8gpu: share of runs at 94 %", share, published, share >= published),
    ]


def _start_checks(start: Mapping[str, Any]) -> list[Check]:
    limits = {"first": 20, "second": 12}
    totals = {which: start[which]["total_seconds"] for which in limits if which in start}
    return [
        (f"total_seconds of the {which} command", total, limits[which], total < limits[which])
        for which, total in totals.items()
    ]


# --- the caller ---


def run_part(command: Sequence[str], log: Path, seconds: float) -> tuple[str, float]:
    """Run a command with its output in `log`; return how it ended and after how long. It gets at most `seconds`."""
    start = time.monotonic()
    with log.open("w") as output:
        process = subprocess.Popen(
            command, stdout=output, stderr=subprocess.STDOUT, cwd=REPOSITORY, start_new_session=True
        )
        try:
            code = process.wait(seconds)
            state = "done" if code == 0 else "out of time" if code == OUT_OF_TIME else f"failed with status {code}"
        except subprocess.TimeoutExpired:
            state = f"ended after {seconds:.0f} s"
        finally:  # after Ctrl-C too: nothing stays behind
            if process.poll() is None:
                end(process)
    return state, time.monotonic() - start


def end(process: subprocess.Popen) -> None:
    """End a process and all that it has started: first as Ctrl-C does, so that pytest saves what it has found."""
    for how in (signal.SIGINT, signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(process.pid, how)
            process.wait(5)
        except subprocess.TimeoutExpired:
            continue
        except ProcessLookupError:
            return


def command_of(part: str, options: argparse.Namespace, seconds: float) -> list[str]:
    """Return the command that does a part's work."""
    if part == "tests":
        command = [sys.executable, "-m", "pytest", "-o", "addopts=-v", "-m", "gpu"]  # its own options need more plugins
        command += [f"--junitxml={options.out / 'tests.xml'}", "-p", "no:cacheprovider"]
        # On the simulated GPU all of them take minutes; tests/gpu_rehearsal runs them.
        rehearsed = ["-p", "gpu_rehearsal.plugin", "tests/hardware/test_cuda_graph.py"]
        return [*command, *(rehearsed if options.rehearse else ["tests"])]
    command = [sys.executable, str(Path(__file__).resolve()), "--child", part, "--out", str(options.out)]
    command += ["--runs", str(options.runs), "--seconds", str(seconds), *(["--rehearse"] if options.rehearse else [])]
    for name in ("device", "recipe", "data"):
        if value := getattr(options, name):
            command += [f"--{name}", value]
    return command


def dry_run(options: argparse.Namespace) -> list[str]:
    """Return how a call differs from measuring the recipes on CIFAR-10 on a GPU; nothing where it does not."""
    device = select_device(options.device).type
    return [
        *(["rehearsed"] if options.rehearse else []),
        *([f"device {device}"] if device != "cuda" else []),
        *([f"recipe {options.recipe}"] if options.recipe else []),
        *([f"data {SYNTHETIC}"] if options.data == SYNTHETIC else []),
    ]


def write_readme(readme: Path, folder: Path) -> None:
    """Write what `folder`'s gpu.json says between the README's markers; raise `UserError` when it has none."""
    text = readme.read_text()
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise UserError(f"{readme.name} lacks the lines {BEGIN.strip()} and {END.strip()}; put them where results go")
    write_text(readme, before + begin + gpu_report.readme_block(folder) + end + after)


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Run the parts one after the other, and save what each has found before the next starts; return how they ended."""
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / gpu_report.FILE
    report = read_json(path) or {"parts": {}}
    machine = {
        "environment": environment(select_device(options.device)),
        "gpus": [torch.cuda.get_device_name(number) for number in range(torch.cuda.device_count())],
    }
    states, end = {}, time.monotonic() + 60 * options.minutes
    # `start` trains at full size, which no simulation does in a reasonable time.
    parts = options.only or [part for part in PARTS if not (options.rehearse and part == "start")]
    for place, part in enumerate(parts):
        if not options.only and is_done(report["parts"].get(part), options):
            print(f"{part}: is done already; --only {part} measures it again", flush=True)
            states[part] = "done"
            continue
        seconds = allowance(part, parts[place + 1 :], end - time.monotonic())
        if seconds <= 0:
            print(f"{part}: no time is left; run the same command again", flush=True)
            states[part] = NO_TIME
            continue
        print(f"{part}: at most {seconds:.0f} s, its output is in {options.out / part}.log", flush=True)
        entry = attempt(part, options, seconds) | machine
        report["parts"][part] = keep_best(report["parts"].get(part), entry, part)
        # The recipe and the data of a dry run need not be those that the verdicts are about.
        is_dry = options.rehearse or options.recipe or options.data == SYNTHETIC
        report["verdicts"] = [] if is_dry else verdicts(report["parts"])
        write_json(path, report)
        if options.out == SAVED:
            try:
                write_readme(README, SAVED)
            except (OSError, UserError) as error:  # measuring the next part matters more
                print(f"warning: the README was not rewritten: {error}", file=sys.stderr, flush=True)
        print(f"{part}: {entry['state']}, {entry['seconds']:.0f} s", flush=True)
        states[part] = entry["state"]
    return {"states": states, "verdicts": report.get("verdicts", [])}


def allowance(part: str, later: Sequence[str], left: float) -> float:
    """Return the seconds that a part may take of those that it and the later parts have left."""
    share = left * MINUTES[part] / sum(MINUTES[name] for name in (part, *later))
    return min(left, max(share, LEAST_SECONDS.get(part, 0.0)))


def is_done(entry: Mapping[str, Any] | None, options: argparse.Namespace) -> bool:
    """Return whether a part has nothing left to measure at this commit."""
    return bool(entry) and entry["state"] == "done" and entry["commit"] == commit() and entry["runs"] >= options.runs


def attempt(part: str, options: argparse.Namespace, seconds: float) -> dict[str, Any]:
    """Run one part for at most `seconds`; return how it ended and what it has found."""
    for left in (f"{part}.json", f"{part}.xml"):  # by an earlier call; folders of runs stay
        (options.out / left).unlink(missing_ok=True)
    state, took = run_part(command_of(part, options, seconds), options.out / f"{part}.log", seconds)
    try:
        found = collect(part, options.out)
    except Exception as error:  # whatever one part has left behind, the others must be saved
        found, state = None, f"{state}, but its result cannot be read ({type(error).__name__})"
    ended = datetime.now(UTC).isoformat(timespec="seconds")
    about = {"state": state, "seconds": round(took, 1), "ended": ended, "commit": commit(), "runs": options.runs}
    return about | {"found": found}


def keep_best(before: dict[str, Any] | None, entry: dict[str, Any], part: str) -> dict[str, Any]:
    """Return what gpu.json keeps of a part: its new entry, or the old one with a note when the new one found less."""
    if not before or not before["found"]:
        return entry
    broke_off = part not in RESUMED and before["state"] == "done" and entry["state"] != "done"
    if not entry["found"] or broke_off:
        return before | {"later_attempt": {key: entry[key] for key in ("state", "ended", "commit")}}
    return entry


def main(argv: Sequence[str] | None = None) -> int:
    """Measure; the exit status is 0 when no part failed, 1 when one did, 2 when nothing can be measured here."""
    options = parse(sys.argv[1:] if argv is None else argv)
    options.out = options.out.resolve()
    if options.data and options.data != SYNTHETIC:
        options.data = str(Path(options.data).absolute())
    if options.child:
        options.end = time.monotonic() + options.seconds
        try:
            WORK[options.child](options)
        except OutOfTime as note:
            print(note)
            return OUT_OF_TIME
        return 0
    if options.readme:
        write_readme(README, options.out)
        return 0
    if options.device is None and not torch.cuda.is_available():
        print(
            "error: there is no GPU that torch can use, so nothing was measured; a dry run of the machinery is "
            "--device cpu --recipe smoke --data synthetic --runs 2 --only speedrun, and --rehearse simulates a GPU",
            file=sys.stderr,
        )
        return 2
    if options.out == SAVED and (dry := dry_run(options)):
        print(
            f"error: this is a dry run ({', '.join(dry)}), and {SAVED.relative_to(REPOSITORY)} holds what the README "
            "says about GPUs; name another --out",
            file=sys.stderr,
        )
        return 2
    load(options)  # downloaded and decoded before any part's time begins; an error ends it here
    outcome = measure(options)
    for verdict in outcome["verdicts"]:
        word = "met" if verdict["met"] else "NOT met"
        print(f"{word}: {verdict['what']}: {verdict['found']:.4g}, required {verdict['required']:.4g}")
    return 0 if set(outcome["states"].values()) <= {"done", "out of time", NO_TIME} else 1


if __name__ == "__main__":
    try:
        sys.exit(main())
    except UserError as error:
        sys.exit(f"error: {error}")
