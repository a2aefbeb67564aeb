"""Measures everything that needs a GPU, in one command, and files it in one JSON.

    python benchmarks/gpu.py --out benchmarks/results/gpu                            # every part, on the GPUs there are
    python benchmarks/gpu.py --out benchmarks/results/gpu --parts speedrun airbench  # some; the others stay as filed
    python benchmarks/gpu.py --out /tmp/dry --device cpu --recipe smoke --data synthetic --runs 2 --parts speedrun

Parts, each a command of its own that is ended after 8 minutes, with what it has finished kept; run again, `speedrun`,
`apple` and `recipes` go on with the runs that are missing:

    tests     pytest -m gpu
    profile   one step of speedrun: kernels by time, gaps, share of the matrix limit measured beside it; and what the
              CUDA graph and torch.compile are each worth
    speedrun  50 runs on one GPU, and 10 on all of them where there are several
    airbench  50 runs of PyPI's airbench (train94), where it is installed, with the same data, in the same hour
    apple     50 runs of apple_8gpu with its 8 shards, on as many GPUs as can share them
    start     two fresh commands, `cifar-fast train --recipe speedrun`: nothing compiled, then what the first left
    recipes   every named recipe, in rounds of one run each

`gpu.json` in the folder is written anew, whole or not at all, after each part; `PART.log` has what the part printed.
What is filed in benchmarks/results/gpu is what notebooks 03, 11 and 12 show and what the README says of GPUs, which is
rewritten after each part; a dry run (another device, recipe or data set than the parts are about) is not filed there.
What was measured elsewhere and copied there gets into the README by `--out benchmarks/results/gpu --readme`.

The first hour on a GPU checks, in this order:

 1. `--parts tests`. First look at test_a_captured_function_repeats_its_work_on_new_inputs, then at
    test_the_captured_step_gives_the_eager_steps_weights (muon, then sgd), then at the compiled ones, NCCL last.
 2. `cifar-fast train --recipe speedrun --cuda-graph on --compile off`, then `--cuda-graph off --compile on`, then both:
    no warning, and `launch`, `compiled` and `launch_reason` in result.json as asked for. Where a warning gives a
    reason, that comes first.
 3. `--parts profile`: which of the two pays; the gaps (none above a few microseconds inside a graph); the kernels at
    the top. If batch norm or the augmentation is among them although compiled, they were not fused. `orthogonalise_us`:
    if by shape is the faster, so be it (`optim.orthogonalise_all`). If a scatter of the max-pool's backward pass stands
    out, take its decomposition from Inductor before the first compilation, with another TORCHINDUCTOR_CACHE_DIR:
    `torch._inductor.decomposition.decompositions.pop(torch.ops.aten.max_pool2d_with_indices_backward.default)`.
 4. `--parts speedrun airbench`: mean accuracy at least 94.0 %, mean train_seconds at most 0.9, three times airbench's
    speed. Short of accuracy: n_shards=1 (batch norm over all 1536 images, as Hiverge has it), then epochs=10. Accurate
    to spare: fewer epochs. float16 against bfloat16 (`--precision bfloat16`) at the same number of epochs.
 5. `tta_margin=0.5` against 1: the same accuracy to 0.01 % over the runs' networks, or a larger margin.
 6. `--parts apple`: 41 of 50 runs at 94 % and a median of 94.19 % were published.
 7. `--parts start`: under 20 s the first time, under 12 s after.
 8. With several GPUs: the parallel tests, then speedrun and apple on all; each rank's graph holds the all-reduce.
 9. `--parts recipes`, as often as it takes for three rounds; then `cifar-fast notebooks 03 11 12 --execute`.
"""

from __future__ import annotations

import argparse
import importlib.util
import io
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from contextlib import redirect_stdout
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from revision import commit

import cifar_fast as cf
from cifar_fast.data.dataset import SYNTHETIC, Dataset
from cifar_fast.data.load import load_cifar10
from cifar_fast.data.synthetic import synthetic
from cifar_fast.errors import UserError
from cifar_fast.experiments import gpu_report as gpu_results
from cifar_fast.experiments.statistics import summarise
from cifar_fast.files import write_text
from cifar_fast.hardware.cuda_graph import CapturedFunction
from cifar_fast.hardware.device import environment, select_device
from cifar_fast.recipe import Recipe
from cifar_fast.training.batches import steps_per_epoch
from cifar_fast.training.model import build_model
from cifar_fast.training.optim import orthogonalise_by_shape, orthogonalise_padded
from cifar_fast.training.result import RunResult, write_json

PARTS = ("tests", "profile", "speedrun", "airbench", "apple", "start", "recipes")
PART_SECONDS = 480.0
"""After which a part is ended; a part that can stop by itself does so `STOP_EARLY` seconds sooner."""
STOP_EARLY = 30.0
ROUNDS = 3
"""Runs of each recipe in `recipes`."""
PROFILED_STEPS = 10
KERNELS_SHOWN = 25
TARGET = 0.94
REPOSITORY = Path(__file__).resolve().parents[1]
FILED = REPOSITORY / "benchmarks" / "results" / "gpu"
"""What is filed here is what the README and the notebooks tell."""
README = REPOSITORY / "README.md"
BEGIN, END = "<!-- gpu.json: begin -->\n", "\n<!-- gpu.json: end -->"
"""Around what this script writes in the README."""
RESULT = gpu_results.FILE
ANEW = ("tests", "profile", "airbench", "start")
"""Parts that begin from nothing each time; the others go on with the runs that are there."""


class OutOfTime(UserError):
    """The part's time is used up; what is finished is filed."""


# --- the parts: each runs in a process of its own and files what it finds as it goes ---


def part_profile(options: argparse.Namespace) -> None:
    """Compare graph and compiler in turns, then look at the kernels of a few steps."""
    recipe, data = chosen("speedrun", options), load(options)
    found: dict[str, Any] = {"recipe": recipe.to_dict(), "dataset": data.describe(), "ways": {}}
    path = options.out / "profile.json"
    for graph, compiler in (("auto", "auto"), ("auto", "off"), ("off", "auto"), ("off", "off")):
        way = replace(recipe, cuda_graph=graph, compile=compiler)
        runs = [cf.train(way, data, device=options.device, seed=seed, progress=False) for seed in range(2)]
        # The second is the one that counts: in the first all is loaded, compiled and measured for the first time.
        found["ways"][f"cuda_graph={graph} compile={compiler}"] = [brief(run) for run in runs]
        write_json(path, found)
    if select_device(options.device).type != "cuda":
        found["step"] = "not profiled: there is no GPU"
        write_json(path, found)
        return
    found["limit"] = matrix_limit(torch.device(options.device or "cuda"))
    write_json(path, found)
    try:
        found["orthogonalise_us"] = orthogonalising(recipe, torch.device(options.device or "cuda"))
    except RuntimeError as error:  # what cannot be recorded must not cost the step its profile
        found["orthogonalise_us"] = f"not measured: {error}".partition("\n")[0]
    write_json(path, found)
    try:
        found["step"] = analyse(profiled_kernels(recipe, data, options.device), PROFILED_STEPS)
    except UserError as error:  # a profiler that comes after the recording sees nothing in some versions of CUPTI
        found["not_profiled"] = f"the step as it is: {error}"
        write_json(path, found)
        eager = replace(recipe, cuda_graph="off")
        found["step"] = analyse(profiled_kernels(eager, data, options.device), PROFILED_STEPS)
    best = max(found["limit"]["tflops"].values()) * 1e12
    found["step"]["network_flops"] = flops = training_flops(recipe) * recipe.global_batch_size
    found["step"]["share_of_limit"] = flops / (found["step"]["us_a_step"] * 1e-6) / best
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
    """Run every recipe once, then every recipe again, until the time is over."""
    names = [options.recipe] if options.recipe else cf.recipes.names()
    for round_ in range(1, ROUNDS + 1):
        for name in names:
            recipe = cf.recipes.named(name)
            repeat(recipe, options, options.out / "recipes" / name, min(round_, options.runs), world_size=None)


def part_airbench(options: argparse.Namespace) -> None:
    """Run PyPI's airbench on the same images, and file its own clock and accuracy."""
    found: dict[str, Any] = {"runs": []}
    path = options.out / "airbench.json"
    if importlib.util.find_spec("airbench") is None:
        write_json(path, found | {"left_out": "airbench is not installed: pip install airbench"})
        return
    if select_device(options.device).type != "cuda":
        write_json(path, found | {"left_out": "airbench needs a GPU"})
        return
    from importlib.metadata import version

    import airbench

    data, end = load(options), time.monotonic() + options.seconds - STOP_EARLY
    found |= {"version": version("airbench"), "recipe": {"name": "train94"}, "dataset": data.describe()}
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        lay_out_for_airbench(data, Path("cifar10"))
        start = time.monotonic()
        airbench.warmup94()
        found["warm_up_seconds"] = time.monotonic() - start
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
    """Start the command twice: with nothing compiled, then with what the first has left."""
    found: dict[str, Any] = {}
    name = options.recipe or "speedrun"
    with tempfile.TemporaryDirectory() as folder:
        for which in ("first", "second"):
            out = Path(folder) / which
            command = [sys.executable, "-m", "cifar_fast", "train", "--recipe", name, "--out", str(out)]
            command += ["--device", options.device] if options.device else []
            command += ["--data", options.data] if options.data else []
            compiled = os.environ | {"TORCHINDUCTOR_CACHE_DIR": str(Path(folder) / "compiled")}
            start = time.monotonic()
            subprocess.run(command, check=True, env=compiled)
            keys = ("total_seconds", "warm_up_seconds", "first_step_seconds", "train_seconds", "evaluate_seconds")
            result = json.loads((out / "result.json").read_text())
            # As the command saw them: without CIFAR-10 it trains on the synthetic set, and it takes every GPU it can.
            found |= {key: result[key] for key in ("recipe", "dataset", "environment")}
            found[which] = {key: result[key] for key in ("accuracy", *keys)}
            found[which]["command_seconds"] = time.monotonic() - start
            write_json(options.out / "start.json", found)


WORK: dict[str, Callable[[argparse.Namespace], None]] = {
    "profile": part_profile,
    "speedrun": part_speedrun,
    "airbench": part_airbench,
    "apple": part_apple,
    "start": part_start,
    "recipes": part_recipes,
}


# --- what they use ---


def chosen(name: str, options: argparse.Namespace) -> Recipe:
    """Return the named recipe, or the one that a dry run takes in its place."""
    return cf.recipes.named(options.recipe or name)


def load(options: argparse.Namespace) -> Dataset:
    """Return CIFAR-10, or what `--data` names."""
    return synthetic() if options.data == SYNTHETIC else load_cifar10(options.data)


def brief(result: RunResult) -> dict[str, Any]:
    """Return what is compared of a run."""
    words = ("precision", "launch", "compiled", "launch_reason")
    clocks = ("accuracy", "train_seconds", "warm_up_seconds", "evaluate_seconds", "total_seconds")
    return {name: getattr(result, name) for name in clocks} | {word: result.environment[word] for word in words}


def repeat(recipe: Recipe, options: argparse.Namespace, out: Path, runs: int, world_size: int | None) -> None:
    """Benchmark a recipe, going on with what is there; leave with `OutOfTime` when another run would take too long."""
    end, started, revision = options.end - STOP_EARLY, [time.monotonic()], commit()

    def look(line: dict[str, Any]) -> None:
        started.append(time.monotonic())
        if revision not in commits(out):  # a later call may go on with these runs at another commit
            with (out / COMMITS).open("a") as file:
                file.write(revision + "\n")
        print(f"{recipe.name}: run {line['run']}: {line['accuracy']:.2%} in {line['train_seconds']:.3f} s", flush=True)
        if line["run"] + 1 < runs and started[-1] + (started[-1] - started[-2]) > end:
            raise OutOfTime(f"{line['run'] + 1} of {runs} runs of {recipe.name} are filed; run the part again")

    if time.monotonic() > end:
        raise OutOfTime(f"nothing of {recipe.name} was started; run the part again")
    cf.benchmark(
        recipe, load(options), runs=runs, world_size=world_size, device=options.device, out=out, progress=False,
        on_run=look, target=TARGET,
    )  # fmt: skip


COMMITS = "commits.txt"


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
    """Return how long each way to orthogonalise a step's filters takes, recorded: the median in microseconds."""
    model = build_model(recipe, 10, torch.zeros(3), torch.ones(3))
    filters = [p for p in model.parameters() if p.requires_grad and p.ndim == 4]
    matrices = [torch.randn(len(p), p[0].numel(), device=device) for p in filters]
    ways = {"all at once, padded": orthogonalise_padded, "by shape": orthogonalise_by_shape}
    recorded: dict[str, CapturedFunction] = {}
    for name, way in ways.items():

        def half(*given: torch.Tensor, way: Callable = way) -> list[torch.Tensor]:
            with torch.autocast("cuda", torch.float16):
                return way(list(given))

        recorded[name] = CapturedFunction(half, *matrices)
    seconds: defaultdict[str, list[float]] = defaultdict(list)
    for _ in range(repeats):
        for name, replay in recorded.items():
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            replay(*matrices)
            end.record()
            torch.cuda.synchronize(device)
            seconds[name].append(start.elapsed_time(end) * 1e3)
    return {name: statistics.median(each) for name, each in seconds.items()}


def profiled_kernels(recipe: Recipe, data: Dataset, device: str | None) -> list[tuple[str, float, float]]:
    """Return what ran on the GPU in some steps in the middle of a training: name, start and end in microseconds."""
    from torch.autograd import DeviceType
    from torch.profiler import ProfilerActivity, profile

    profiler = profile(activities=[ProfilerActivity.CUDA])
    first = steps_per_epoch(recipe, len(data.train_labels)) + 5  # the whitening bias is frozen, all is in its course

    def watch(done: int, total: int) -> None:
        if done in (first, first + PROFILED_STEPS):
            torch.cuda.synchronize()
            (profiler.start if done == first else profiler.stop)()

    cf.train(recipe, data, device=device, progress=False, on_step=watch)
    events = [event for event in profiler.events() if event.device_type == DeviceType.CUDA]
    return [(event.name, float(event.time_range.start), float(event.time_range.end)) for event in events]


def analyse(kernels: Iterable[tuple[str, float, float]], n_steps: int) -> dict[str, Any]:
    """Return kernels by time, and how long the GPU was busy and idle, for (name, start, end) in microseconds."""
    in_order = sorted(kernels, key=lambda kernel: kernel[1])
    if not in_order:
        raise UserError("the profiler has seen no kernel: CUPTI may be missing, or not allowed to this user")
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
    """Count the operations of the network's products, forward and backward, for one image."""
    from torch.utils.flop_counter import FlopCounterMode

    n = recipe.norm_group_size
    model = build_model(recipe, 10, torch.zeros(3), torch.ones(3)).to("meta")
    with FlopCounterMode(display=False) as counter:
        model(torch.empty(n, 3, side, side, device="meta")).sum().backward()
    return counter.get_total_flops() / n


def lay_out_for_airbench(data: Dataset, folder: Path) -> None:
    """Write the two files that airbench looks for before it would download."""
    folder.mkdir()
    for name, images, labels in (
        ("train", data.train_images, data.train_labels),
        ("test", data.test_images, data.test_labels),
    ):
        content = {"images": images.permute(0, 2, 3, 1).contiguous(), "labels": labels, "classes": list(data.classes)}
        torch.save(content, folder / f"{name}.pt")


def read_airbench(printed: str) -> dict[str, float]:
    """Return accuracy and seconds of one run from the table that airbench prints.

    Its last line counts the evaluation with TTA as well; the line before it is the end of training.
    """
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in printed.splitlines() if line.startswith("|")]
    rows = [row for row in rows if len(row) == 7 and (row[1].isdigit() or row[1] == "eval")]
    if len(rows) < 2 or rows[-1][1] != "eval":
        raise UserError(f"airbench printed another table than that of version 0.1.8: {printed[-500:]!r}")
    return {"accuracy": float(rows[-1][5]), "train_seconds": float(rows[-2][6]), "with_tta_seconds": float(rows[-1][6])}


# --- from files to one JSON ---


def saved_runs(folder: Path) -> dict[str, Any] | None:
    """Return the summary of a benchmark folder, and what its runs have in common; None where no run is finished."""
    try:
        runs = cf.load_benchmark(folder).runs
    except UserError:
        return None
    machine = runs[-1]["environment"]
    words = ("gpu", "world_size", "precision", "launch", "compiled", "launch_reason")
    warm_up = statistics.mean(run.get("warm_up_seconds", 0.0) for run in runs)
    return {
        "summary": summarise(runs, TARGET),
        "warm_up_seconds_mean": warm_up,
        "commits": commits(folder),
        **{word: machine.get(word) for word in words},
    }


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


BAD = ("failure", "error", "skipped")


def collect(part: str, out: Path) -> Any:
    """Return what a part has filed so far, finished or not; None for nothing."""
    if part == "tests":
        return read_tests(out / "tests.xml")
    if part == "speedrun":
        return {name: found for name in ("speedrun", "speedrun_all_gpus") if (found := saved_runs(out / name))} or None
    if part == "apple":
        return saved_runs(out / "apple_8gpu")
    if part == "recipes":
        names = cf.recipes.names()
        found = {name: summary for name in names if (summary := saved_runs(out / "recipes" / name))}
        return {"recipes": found, "missing": [name for name in names if name not in found]} if found else None
    return read_json(out / f"{part}.json")


def verdicts(parts: dict[str, Any]) -> list[dict[str, Any]]:
    """Return what is required of a GPU, what was found, and whether it is enough, as far as parts found something."""
    found: dict[str, Any] = {name: entry["found"] for name, entry in parts.items() if entry["found"]}
    checks: list[tuple[str, float, float, bool]] = []
    if tests := found.get("tests"):
        bad = sum(len(tests[tag]) for tag in BAD)
        checks.append(("GPU tests that failed or were skipped", bad, 0, bad == 0))
    speedrun = (found.get("speedrun") or {}).get("speedrun")
    if speedrun:
        accuracy, seconds = (speedrun["summary"][key]["mean"] for key in ("accuracy", "train_seconds"))
        checks.append(("speedrun: mean accuracy", accuracy, TARGET, accuracy >= TARGET))
        checks.append(("speedrun: mean train_seconds", seconds, 0.9, seconds <= 0.9))
        if runs := (found.get("airbench") or {}).get("runs"):
            ratio = statistics.mean(run["train_seconds"] for run in runs) / seconds
            checks.append(("speedrun: times as fast as airbench, both without evaluation", ratio, 3, ratio >= 3))
    if apple := found.get("apple"):
        median, share = apple["summary"]["accuracy"]["median"], apple["summary"]["at_target"] / apple["summary"]["n"]
        checks.append(("apple_8gpu: median accuracy", median, 0.9419, median >= 0.9419))
        checks.append(("apple_8gpu: share of runs at 94 %", share, 41 / 50, share >= 41 / 50))
    if start := found.get("start"):
        for which, most in (("first", 20), ("second", 12)):
            if which in start:
                seconds = start[which]["total_seconds"]
                checks.append((f"total_seconds of the {which} command", seconds, most, seconds < most))
    return [dict(zip(("what", "found", "required", "met"), check, strict=True)) for check in checks]


# --- the caller ---


def run_part(command: Sequence[str], log: Path, seconds: float) -> tuple[str, float]:
    """Run a command with its output in `log`; return how it ended and after how long. It is ended after `seconds`."""
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
        finally:  # Ctrl-C too: nobody stays behind
            if process.poll() is None:
                end(process)
    return state, time.monotonic() - start


OUT_OF_TIME = 75


def end(process: subprocess.Popen) -> None:
    """End a process and all that it has started, the second time without asking."""
    for how in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(process.pid, how)
            process.wait(10)
            return
        except (ProcessLookupError, subprocess.TimeoutExpired):
            continue


def command_of(part: str, options: argparse.Namespace) -> list[str]:
    """Return the command that does a part's work."""
    if part == "tests":
        return [sys.executable, "-m", "pytest", "-v", "-m", "gpu", f"--junitxml={options.out / 'tests.xml'}"]
    command = [sys.executable, str(Path(__file__).resolve()), "--child", part, "--out", str(options.out)]
    command += ["--runs", str(options.runs), "--seconds", str(options.seconds)]
    for name in ("device", "recipe", "data"):
        if value := getattr(options, name):
            command += [f"--{name}", value]
    return command


def dry_run(options: argparse.Namespace) -> list[str]:
    """Return in what a call differs from measuring the recipes on CIFAR-10 on a GPU; nothing where it does not."""
    device = select_device(options.device).type
    return [
        *([f"device {device}"] if device != "cuda" else []),
        *([f"recipe {options.recipe}"] if options.recipe else []),
        *([f"data {SYNTHETIC}"] if options.data == SYNTHETIC else []),
    ]


def write_readme(readme: Path, folder: Path) -> None:
    """Replace what stands between the README's markers by what `folder`'s gpu.json says; raise `UserError` without."""
    text = readme.read_text()
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise UserError(f"{readme.name} has no lines {BEGIN.strip()} and {END.strip()} for what was measured")
    new = before + begin + gpu_results.readme_block(folder) + end + after
    write_text(readme, new)


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Run the parts one after the other and file each one's findings at once, beside those of earlier calls."""
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / RESULT
    report = read_json(path) or {"parts": {}}
    n_gpus = torch.cuda.device_count()
    machine = {
        "environment": environment(select_device(options.device)),
        "gpus": [torch.cuda.get_device_name(number) for number in range(n_gpus)],
        "dry_run": dry_run(options),
    }
    report |= machine  # of this call; each part keeps that of its own
    for part in options.parts:
        log = options.out / f"{part}.log"
        print(f"{part}: at most {options.seconds:.0f} s, what it prints is in {log}", flush=True)
        for left in (f"{part}.json", f"{part}.xml"):  # of an earlier call; folders of runs are gone on with
            (options.out / left).unlink(missing_ok=True)
        state, seconds = run_part(command_of(part, options), log, options.seconds)
        entry: dict[str, Any] = {
            "state": state,
            "seconds": round(seconds, 1),
            "ended": datetime.now(UTC).isoformat(timespec="seconds"),
            "commit": commit(),
            **machine,
        }
        try:
            entry["found"] = collect(part, options.out)
        except Exception as error:  # nothing that one part has left behind may cost the others their place
            entry |= {"found": None, "trouble": f"{type(error).__name__}: {error}"}
        before = report["parts"].get(part)
        if before and before.get("found") is None:
            before = before.get("earlier")  # an attempt that found nothing is not worth keeping
        if before and (entry["found"] is None or (part in ANEW and state != "done")):
            entry["earlier"] = before  # what this attempt did not get to may be there
        report["parts"][part] = entry
        # A dry run is of another recipe or other data than the verdicts are about.
        report["verdicts"] = [] if options.recipe or options.data == SYNTHETIC else verdicts(report["parts"])
        write_json(path, report)
        if options.out == FILED:
            try:
                write_readme(README, FILED)
            except (OSError, UserError) as error:  # what is measured next is worth more
                print(f"warning: the README was not rewritten: {error}", file=sys.stderr, flush=True)
        print(f"{part}: {state}, {seconds:.0f} s", flush=True)
    return report


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """Return the options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for gpu.json, logs and runs; gone on with")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--runs", type=int, default=50, help="runs of speedrun, apple and airbench")
    parser.add_argument("--seconds", type=float, default=PART_SECONDS, help="after which a part is ended")
    parser.add_argument("--device", help="cuda, or cpu for a dry run")
    parser.add_argument("--recipe", help="recipe in the place of every other, for a dry run")
    parser.add_argument("--data", help="folder of CIFAR-10, or synthetic")
    parser.add_argument("--readme", action="store_true", help="measure nothing; have the README tell what is in --out")
    parser.add_argument("--child", choices=tuple(WORK), help=argparse.SUPPRESS)
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Measure; the exit status is 0 when every part ended well, 1 when one did not, 2 when there is no GPU."""
    options = parse(sys.argv[1:] if argv is None else argv)
    options.out = options.out.resolve()
    if options.data and options.data != SYNTHETIC:
        options.data = str(Path(options.data).absolute())
    options.end = time.monotonic() + options.seconds
    if options.child:
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
            "--device cpu --recipe smoke --data synthetic --runs 2 --parts speedrun",
            file=sys.stderr,
        )
        return 2
    if options.out == FILED and (dry := dry_run(options)):
        print(
            f"error: this is a dry run ({', '.join(dry)}), and {FILED.relative_to(REPOSITORY)} is for what the README "
            "tells of GPUs; name another --out",
            file=sys.stderr,
        )
        return 2
    report = measure(options)
    for verdict in report["verdicts"]:
        word = "met" if verdict["met"] else "NOT met"
        print(f"{word}: {verdict['what']}: {verdict['found']:.4g}, required {verdict['required']:.4g}")
    return 0 if all(report["parts"][part]["state"] == "done" for part in options.parts) else 1


if __name__ == "__main__":
    try:
        sys.exit(main())
    except UserError as error:
        sys.exit(f"error: {error}")
