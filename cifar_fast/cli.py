"""The command line: arguments become calls of the package, their results become text; nothing is computed here.

Only what is quick to load is imported at the top, so that help and mistakes in the arguments do not wait for torch.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, NoReturn

import tyro
from tyro import conf

from cifar_fast import recipes
from cifar_fast.errors import RankError, TrainingError, UserError
from cifar_fast.experiments.statistics import data_set, hardware
from cifar_fast.experiments.tables import percent, table
from cifar_fast.recipe import Recipe, changed_fields
from cifar_fast.teaching import notebooks

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from torch import Tensor

    from cifar_fast.data.dataset import Dataset
    from cifar_fast.training.evaluate import Evaluation
    from cifar_fast.training.result import EpochResult, RunResult


DataOption = Annotated[str | None, conf.arg(metavar="PATH|synthetic")]
MirrorOption = Annotated[tuple[str, ...], conf.arg(metavar="URL"), conf.UseAppendAction]
DeviceOption = Annotated[str | None, conf.arg(metavar="cpu|cuda|cuda:N")]
WorldSizeOption = Annotated[int | None, conf.arg(metavar="N")]
BackendOption = Annotated[Literal["nccl", "gloo"] | None, conf.arg(metavar="nccl|gloo")]
Switch = Annotated[bool, conf.FlagCreatePairsOff]


@dataclass(kw_only=True)
class Train:
    """Train a network and say how well and how fast; every field of the recipe is an option.

    Without --recipe the hardware decides: `apple_8gpu` with 2, 4 or 8 GPUs, `speedrun` with one, `laptop` without.
    """

    recipe: Annotated[str | None, conf.arg(metavar="NAME")] = None
    """Recipe to start from: laptop, classroom, speedrun, apple_8gpu, smoke, or a rung like page_2019."""
    data: DataOption = None
    """Folder of the data set, or `synthetic` (embedded). Default: CIFAR_FAST_DATA, the cache folder, a download."""
    mirror: MirrorOption = ()
    """Another place to download CIFAR-10 from; may be given more than once."""
    seed: int = 0
    """Seed of all random choices."""
    out: Annotated[Path | None, conf.arg(metavar="FOLDER")] = None
    """New folder for logs, result and weights. Default: runs/NAME-seedN-DATE-TIME."""
    device: DeviceOption = None
    """Where to train. Default: all GPUs, else the CPU."""
    world_size: WorldSizeOption = None
    """Number of processes that share the recipe's shards. Default: one for each GPU, or one on a CPU."""
    backend: BackendOption = None
    """What the processes talk over. Default: nccl on GPUs, gloo on a CPU."""
    timeout: float = 10.0
    """Seconds within which a process that died or no longer answers has ended all of them."""
    quiet: Switch = False
    """Print the result alone."""
    fields: Annotated[Recipe, conf.arg(name=""), conf.FlagConversionOff]

    def run(self) -> int:
        """Train, save, print a table."""
        from tqdm.auto import tqdm

        from cifar_fast.distributed.launch import choose_world_size, launch
        from cifar_fast.hardware.clock import process_start

        silence_other_ranks()
        base, why = base_recipe(self.recipe, self.device)
        recipe, changes = renamed_if_changed(self.fields, base), changed_fields(base, self.fields)
        stamp = time.strftime("%Y%m%d-%H%M%S")
        out = self.out or Path("runs") / f"{recipe.name}-seed{self.seed}-{stamp}"
        world_size = choose_world_size(self.world_size, self.device, recipe)
        if not self.quiet:
            print_recipe(base, why, changes, world_size)
        data = open_data(self.data, self.mirror)
        if not self.quiet:
            print(f"data set: {data.name} ({data.source})\nrun folder: {out}", flush=True)

        logged: list[EpochResult] = []

        def on_epoch(epoch: EpochResult) -> None:
            logged.append(epoch)
            if not self.quiet:
                tqdm.write(
                    f"epoch {epoch.epoch:3}  {epoch.train_seconds:8.2f} s  test accuracy {percent(epoch.test_accuracy)}"
                )

        try:
            result = launch(
                recipe,
                data,
                world_size=world_size,
                device=self.device,
                backend=self.backend,
                timeout=self.timeout,
                seed=self.seed,
                out=out,
                progress=not self.quiet and sys.stderr.isatty(),  # in a log file each epoch's line is enough
                started=process_start(),
                on_epoch=on_epoch,
            )
        except KeyboardInterrupt:
            kept = f"{len(logged)} finished epochs are logged in {out}" if logged else "no epoch was finished"
            if is_main_rank():
                print(f"\ninterrupted: {kept}", file=sys.stderr)
            return 130
        except TrainingError as error:
            raise TrainingError(f"{error}; {len(logged)} finished epochs are logged in {out}") from error
        print(result_table(result, out))
        if is_main_rank():
            save_learning_curve(result, out)
        return 0


@dataclass(kw_only=True)
class Benchmark:
    """Train a recipe many times, each time with another seed, and set the runs beside the published 50.

    Runs are kept as they finish: interrupted or killed, the same command goes on after the last of them. Every field
    of the recipe is an option, as for `train`.
    """

    recipe: Annotated[str | None, conf.arg(metavar="NAME")] = None
    """Recipe to start from: apple_8gpu is the published one. Default: by the hardware, as for `train`."""
    runs: int = 50
    """Number of runs; those that are in the folder already count."""
    target: Annotated[float, conf.arg(metavar="PERCENT")] = 94.0
    """Test accuracy, in per cent, that counts as reached."""
    until_confident: Switch = False
    """Stop when the 95 % interval of the mean accuracy (of 3 runs at least) leaves out the target."""
    first_seed: int = 0
    """Seed of the first run; each run takes the next one."""
    data: DataOption = None
    """Folder of the data set, or `synthetic` (embedded). Default: as for `train`."""
    mirror: MirrorOption = ()
    """Another place to download CIFAR-10 from; may be given more than once."""
    out: Annotated[Path | None, conf.arg(metavar="FOLDER")] = None
    """Folder of the runs, new or to go on with. Default: runs/benchmark-NAME-RUNS."""
    device: DeviceOption = None
    """Where to train. Default: all GPUs, else the CPU."""
    world_size: WorldSizeOption = None
    """Number of processes that share the recipe's shards. Default: one for each GPU, or one on a CPU."""
    backend: BackendOption = None
    """What the processes talk over. Default: nccl on GPUs, gloo on a CPU."""
    timeout: float = 10.0
    """Seconds within which a process that died or no longer answers has ended all of them."""
    quiet: Switch = False
    """Print the result alone."""
    fields: Annotated[Recipe, conf.arg(name=""), conf.FlagConversionOff]

    def run(self) -> int:
        """Train the runs that are missing, print all of them beside the published ones, draw them."""
        from tqdm.auto import tqdm

        from cifar_fast.distributed.launch import choose_world_size
        from cifar_fast.experiments.benchmark import benchmark, run_line
        from cifar_fast.experiments.tables import comparison_table

        silence_other_ranks()
        if 0 < self.target <= 1:
            raise UserError(
                f"--target {self.target:g} is a share; it is given in per cent: --target {100 * self.target:g}"
            )
        if not 0 < self.target <= 100:
            raise UserError(f"--target {self.target:g} must be an accuracy in per cent, above 1 and at most 100")
        base, why = base_recipe(self.recipe, self.device)
        recipe = renamed_if_changed(self.fields, base)
        out = self.out or Path("runs") / f"benchmark-{recipe.name}-{self.runs}"
        world_size = choose_world_size(self.world_size, self.device, recipe)
        if not self.quiet:
            print_recipe(base, why, changed_fields(base, recipe), world_size)
        data = open_data(self.data, self.mirror)
        if not self.quiet:
            print(f"data set: {data.name} ({data.source})\nfolder: {out}", flush=True)

        def on_run(line: dict[str, Any]) -> None:
            if not self.quiet:
                tqdm.write(run_line(line, self.runs))

        try:
            found = benchmark(
                recipe,
                data,
                runs=self.runs,
                world_size=world_size,
                device=self.device,
                backend=self.backend,
                out=out,
                target=self.target / 100,
                until_confident=self.until_confident,
                first_seed=self.first_seed,
                progress=not self.quiet and sys.stderr.isatty(),
                timeout=self.timeout,
                on_run=on_run,
            )
        except KeyboardInterrupt:
            print(f"\ninterrupted: {finished_runs(out)}; the same command goes on", file=sys.stderr)
            return 130
        except (TrainingError, RankError):
            print(f"note: {finished_runs(out)}", file=sys.stderr)
            raise
        if len(found.runs) < self.runs:
            print(f"stopped: the 95 % interval of the mean accuracy leaves out {percent(found.target)}")
        print(f"\n{comparison_table(found.summary())}\nfolder: {out}")
        if is_main_rank():
            from cifar_fast.teaching.result_plots import accuracy_and_time

            save_figure(lambda: accuracy_and_time(found), out / "accuracy_and_time.png")
        return 0


@dataclass(kw_only=True)
class Evaluate:
    """Evaluate a trained network: accuracy, loss, and which classes it takes for which."""

    run_folder: Annotated[conf.Positional[Path], conf.arg(metavar="RUN")]
    """Folder of a finished run."""
    data: DataOption = None
    """Folder of the data set, or `synthetic`. Default: as for `train`; `synthetic` where the run was trained on it."""
    mirror: MirrorOption = ()
    """Another place to download CIFAR-10 from; may be given more than once."""
    tta: Literal["none", "flip", "flip_shift"] | None = None
    """Test-time augmentation. Default: the recipe's."""
    device: DeviceOption = None
    """Where to compute. Default: the first GPU, else the CPU."""

    def run(self) -> int:
        """Evaluate and print two tables."""
        from cifar_fast.data.dataset import SYNTHETIC
        from cifar_fast.data.load import load_cifar10
        from cifar_fast.data.synthetic import synthetic
        from cifar_fast.hardware.device import select_device
        from cifar_fast.training.evaluate import evaluate
        from cifar_fast.training.result import load_run

        result = load_run(self.run_folder)
        trained_on = result.dataset
        use_synthetic = self.data == SYNTHETIC or (self.data is None and trained_on["name"] == SYNTHETIC)
        data = synthetic() if use_synthetic else load_cifar10(self.data, mirrors=self.mirror)
        n_known = len(trained_on["classes"])
        if data.n_classes != n_known:
            raise UserError(
                f"the network in {self.run_folder} knows {n_known} classes and {data.name} has {data.n_classes}; "
                f"name the data set it was trained on ({trained_on['name']}) with --data"
            )
        tta = self.tta or result.recipe.tta
        device = select_device(self.device)
        found = evaluate(result.model.to(device), data.test_images, data.test_labels, tta=tta)
        then = f"{percent(result.accuracy)} (TTA: {result.recipe.tta})"
        rows = [
            ("run", str(self.run_folder)),
            ("recipe", result.recipe.name),
            ("data set", f"{data.name}, {len(data.test_labels):,} test images"),
            ("accuracy", f"{percent(found.accuracy)} (TTA: {tta})"),
            ("loss", f"{found.loss:.4f}"),
            ("when trained", f"{then} in {result.environment['precision']}; here in float32"),
        ]
        print(table(rows))
        if data.fingerprint != trained_on["fingerprint"]:
            print(
                f"note: these are not the data of the run: {data.name} has the fingerprint {data.fingerprint}, "
                f"the run's {trained_on['name']} has {trained_on['fingerprint']}"
            )
        if list(data.classes) != trained_on["classes"]:
            print(f"note: the network's classes have other names: {', '.join(trained_on['classes'])}")
        print("\n" + class_table(found, data.classes))
        return 0


@dataclass(kw_only=True)
class Predict:
    """Say what is in pictures of any size: the centre square is scaled down to 32x32 pixels."""

    run_folder: Annotated[conf.Positional[Path], conf.arg(metavar="RUN")]
    """Folder of a finished run."""
    images: Annotated[conf.Positional[tuple[Path, ...]], conf.arg(metavar="IMAGE [IMAGE ...]")]
    """Picture files."""
    top: int = 3
    """Number of classes to print for each picture."""

    def run(self) -> int:
        """Read all pictures, then predict and print a line for each."""
        import torch

        from cifar_fast.training.evaluate import predict_probabilities
        from cifar_fast.training.result import load_run

        if not self.images:
            raise UserError("no picture is named: cifar-fast predict RUN IMAGE [IMAGE ...]")
        result = load_run(self.run_folder)
        classes = result.dataset["classes"]
        if not 1 <= self.top <= len(classes):
            raise UserError(f"--top {self.top} must be from 1 to {len(classes)}, the number of classes")
        pictures = torch.stack([read_picture(path) for path in self.images])  # (N, 3, 32, 32)
        best = predict_probabilities(result.model, pictures, tta=result.recipe.tta).topk(self.top)
        print(f"network: {result.recipe.name}, trained on data set: {result.dataset['name']}")
        rows = []
        for path, values, labels in zip(self.images, best.values.tolist(), best.indices.tolist(), strict=True):
            guesses = [f"{classes[label]} {percent(value)}" for value, label in zip(values, labels, strict=True)]
            rows.append((str(path), *guesses))
        print(table(rows))
        return 0


@dataclass(kw_only=True)
class Data:
    """Say which data sets are there and check every file of them; download CIFAR-10 with --download."""

    download: Switch = False
    """Download CIFAR-10 into the cache folder, unless it is there."""
    data: Annotated[str | None, conf.arg(metavar="PATH")] = None
    """A folder to look at before the others."""
    mirror: MirrorOption = ()
    """Another place to download from; may be given more than once."""

    def run(self) -> int:
        """Print the state; the exit status is 1 when `train` would find no usable data set on this machine."""
        from cifar_fast.data.download import download_cifar10
        from cifar_fast.data.load import status

        if self.download:
            print(f"downloaded: {download_cifar10(self.mirror)}")
        elif self.mirror:
            raise UserError("--mirror is a place to download from: add --download")
        places = status(self.data)
        for place in places:
            print(f"{place.origin}: {place.path}\n  {place.finding}")
            if place.decoded:
                print(f"  decoded copy: {place.decoded}")
        if places[0].usable:
            print(f"`train` reads {places[0].origin}.")
        elif len(places) == 1:
            print("`train` would download CIFAR-10; so does `cifar-fast data --download`.")
        else:
            print(f"`train` would stop: {places[0].origin} comes first and is not usable.")
        return 0 if places[0].usable else 1


@dataclass(kw_only=True)
class Doctor:
    """Say what this machine has, which recipe and precision it would get, and why."""

    def run(self) -> int:
        """Print the table."""
        import torch

        from cifar_fast import __version__
        from cifar_fast.data.load import status
        from cifar_fast.hardware.cuda_graph import choose_step_mode
        from cifar_fast.hardware.device import environment, select_device
        from cifar_fast.hardware.numerics import choose_numerics
        from cifar_fast.kernels import amx, fused, winograd

        device = select_device()
        machine = environment(device)
        recipe, why = base_recipe(None, None)
        numerics = choose_numerics(recipe, device)
        mode = choose_step_mode(recipe, device)
        kernels = {
            "Winograd": winograd.available(),
            "AMX": amx.available(),
            "norm and activation": fused.available(),
        }
        gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
        place = status()[0]
        rows = [
            ("processor", f"{machine['cpu']}, {machine['cores']} cores for this process, {machine['threads']} threads"),
            ("CPU capability", machine["cpu_capability"]),
            ("memory", f"{machine['memory_gb']} GB"),
            ("GPUs", ", ".join(gpus) or "none that torch can use"),
            ("system", machine["platform"]),
            ("python", machine["python"]),
            ("cifar_fast", __version__),
            *((name, version(name)) for name in ("torch", "torchvision", "numpy", "matplotlib", "jupyterlab")),
            ("recipe", f"{recipe.name} ({why})"),
            ("precision", f"{numerics.dtype}".removeprefix("torch.")),
            ("convolution", numerics.convolution),
            ("because", numerics.reason),
            ("step", "; ".join([mode.describe()["step_mode"], *mode.reasons])),
            *(
                (f"{name} kernels", "compiled" if compiled else f"none: {detail}")
                for name, (compiled, detail) in kernels.items()
            ),
            ("data set", f"{place.origin}: {place.finding}"),
        ]
        print(table(rows))
        return 0


@dataclass(kw_only=True)
class Plan:
    """Predict how long a recipe would train on 1 to 64 workers, from steps measured on this machine.

    A prediction, not a measurement: time to compute and to launch is measured here, and the all-reduce among the
    processes that this machine has room for; that among others is taken from published measurements.
    """

    recipe: Annotated[str, conf.arg(metavar="NAME")] = "apple_8gpu"
    """Recipe to plan."""
    world_size: Annotated[int | None, conf.arg(metavar="N")] = None
    """A number of workers to predict, beside those of 1, 2, 4, ... 64 that the recipe allows."""
    n_shards: Annotated[int | None, conf.arg(metavar="N")] = None
    """Cut the training set in so many shards, so that so many workers can share it. Default: the recipe's."""
    link: Literal["nvlink_nccl", "nvlink_multicast"] = "nvlink_nccl"
    """What joins the workers; the published figures are those of 8 H100."""
    n_train: int = 50_000
    """Training images."""
    n_test: int = 10_000
    """Test images."""
    device: DeviceOption = None
    """Where to measure. Default: the first GPU, else the CPU."""
    out: Annotated[Path | None, conf.arg(metavar="PNG")] = None
    """File for a picture of the prediction."""

    def run(self) -> int:
        """Measure, then print the table."""
        from cifar_fast.experiments.all_reduce import measure_all_reduce, published_link
        from cifar_fast.experiments.plan import plan_table, predict_all
        from cifar_fast.experiments.step_costs import measure_step
        from cifar_fast.experiments.world_sizes import planned_world_sizes
        from cifar_fast.teaching.result_plots import predicted_scaling

        recipe = recipes.named(self.recipe)
        if self.n_shards not in (None, recipe.n_shards):
            recipe = replace(recipe, name=f"{recipe.name}-{self.n_shards}-shards", n_shards=self.n_shards)
        if recipe.resolutions:
            print(f"{recipe.name} is planned as if all epochs had images of full size: resolutions=()")
            recipe = replace(recipe, resolutions=())
        world_sizes = planned_world_sizes(recipe, self.world_size)
        if self.out and not self.out.parent.is_dir():
            raise UserError(f"--out {self.out}: there is no folder {self.out.parent}")
        print(f"measuring steps of {recipe.name} on random images", flush=True)
        measured = measure_step(
            recipe, device=self.device, n_train=self.n_train, n_test=self.n_test, world_sizes=world_sizes
        )
        link = published_link(self.link)
        all_reduce = measure_all_reduce(measured.n_parameters, precision=measured.precision, device=self.device)
        predictions = predict_all(
            measured, recipe, self.n_train, self.n_test, link, world_size=self.world_size, all_reduce=all_reduce
        )
        print(plan_table(predictions, measured, recipe, all_reduce))
        if self.out:
            try:
                predicted_scaling(predictions).savefig(self.out, dpi=150)
            except (OSError, ValueError) as error:
                raise UserError(f"--out {self.out} cannot be written: {error}") from error
        return 0


@dataclass(kw_only=True)
class Lab:
    """Open the notebooks in JupyterLab."""

    options: conf.Positional[tuple[str, ...]] = ()
    """Options for JupyterLab, after `--`: cifar-fast lab -- --no-browser."""

    def run(self) -> int:
        """Start JupyterLab in this process, which it leaves when it is shut down."""
        notebooks.find()  # says what is missing before JupyterLab starts
        try:
            from jupyterlab.labapp import LabApp
        except ModuleNotFoundError as error:
            raise UserError("JupyterLab is not installed: pip install 'cifar_fast[notebooks]'") from error
        LabApp.launch_instance([str(notebooks.FOLDER), *self.options])
        return 0


@dataclass(kw_only=True)
class Notebooks:
    """List the notebooks, or execute them and store their outputs."""

    names: conf.Positional[tuple[str, ...]] = ()
    """How the names of some of them start: 04 11; without it all."""
    execute: Switch = False
    """Run each from top to bottom and store it; a cell that fails leaves the file as it was."""
    scale: str = "smoke"
    """Scale at which they run: smoke (seconds, what is stored), laptop, gpu or 8gpu."""

    def run(self) -> int:
        """Go through them in order."""
        from cifar_fast.teaching import scales

        scales.here(self.scale)  # says what is wrong with it before a kernel starts
        for path in notebooks.find(self.names):
            started = time.perf_counter()
            if self.execute:
                notebooks.execute(path, self.scale)
            seconds = f", executed in {time.perf_counter() - started:.0f} s" if self.execute else ""
            print(f"{path.name}: {path.stat().st_size / 1e3:.0f} kB{seconds}", flush=True)
        return 0


Command = Notebooks | Plan | Train | Benchmark | Evaluate | Predict | Data | Doctor | Lab


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command in `argv` (default: this process's) and return the exit status: 2 a mistake, 130 Ctrl-C."""
    try:
        status = parse(sys.argv[1:] if argv is None else argv).run()
        sys.stdout.flush()
        return status
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except RankError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # whoever read our output, `head` for instance, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141


def main_and_exit() -> NoReturn:
    """Run this process's command and end the process with its status."""
    status = main()
    if (
        "cifar_fast.distributed.torchrun" in sys.modules
    ):  # without it no rank was joined, and torch need not be imported
        from cifar_fast.distributed.torchrun import end_rank, joined_torchrun

        if joined_torchrun():
            end_rank(status)
    raise SystemExit(status)


def parse(argv: Sequence[str]) -> Command:
    """Return the command in `argv`; where its options are a recipe's fields, the recipe is looked for first."""

    def with_recipe(command: type[Train | Benchmark], name: str) -> Any:
        if argv[:1] != [name]:
            return Annotated[command, conf.subcommand(name)]
        first = argparse.ArgumentParser(prog=f"cifar-fast {name}", add_help=False, allow_abbrev=False)
        first.add_argument("--recipe")
        first.add_argument("--device")
        named, _ = first.parse_known_args(argv[1:])
        base, _ = base_recipe(named.recipe, named.device)
        return Annotated[command, conf.subcommand(name, default=command(fields=base))]

    commands = with_recipe(Train, "train") | with_recipe(Benchmark, "benchmark")
    commands = commands | Annotated[Evaluate, conf.subcommand("evaluate")]
    commands = commands | Annotated[Predict, conf.subcommand("predict")]
    commands = commands | Annotated[Data, conf.subcommand("data")] | Annotated[Doctor, conf.subcommand("doctor")]
    commands = commands | Annotated[Notebooks, conf.subcommand("notebooks")]
    commands = commands | Annotated[Plan, conf.subcommand("plan")] | Annotated[Lab, conf.subcommand("lab")]
    return tyro.cli(commands, args=argv, prog="cifar-fast", description="Train a CIFAR-10 network to 94 % in seconds.")


def base_recipe(name: str | None, device: str | None) -> tuple[Recipe, str]:
    """Return the recipe called `name`, or else the one for the hardware, and why it was taken."""
    if name is not None:
        return recipes.named(name), "asked for"
    import torch

    from cifar_fast.hardware.device import select_device
    from cifar_fast.training.batches import allowed_world_sizes

    if select_device(device).type == "cpu":
        return recipes.laptop(), "the recipe for a CPU" + ("" if device else ": torch can use no GPU here")
    n_gpus = torch.cuda.device_count() if device in (None, "cuda") else 1
    if n_gpus > 1 and n_gpus in allowed_world_sizes(recipes.apple_8gpu()):
        return recipes.apple_8gpu(), f"the recipe for several GPUs, and there are {n_gpus}"
    return recipes.speedrun(), "the recipe for one GPU" + (f", of the {n_gpus} here" if n_gpus > 1 else "")


def renamed_if_changed(recipe: Recipe, base: Recipe) -> Recipe:
    """Return `recipe`, under another name where it differs from `base`: its results are not the original's."""
    changed = recipe.name == base.name and changed_fields(base, recipe)
    return replace(recipe, name=f"{base.name}-changed") if changed else recipe


def print_recipe(base: Recipe, why: str, changes: dict[str, tuple[Any, Any]], world_size: int) -> None:
    """Say what is trained, and on how many processes if on more than this one."""
    print(f"recipe: {base.name} ({why})")
    if world_size > 1:
        print(f"processes: {world_size}")
    for field, (before, after) in changes.items():
        print(f"  {field}: {before} -> {after}")


def finished_runs(folder: Path) -> str:
    """Say how many runs of a benchmark are in its folder."""
    from cifar_fast.experiments.benchmark import load_benchmark

    try:
        n = len(load_benchmark(folder).runs)
    except UserError:
        return "no run was finished"
    return f"{n} finished run{'s are' if n != 1 else ' is'} kept in {folder}"


def is_main_rank() -> bool:
    """Say whether this process is the one that prints and writes: any, but the ranks above 0 under torchrun."""
    return os.environ.get("RANK", "0") == "0"


def silence_other_ranks() -> None:
    """Leave printing to rank 0 under torchrun, where every rank runs this command; errors stay audible."""
    if not is_main_rank():
        sys.stdout = open(os.devnull, "w")


def open_data(path: str | None, mirrors: Sequence[str]) -> Dataset:
    """Load the data to train on: a folder, `synthetic`, or what can be found, with a banner where that is synthetic."""
    from cifar_fast.data.dataset import SYNTHETIC
    from cifar_fast.data.load import load_or_synthetic
    from cifar_fast.data.synthetic import synthetic

    return synthetic() if path == SYNTHETIC else load_or_synthetic(path, mirrors=mirrors)


def read_picture(path: Path) -> Tensor:
    """Return a picture file as the networks take it, upright, its centre square scaled to 32x32 pixels.

    Args:
        path: a picture in any format that Pillow reads, of any size.

    Returns:
        uint8 (3, 32, 32); what is transparent is white.

    Raises:
        UserError: the file is not there or is not a picture.
    """
    import numpy as np
    import torch
    from PIL import Image, ImageOps

    from cifar_fast.data.dataset import IMAGE_SIZE

    try:
        with Image.open(path) as opened:
            upright = ImageOps.exif_transpose(opened).convert("RGBA")
    except FileNotFoundError as error:
        raise UserError(f"there is no file {path}") from error
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise UserError(
            f"{path} cannot be read as a picture: {error}; name a png, jpg or another image file"
        ) from error
    picture = Image.alpha_composite(Image.new("RGBA", upright.size, "white"), upright).convert("RGB")
    # Lanczos widens its filter with the scale, so that nothing of a large picture is skipped.
    square = ImageOps.fit(picture, (IMAGE_SIZE, IMAGE_SIZE), Image.Resampling.LANCZOS)
    return torch.from_numpy(np.array(square)).permute(2, 0, 1)


def save_learning_curve(result: RunResult, folder: Path) -> None:
    """Draw the run into its folder."""
    from cifar_fast.teaching.result_plots import learning_curve

    save_figure(lambda: learning_curve(result), folder / "learning_curve.png")


def save_figure(draw: Callable[[], Figure], path: Path) -> None:
    """Draw a figure into a file; one that cannot be written costs the runs nothing but the figure."""
    try:
        draw().savefig(path, dpi=150)
    except OSError as error:
        print(f"note: no {path.name}: {error}", file=sys.stderr)


def result_table(result: RunResult, folder: Path) -> str:
    """Return what a run came to, as text."""
    from cifar_fast import __version__

    machine, data = result.environment, result.dataset
    warm_up = f", {result.warm_up_seconds:.2f} s of it warm-up" if machine["step_mode"] != "eager" else ""
    rows = [
        ("recipe", result.recipe.name),
        ("data set", data_set(data)),
        ("accuracy", f"{percent(result.accuracy)} (TTA: {result.recipe.tta})"),
        ("train_seconds", f"{result.train_seconds:.2f}"),
        ("evaluate_seconds", f"{result.evaluate_seconds:.2f}"),
        ("total_seconds", f"{result.total_seconds:.2f}"),
        ("first step", f"{result.first_step_seconds:.2f} s after the command{warm_up}"),
        ("peak memory", f"{result.peak_memory_gb:.2f} GB"),
        ("hardware", f"{hardware(machine)}; {machine['precision']}, {machine['convolution']} convolution"),
        ("versions", f"cifar_fast {__version__}, torch {machine['torch']}, Python {machine['python']}"),
        ("n", f"1 run, seed {result.seed}"),
        ("run folder", str(folder)),
    ]
    return table(rows)


def class_table(found: Evaluation, classes: Sequence[str]) -> str:
    """Return for each class its accuracy and the three classes that it is most often taken for."""
    rows = [("class", "images", "accuracy", "taken for")]
    for label, counts in enumerate(found.confusion.tolist()):
        others = sorted(
            (other for other in range(len(classes)) if other != label and counts[other]),
            key=lambda other: -counts[other],
        )
        mistakes = ", ".join(f"{classes[other]} {counts[other]}" for other in others[:3])
        share = percent(counts[label] / sum(counts)) if sum(counts) else "-"
        rows.append((classes[label], f"{sum(counts):,}", share, mistakes))
    return table(rows)


def version(package: str) -> str:
    """Return the version of an installed package."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"
