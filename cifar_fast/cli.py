"""The command line: arguments become calls of the package, their results become text; nothing is computed here.

Only what is quick to load is imported at the top, so that help and mistakes in the arguments do not wait for torch.
"""

from __future__ import annotations

import argparse
import ast
import os
import re
import shlex
import shutil
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, fields, replace
from functools import reduce
from importlib import metadata
from operator import or_
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, NoReturn

import tyro
from tyro import conf

from cifar_fast import recipes
from cifar_fast.errors import RankError, TrainingError, UserError
from cifar_fast.recipe import Recipe, changed_fields
from cifar_fast.shown import data_set, hardware, percent, table
from cifar_fast.teaching import notebooks

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from torch import Tensor

    from cifar_fast.data.dataset import Dataset
    from cifar_fast.experiments.forecast import Forecast
    from cifar_fast.training.evaluate import Evaluation
    from cifar_fast.training.result import EpochResult, RunResult
    from cifar_fast.training.seeds import Seeds


DataOption = Annotated[str | None, conf.arg(metavar="PATH|synthetic|cifar100")]
PredictionsOption = Annotated[Path | None, conf.arg(metavar="FILE")]
ImageSizeOption = Annotated[int, conf.arg(metavar="PIXELS")]
MirrorOption = Annotated[tuple[str, ...], conf.arg(metavar="URL"), conf.UseAppendAction]
DeviceOption = Annotated[str | None, conf.arg(metavar="cpu|cuda|cuda:N|mps|xpu")]
SeedOption = Annotated[int | None, conf.arg(metavar="N")]
WorldSizeOption = Annotated[int | None, conf.arg(metavar="N")]
BackendOption = Annotated[Literal["nccl", "gloo"] | None, conf.arg(metavar="nccl|gloo")]
Switch = Annotated[bool, conf.FlagCreatePairsOff]
ChangesOption = Annotated[tuple[str, ...], conf.arg(metavar="FIELD=VALUE ...")]

CURVE, EXAMPLE = "learning_curve.png", "example.png"
"""Pictures that `train` leaves in a run's folder, besides what a run saves itself."""
LONG_SECONDS = 600.0
"""The longest that a CPU trains `laptop` unless somebody asks for it."""
LONG_SYNTHETIC_SECONDS = 90.0
"""The longest that a CPU trains `classroom` on the embedded set unless somebody asks for it."""


@dataclass(kw_only=True)
class Train:
    """Train a network, with a recipe that fits this machine unless you name one.

    By default 2, 4 or 8 GPUs train `apple_8gpu`, and one trains `speedrun`. A CPU trains `laptop`, or `classroom` where
    `laptop` would take over ten minutes or there is only the embedded data set. Before it starts, the command measures
    and says how long it will take. Every field of the recipe is an option.
    """

    recipe: Annotated[str | None, conf.arg(metavar="NAME")] = None
    """Recipe to start from: laptop, classroom, speedrun, apple_8gpu, smoke, or a rung like page_2019."""
    data: DataOption = None
    """Folder of the data set, `synthetic` (embedded) or `cifar100`. Default: CIFAR_FAST_DATA, the cache folder, or a
    download of CIFAR-10."""
    image_size: ImageSizeOption = 32
    """Side to which the pictures of an image folder are resized."""
    mirror: MirrorOption = ()
    """Another URL to download the data set from. Can be repeated."""
    seed: int = 0
    """Seed of all random choices."""
    start_seed: SeedOption = None
    """Another seed for the weights before training. Default: --seed."""
    order_seed: SeedOption = None
    """Another seed for the order of the images. Default: --seed."""
    augmentation_seed: SeedOption = None
    """Another seed for crops, mirroring, cutout and colour jitter. Default: --seed."""
    out: Annotated[Path | None, conf.arg(metavar="FOLDER")] = None
    """New folder for logs, result and weights. Default: runs/NAME-seedN-DATE-TIME."""
    logits: Switch = False
    """Keep the test logits in the run folder."""
    device: DeviceOption = None
    """Where to train. Default: all CUDA GPUs, or else the CPU."""
    world_size: WorldSizeOption = None
    """Number of processes that share the recipe's shards. Default: one for each GPU, or one on a CPU."""
    backend: BackendOption = None
    """How the processes communicate. Default: nccl on GPUs, gloo on a CPU."""
    timeout: float = 10.0
    """Stop all processes when one has died or gone silent for this many seconds."""
    quiet: Switch = False
    """Print only the result."""
    free: conf.Suppress[bool] = False
    """Whether neither a recipe nor a field of one was named, so that the recipe may be chosen."""
    fields: Annotated[Recipe, conf.arg(name=""), conf.FlagConversionOff]

    def run(self) -> int:
        """Choose a recipe, say how long it will take, train, save, and say what to do next."""
        from tqdm.auto import tqdm

        from cifar_fast.distributed.launch import check_fit, choose_world_size, launch
        from cifar_fast.distributed.torchrun import under_torchrun
        from cifar_fast.hardware.clock import process_start
        from cifar_fast.hardware.device import select_device

        silence_other_ranks()
        base, why = base_recipe(self.recipe, self.device)
        recipe, changes = self.fields, changed_fields(base, self.fields)
        seeds = self.seeds()
        world_size = choose_world_size(self.world_size, self.device, recipe)
        if self.out and self.out.exists() and not under_torchrun():  # its ranks must agree before one of them leaves
            raise UserError(f"--out {self.out} exists already: a run never overwrites another; name a new folder")
        data = open_data(self.data, self.mirror, self.image_size)
        if not self.quiet:
            print(f"data set: {data.name} ({data.source})", flush=True)
        expected: Forecast | None = None
        on = select_device(self.device).type
        if on != "cuda" and not under_torchrun():  # a CUDA GPU may compile first, and then be done within seconds
            if self.free and on == "cpu":
                recipe, why, expected = fitting_recipe(data, self.device, quiet=self.quiet)
                base = recipe
            elif not self.quiet:
                check_fit(recipe, world_size, data)
                expected = time_steps(recipe, data, self.device)
        recipe = renamed_if_changed(recipe, base)
        out = self.out or Path("runs") / f"{recipe.name}-seed{self.seed}-{time.strftime('%Y%m%d-%H%M%S')}"
        if not self.quiet:
            print_recipe(base, why, changes, world_size)
            if expected:
                print(f"time: {expected}")
                print_alternative(base, data, expected.seconds, chosen=self.free)
            print(f"run folder: {out}", flush=True)

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
                seed=seeds,
                out=out,
                save_logits=self.logits,
                progress=not self.quiet,
                expected_seconds=expected.seconds if expected else None,
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
            save_example(data, out)
        if not self.quiet:
            print(f"\n{summary(result, out)}")
        return 0

    def seeds(self) -> Seeds:
        """Return the seed of each kind of random choice."""
        from cifar_fast.training.seeds import Seeds

        separate = {"start": self.start_seed, "order": self.order_seed, "augmentation": self.augmentation_seed}
        return replace(Seeds.of(self.seed), **{name: seed for name, seed in separate.items() if seed is not None})


@dataclass(kw_only=True)
class Benchmark:
    """Train a recipe many times, each with its own seed, and compare the runs with the 50 published ones.

    Every finished run is saved: after an interruption, the same command resumes. Every field of the recipe is an
    option, as for `train`.
    """

    recipe: Annotated[str | None, conf.arg(metavar="NAME")] = None
    """Recipe to start from; apple_8gpu is the published one. Default: apple_8gpu on 2, 4 or 8 GPUs, speedrun on one,
    laptop on a CPU."""
    runs: int = 50
    """Number of runs, including those already in the folder."""
    target: Annotated[float, conf.arg(metavar="PERCENT")] = 94.0
    """Target test accuracy in per cent."""
    until_confident: Switch = False
    """Stop as soon as the 95 % interval of the mean accuracy, from at least 3 runs, excludes the target."""
    first_seed: int = 0
    """Seed of the first run; each run takes the next one."""
    data: DataOption = None
    """Folder of the data set, `synthetic` (embedded) or `cifar100`. Default: as for `train`."""
    image_size: ImageSizeOption = 32
    """Side to which the pictures of an image folder are resized."""
    mirror: MirrorOption = ()
    """Another URL to download the data set from. Can be repeated."""
    out: Annotated[Path | None, conf.arg(metavar="FOLDER")] = None
    """Folder of the runs: a new one, or one to resume. Default: runs/benchmark-NAME-RUNS."""
    logits: Switch = False
    """Keep the test logits of each run in the folder, and say what part of the spread a finite test set explains."""
    device: DeviceOption = None
    """Where to train. Default: all CUDA GPUs, or else the CPU."""
    world_size: WorldSizeOption = None
    """Number of processes that share the recipe's shards. Default: one for each GPU, or one on a CPU."""
    backend: BackendOption = None
    """How the processes communicate. Default: nccl on GPUs, gloo on a CPU."""
    timeout: float = 10.0
    """Stop all processes when one has died or gone silent for this many seconds."""
    quiet: Switch = False
    """Print only the result."""
    fields: Annotated[Recipe, conf.arg(name=""), conf.FlagConversionOff]

    def run(self) -> int:
        """Train the runs that are missing, print all of them beside the published ones, and draw them."""
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
        data = open_data(self.data, self.mirror, self.image_size)
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
                save_logits=self.logits,
                progress=not self.quiet and sys.stderr.isatty(),
                timeout=self.timeout,
                on_run=on_run,
            )
        except KeyboardInterrupt:
            print(f"\ninterrupted: {finished_runs(out)}; the same command resumes", file=sys.stderr)
            return 130
        except (TrainingError, RankError):
            print(f"note: {finished_runs(out)}", file=sys.stderr)
            raise
        if len(found.runs) < self.runs:
            print(f"stopped: the 95 % interval of the mean accuracy leaves out {percent(found.target)}")
        print(f"\n{comparison_table(found.summary())}\nfolder: {out}")
        if self.logits and len(found.runs) > 1 and is_main_rank():
            from cifar_fast.experiments.variance import variance

            try:
                print(f"\n{variance(out)}")
            except UserError as error:  # earlier calls may have kept no logits; the runs are complete without them
                print(f"note: {error}", file=sys.stderr)
        if is_main_rank():
            from cifar_fast.teaching.result_plots import accuracy_and_time

            save_figure(lambda: accuracy_and_time(found), out / "accuracy_and_time.png")
        return 0


@dataclass(kw_only=True)
class Compare:
    """Train two recipes in turns until it is clear which one is more accurate.

    Example: cifar-fast compare laptop --b label_smoothing=0. The runs have the same seeds in pairs, and the interval of
    their difference is valid however often one looks. Before it starts, the command says how many runs, and how much
    time, differences of several sizes will take here. Every finished run is saved: after an interruption, the same
    command resumes. Every field of the recipe is an option, and changes both arms.
    """

    first: Annotated[conf.Positional[str | None], conf.arg(metavar="A")] = None
    """Recipe of arm A. Default: as for `benchmark`."""
    second: Annotated[conf.Positional[str | None], conf.arg(metavar="B")] = None
    """Recipe of arm B. Default: that of A."""
    a: ChangesOption = ()
    """Fields that arm A alone changes, such as epochs=8 flip=random."""
    b: ChangesOption = ()
    """Fields that arm B alone changes."""
    resolution: Annotated[float, conf.arg(metavar="POINTS")] = 0.2
    """Stop when the 95 % interval of the difference is narrower than this many percentage points."""
    max_runs: int = 30
    """The most runs of each arm, including those already in the folder."""
    extra_epochs: float = 0.0
    """Also train A for this many more epochs in each turn, to say what the difference is worth in epochs."""
    first_seed: int = 0
    """Seed of the first pair of runs; each pair takes the next one."""
    data: DataOption = None
    """Folder of the data set, or `synthetic` (embedded). Default: as for `train`."""
    mirror: MirrorOption = ()
    """Another URL to download CIFAR-10 from. Can be repeated."""
    out: Annotated[Path | None, conf.arg(metavar="FOLDER")] = None
    """Folder of the runs: a new one, or one to resume. Default: runs/compare-A-B."""
    logits: Switch = False
    """Keep the test logits of each run in the folder."""
    device: DeviceOption = None
    """Where to train. Default: all CUDA GPUs, or else the CPU."""
    world_size: WorldSizeOption = None
    """Number of processes that share the recipe's shards. Default: one for each GPU, or one on a CPU."""
    backend: BackendOption = None
    """How the processes communicate. Default: nccl on GPUs, gloo on a CPU."""
    timeout: float = 10.0
    """Stop all processes when one has died or gone silent for this many seconds."""
    quiet: Switch = False
    """Print only the result."""
    fields: Annotated[Recipe, conf.arg(name=""), conf.FlagConversionOff]

    def run(self) -> int:
        """Train pairs of runs until the difference is clear, and print the verdict."""
        from tqdm.auto import tqdm

        from cifar_fast.experiments.compare import arm_names, compare, load_comparison, run_line
        from cifar_fast.training.tricks import NO_TRICKS

        silence_other_ranks()
        a, b = self.arms()
        names = arm_names((a, NO_TRICKS), (b, NO_TRICKS))
        out = self.out or Path("runs") / ("compare-" + "-".join(re.sub(r"[^\w.=+-]+", "_", name) for name in names))
        if not self.quiet:
            print(f"A: {names[0]}\nB: {names[1]}")
            for field, (in_a, in_b) in changed_fields(a, b).items():
                print(f"  {field}: {in_a} -> {in_b}")
        data = open_data(self.data, self.mirror)
        if not self.quiet:
            print(f"data set: {data.name} ({data.source})\nfolder: {out}", flush=True)
        try:
            found = compare(
                a,
                b,
                data,
                resolution=self.resolution,
                max_runs=self.max_runs,
                extra_epochs=self.extra_epochs,
                world_size=self.world_size,
                device=self.device,
                backend=self.backend,
                out=out,
                first_seed=self.first_seed,
                save_logits=self.logits,
                progress=not self.quiet and sys.stderr.isatty(),
                timeout=self.timeout,
                on_plan=None if self.quiet else lambda plan: print(f"\n{plan.table()}\n", flush=True),
                on_run=lambda arm, so_far: None if self.quiet else tqdm.write(run_line(arm, so_far)),
            )
        except KeyboardInterrupt:
            if is_main_rank():
                with suppress(UserError):
                    print(f"\n{load_comparison(out).table()}")
                print(f"\ninterrupted: finished runs are kept in {out}; the same command resumes", file=sys.stderr)
            return 130
        print(f"\n{found.table()}\nfolder: {out}")
        return 0

    def arms(self) -> tuple[Recipe, Recipe]:
        """Return both recipes, with the changes also in their names: their results are not the originals'."""
        from cifar_fast.experiments.compare import with_changes

        base_a, _ = base_recipe(self.first, self.device)
        base_b = recipes.named(self.second) if self.second else base_a
        shared = {name: now for name, (_, now) in changed_fields(base_a, self.fields).items()}
        if self.fields.name != base_a.name:
            shared["name"] = self.fields.name
        pair = []
        for base, option, own in ((base_a, "--a", self.a), (base_b, "--b", self.b)):
            common = renamed_if_changed(Recipe.from_dict(base.to_dict() | shared), base)
            changed = Recipe.from_dict(common.to_dict() | parse_changes(option, own))
            pair.append(replace(changed, name=with_changes(changed.name, common, changed)))
        return pair[0], pair[1]


@dataclass(kw_only=True)
class Evaluate:
    """Evaluate a trained network: its accuracy, its loss, and which classes it confuses.

    It is evaluated on the test set of a data set, or on the pictures that you name.
    """

    network: Annotated[conf.Positional[Path], conf.arg(metavar="RUN|NAME")]
    """Folder of a finished run, or name of a network that ships with the package, such as `laptop`."""
    images: Annotated[conf.Positional[tuple[Path, ...]], conf.arg(metavar="[PICTURE|FOLDER ...]")] = ()
    """Pictures, or folders of them, in place of a data set. The class of a picture is the name of its folder."""
    data: DataOption = None
    """Folder of the data set, `synthetic` or `cifar100`. Default: what the run was trained on if it has such a name,
    otherwise as for `train`."""
    mirror: MirrorOption = ()
    """Another URL to download the data set from. Can be repeated."""
    tta: Literal["none", "flip", "flip_shift"] | None = None
    """Test-time augmentation. Default: the recipe's."""
    device: DeviceOption = None
    """Where to compute. Default: the first CUDA GPU, or else the CPU."""
    out: PredictionsOption = None
    """File for the prediction of each image: CSV or JSON, by its suffix."""
    all: Switch = False
    """Write the probability of every class to --out."""

    def run(self) -> int:
        """Evaluate and print two tables; the exit status is 1 if a picture could not be read."""
        from cifar_fast.hardware.device import select_device
        from cifar_fast.training.evaluate import evaluate, score
        from cifar_fast.training.predict import Predictions, check_target, labels_of, write_predictions

        if self.images and (self.data or self.mirror):
            raise UserError("name either pictures or a data set (--data), not both")
        if self.all and not self.out:
            raise UserError("--all says what is written to --out: name a file with --out")
        if self.out:
            check_target(self.out)
        result = trained_network(self.network)
        classes, tta = result.dataset["classes"], self.tta or result.recipe.tta
        result.model.to(select_device(self.device))
        unreadable: dict[Path, str] = {}
        notes: list[str] = []
        if self.images:
            import torch

            for path in self.images:
                if (path / "train").is_dir() and (path / "test").is_dir():
                    raise UserError(f"{path} has pictures to train on, too: name {path / 'test'}, or --data {path}")
            paths = named_pictures(self.images)
            known = dict(zip(paths, labels_of(paths, classes), strict=True))
            logits, unreadable = predict_named(result, paths, tta)
            names = [str(path) for path in paths if path not in unreadable]
            labels = torch.tensor([label for path, label in known.items() if path not in unreadable])
            found, what = score(logits, labels), f"{len(names):,} picture{'s' if len(names) != 1 else ''}"
        else:
            data = self.data_of(result)
            names, labels = [f"test[{index}]" for index in range(len(data.test_labels))], data.test_labels
            found = evaluate(result.model, data.test_images, labels, tta=tta)
            what = f"{data.name}, {len(labels):,} test images"
            notes = differences(data, result.dataset)
        then = f"{percent(result.accuracy)} (TTA: {result.recipe.tta})"
        rows = [
            ("network", str(self.network)),
            ("recipe", result.recipe.name),
            ("data set", what),
            ("accuracy", f"{percent(found.accuracy)} (TTA: {tta})"),
            ("loss", f"{found.loss:.4f}"),
            ("when trained", f"{then} in {result.environment['precision']}; here in float32"),
        ]
        print(table(rows))
        for note in notes:
            print(f"note: {note}")
        shown = classes if self.images else data.classes
        print("\n" + class_table(found, shown))
        if self.out:
            truth = [shown[label] for label in labels.tolist()]
            predictions = Predictions(names, shown, found.logits.softmax(1).cpu(), truth)
            write_predictions(predictions, self.out, with_all=self.all)
            print(f"\npredictions: {self.out}")
        return report_unreadable(unreadable)

    def data_of(self, result: RunResult) -> Dataset:
        """Load the data set that was named, or the run's; raise `UserError` if it has another number of classes."""
        from cifar_fast.data.dataset import IMAGE_SIZE, SYNTHETIC
        from cifar_fast.data.load import load_cifar10, load_named

        trained_on = result.dataset
        image_size = trained_on.get("image_size", IMAGE_SIZE)
        name = self.data or {SYNTHETIC: SYNTHETIC, "CIFAR-100": "cifar100"}.get(trained_on["name"])
        if name is None:
            data = load_cifar10(mirrors=self.mirror, image_size=image_size)
        else:
            data = load_named(name, self.mirror, image_size)
        if data.n_classes != len(trained_on["classes"]):
            raise UserError(
                f"the network {self.network} knows {len(trained_on['classes'])} classes and {data.name} has "
                f"{data.n_classes}; name the data set it was trained on ({trained_on['name']}) with --data"
            )
        return data


@dataclass(kw_only=True)
class Predict:
    """Say what pictures show. They can have any size: the centre square is resized to the size of the network's images.

    Without a run in front of them, the network `laptop` answers, which ships with the package. A folder stands for all
    pictures in it and below it. The exit status is 1 if a picture could not be read.
    """

    paths: Annotated[conf.Positional[tuple[Path, ...]], conf.arg(metavar="[RUN|NAME] PICTURE|FOLDER [...]")]
    """Pictures, and folders of them. In front of them, the network: folder of a finished run, or name of a network that
    ships with the package."""
    top: int = 3
    """How many classes to print for each picture, the likeliest first."""
    out: PredictionsOption = None
    """File for the predictions: CSV or JSON, by its suffix. Without it, a line for each picture is printed."""
    all: Switch = False
    """Write the probability of every class to --out."""

    def run(self) -> int:
        """Predict the pictures, then print a line for each or write them all."""
        from cifar_fast.training.predict import Predictions, check_target, write_predictions
        from cifar_fast.training.pretrained import pretrained

        named = bool(self.paths) and is_network(self.paths[0])
        images = self.paths[1:] if named else self.paths
        if not images:
            raise UserError("no picture is named: cifar-fast predict [RUN|NAME] PICTURE|FOLDER [...]")
        if self.all and not self.out:
            raise UserError("--all says what is written to --out: name a file with --out")
        if self.out:
            check_target(self.out)
        result = trained_network(self.paths[0]) if named else pretrained("laptop").run
        classes = result.dataset["classes"]
        if not 1 <= self.top <= len(classes):
            raise UserError(f"--top {self.top} must be from 1 to {len(classes)}, the number of classes")
        paths = named_pictures(images)
        logits, unreadable = predict_named(result, paths)
        predictions = Predictions([str(path) for path in paths if path not in unreadable], classes, logits.softmax(1))
        print(f"network: {result.recipe.name}, trained on data set: {result.dataset['name']}")
        if self.out:
            write_predictions(predictions, self.out, with_all=self.all)
            counts = ", ".join(f"{name} {count:,}" for name, count in predictions.counts().most_common())
            print(f"{len(predictions.names):,} pictures: {counts}\npredictions: {self.out}")
        else:
            best = predictions.probabilities.topk(self.top)
            rows = []
            for name, values, labels in zip(
                predictions.names, best.values.tolist(), best.indices.tolist(), strict=True
            ):
                guesses = [f"{classes[label]} {percent(value)}" for value, label in zip(values, labels, strict=True)]
                rows.append((name, *guesses))
            print(table(rows))
        return report_unreadable(unreadable)


@dataclass(kw_only=True)
class Data:
    """Find the data sets on this machine and check every file, or download one (--download)."""

    download: Switch = False
    """Download CIFAR-10, or CIFAR-100 with `--data cifar100`, into the cache folder, unless it is there already."""
    data: Annotated[str | None, conf.arg(metavar="PATH|cifar100")] = None
    """A folder to look in first, or `cifar100` to look for CIFAR-100."""
    mirror: MirrorOption = ()
    """Another URL to download the data set from. Can be repeated."""

    def run(self) -> int:
        """Print the state; the exit status is 1 when `train` would find no usable data set on this machine."""
        from cifar_fast.data.download import download_cifar10, download_cifar100
        from cifar_fast.data.load import status

        is_100 = self.data == "cifar100"
        if self.download:
            print(f"downloaded: {(download_cifar100 if is_100 else download_cifar10)(self.mirror)}")
        elif self.mirror:
            raise UserError("--mirror is a place to download from: add --download")
        places = status(data_set="CIFAR-100") if is_100 else status(self.data)
        for place in places:
            print(f"{place.origin}: {place.path}\n  {place.finding}")
            if place.decoded:
                print(f"  decoded copy: {place.decoded}")
        if is_100:
            usable = next((place for place in places if place.usable), None)
            print(
                f"`train --data cifar100` reads {usable.origin}."
                if usable
                else "`train --data cifar100` would download CIFAR-100; so does `data --data cifar100 --download`."
            )
            return 0 if usable else 1
        if places[0].usable:
            print(f"`train` reads {places[0].origin}.")
        elif len(places) == 1:
            print("`train` would download CIFAR-10; so does `cifar-fast data --download`.")
        else:
            print(f"`train` would stop: {places[0].origin} comes first and is not usable.")
        return 0 if places[0].usable else 1


@dataclass(kw_only=True)
class Doctor:
    """List this machine's hardware and software, the recipe and precision it would train with, and why."""

    device: DeviceOption = None
    """The device to ask about. Default: the first CUDA GPU, or else the CPU."""
    measure: Switch = False
    """Measure which convolution is fastest on this CPU, even if that was saved before (two seconds)."""

    def run(self) -> int:
        """Print each line as soon as it is known."""
        import platform

        from cifar_fast import __version__

        show_row("system", platform.platform())
        show_row("python", platform.python_version())
        show_row("cifar_fast", __version__)
        for name in ("torch", "torchvision", "numpy", "matplotlib", "jupyterlab"):
            show_row(name, version(name))
        self._show_hardware()
        self._show_choices()
        return 0

    def _show_hardware(self) -> None:
        import torch

        from cifar_fast.hardware import device as devices

        machine = devices.environment(torch.device("cpu"))
        cores = f"{machine['cores']} cores for this process, {machine['threads']} threads"
        show_row("processor", f"{machine['cpu']}, {cores}")
        show_row("CPU capability", machine["cpu_capability"])
        show_row("memory", f"{machine['memory_gb']} GB")
        gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
        show_row("GPUs", ", ".join(gpus) or "none that torch can use with CUDA")
        for kind, name in devices.OTHER_GPUS.items():
            there = devices.count_other_gpus(kind)
            used = f"there, used only with --device {kind}: its speed and accuracy are unmeasured"
            show_row(name, used if there else f"none: {devices.why_no_other_gpu(kind)}")

    def _show_choices(self) -> None:
        from cifar_fast.data.load import status
        from cifar_fast.hardware.cuda_graph import choose_step_mode
        from cifar_fast.hardware.device import select_device
        from cifar_fast.hardware.numerics import choose_numerics, needs_measuring, saved_rates
        from cifar_fast.kernels import amx, fused, winograd

        device = select_device(self.device)
        place = status(check=False)[0]
        show_row("data set", f"{place.origin}: {place.finding}")
        recipe, why = base_recipe(None, self.device)
        unless = f"; `train` takes classroom if {recipe.name} needs over ten minutes" if device.type == "cpu" else ""
        show_row("recipe", f"{recipe.name} ({why}{unless})")
        mode = choose_step_mode(recipe, device)
        show_row("step", "; ".join([mode.describe()["step_mode"], *mode.reasons]))
        if device.type == "cpu":
            for name, kernels in (("Winograd", winograd), ("AMX", amx), ("norm and activation", fused)):
                usable, detail = kernels.available()
                show_row(f"{name} kernels", "compiled" if usable else f"none: {detail}")
        if needs_measuring(recipe, device) and not self.measure:
            for name in ("precision", "convolution"):
                show_row(name, "not yet measured")
            show_row("because", f"training measures which is fastest here; {program()} doctor --measure does so now")
            return
        numerics = choose_numerics(recipe, device, None if self.measure else saved_rates())
        show_row("precision", f"{numerics.dtype}".removeprefix("torch."))
        show_row("convolution", numerics.convolution)
        show_row("because", numerics.reason)
        if device.type == "cuda":
            show_row("norm and activation", "fused" if numerics.fuse_norm else "not fused")


@dataclass(kw_only=True)
class Plan:
    """Predict how long a recipe would train on 1 to 64 workers, from steps timed on this machine.

    The result is a prediction. Computing and launching a step are timed here, and so is an all-reduce among as many
    processes as this machine has GPUs (or two on a CPU). For more workers, published all-reduce times are used.
    """

    recipe: Annotated[str, conf.arg(metavar="NAME")] = "apple_8gpu"
    """Recipe to predict."""
    world_size: Annotated[int | None, conf.arg(metavar="N")] = None
    """One more number of workers, besides 1, 2, 4, ... 64 as far as the recipe allows them."""
    n_shards: Annotated[int | None, conf.arg(metavar="N")] = None
    """Split the training set into N shards, which up to N workers can share. Default: the recipe's."""
    link: Literal["nvlink_nccl", "nvlink_multicast"] = "nvlink_nccl"
    """How the workers are connected. The published figures are for 8 H100 GPUs."""
    n_train: int = 50_000
    """Number of training images."""
    n_test: int = 10_000
    """Number of test images."""
    device: DeviceOption = None
    """Where to measure. Default: the first CUDA GPU, or else the CPU."""
    out: Annotated[Path | None, conf.arg(metavar="PNG")] = None
    """Save a chart of the prediction in this file."""

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
    """Open the notebooks in JupyterLab.

    Those of an installed package are first copied to the folder cifar_fast_notebooks, here, where you can edit them.
    """

    options: conf.Positional[tuple[str, ...]] = ()
    """Options for JupyterLab, after `--`. Example: cifar-fast lab -- --no-browser."""

    def run(self) -> int:
        """Start JupyterLab in this process, which it leaves when it is shut down."""
        notebooks.find()  # says what is missing before JupyterLab starts
        try:
            from jupyterlab.labapp import LabApp
        except ModuleNotFoundError as error:
            raise UserError("JupyterLab is not installed: pip install 'cifar_fast[notebooks]'") from error
        LabApp.launch_instance([str(notebooks.to_work_in()), *self.options])
        return 0


@dataclass(kw_only=True)
class Notebooks:
    """List the notebooks, or run them and store their outputs (--execute)."""

    names: conf.Positional[tuple[str, ...]] = ()
    """The first letters of their names, for example 04 11. Default: all of them."""
    execute: Switch = False
    """Run each from top to bottom and store its outputs. If a cell fails, the file stays as it was."""
    scale: str = "classroom"
    """How much to train: smoke (seconds per run), classroom (the stored outputs), laptop, gpu or 8gpu."""

    def run(self) -> int:
        """Go through them in order."""
        from cifar_fast.teaching import scales

        scales.here(self.scale)  # reports a mistake in it before a kernel starts
        folder = notebooks.to_work_in() if self.execute else notebooks.FOLDER
        for path in notebooks.find(self.names, folder):
            started = time.perf_counter()
            if self.execute:
                notebooks.execute(path, self.scale)
            seconds = f", executed in {time.perf_counter() - started:.0f} s" if self.execute else ""
            print(f"{path.name}: {path.stat().st_size / 1e3:.0f} kB{seconds}", flush=True)
        return 0


Command = Train | Predict | Lab | Evaluate | Benchmark | Compare | Plan | Data | Doctor | Notebooks
COMMANDS: dict[str, type[Command]] = {
    "train": Train,
    "predict": Predict,
    "lab": Lab,
    "evaluate": Evaluate,
    "benchmark": Benchmark,
    "compare": Compare,
    "plan": Plan,
    "data": Data,
    "doctor": Doctor,
    "notebooks": Notebooks,
}
"""In the order in which the help lists them."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command in `argv` (default: this process's); return the exit status: 2 for a mistake, 130 for Ctrl-C."""
    argv = sys.argv[1:] if argv is None else argv
    try:
        if not argv or argv[0] in ("-h", "--help"):
            print(overview(), file=sys.stdout if argv else sys.stderr)
            return 0 if argv else 2
        status = parse(argv).run()
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


def overview() -> str:
    """Return the help of the whole program: what it does, and a line for each command."""
    rows = [(f"  {name}", first_sentence(command)) for name, command in COMMANDS.items()]
    return f"""\
usage: cifar-fast COMMAND [OPTIONS]

Train a network on CIFAR-10 as fast as this machine can, and see which tricks make it fast.

{table(rows)}

Start with `cifar-fast train`. `cifar-fast COMMAND --help` lists the options of a command."""


def first_sentence(command: type) -> str:
    """Return the first sentence of a command's help, without its full stop."""
    assert command.__doc__ is not None
    return " ".join(command.__doc__.partition("\n\n")[0].split()).partition(". ")[0].removesuffix(".")


def parse(argv: Sequence[str]) -> Command:
    """Return the command in `argv`; where its options are a recipe's fields, the recipe is looked for first."""

    def subcommand(name: str) -> Any:
        command = COMMANDS[name]
        if argv[:1] != [name] or command not in (Train, Benchmark, Compare):
            return Annotated[command, conf.subcommand(name)]
        first = argparse.ArgumentParser(prog=f"cifar-fast {name}", add_help=False, allow_abbrev=False)
        first.add_argument("--recipe")
        first.add_argument("--device")
        named, rest = first.parse_known_args(argv[1:])
        if command is Compare:
            named.recipe = argv[1] if argv[1:] and not argv[1].startswith("-") else None
        base, _ = base_recipe(named.recipe, named.device)
        if command is Compare:
            return Annotated[command, conf.subcommand(name, default=Compare(fields=base))]
        if command is Benchmark:
            return Annotated[command, conf.subcommand(name, default=Benchmark(fields=base))]
        options = {word.partition("=")[0].lstrip("-").replace("-", "_") for word in rest if word.startswith("--")}
        free = named.recipe is None and options.isdisjoint(field.name for field in fields(Recipe))
        return Annotated[command, conf.subcommand(name, default=Train(fields=base, free=free))]

    commands = reduce(or_, [subcommand(name) for name in COMMANDS])
    return tyro.cli(
        commands, args=argv, prog="cifar-fast", description="Train a CIFAR-10 network, and see why it is fast."
    )


def base_recipe(name: str | None, device: str | None) -> tuple[Recipe, str]:
    """Return the recipe called `name`, or else the one for the hardware, and why it was taken."""
    if name is not None:
        return recipes.named(name), "asked for"
    import torch

    from cifar_fast.hardware.device import OTHER_GPUS, select_device
    from cifar_fast.training.batches import allowed_world_sizes

    on = select_device(device).type
    if on in OTHER_GPUS:
        return recipes.speedrun(), f"the recipe for one GPU; its speed on an {OTHER_GPUS[on]} is unmeasured"
    if on == "cpu":
        return recipes.laptop(), "the recipe for a CPU" + ("" if device else ": torch can use no GPU here")
    n_gpus = torch.cuda.device_count() if device in (None, "cuda") else 1
    if n_gpus > 1 and n_gpus in allowed_world_sizes(recipes.apple_8gpu()):
        return recipes.apple_8gpu(), f"the recipe for several GPUs, and there are {n_gpus}"
    return recipes.speedrun(), "the recipe for one GPU" + (f", of the {n_gpus} here" if n_gpus > 1 else "")


def parse_changes(option: str, changes: Sequence[str]) -> dict[str, Any]:
    """Return recipe fields from words such as `epochs=8`, `flip=random` and `widths=(8, 8, 8)`."""
    parsed: dict[str, Any] = {}
    for change in changes:
        field, equals, text = change.partition("=")
        if not equals:
            raise UserError(f"{option} {change}: write a field and its value, such as {option} epochs=8")
        try:
            parsed[field] = ast.literal_eval(text)
        except (ValueError, SyntaxError):
            parsed[field] = {"true": True, "false": False}.get(text.lower(), text)
    return parsed


def renamed_if_changed(recipe: Recipe, base: Recipe) -> Recipe:
    """Return `recipe`, under another name where it differs from `base`: its results are not the original's."""
    changed = recipe.name == base.name and changed_fields(base, recipe)
    return replace(recipe, name=f"{base.name}-changed") if changed else recipe


def print_recipe(base: Recipe, why: str, changes: dict[str, tuple[Any, Any]], world_size: int) -> None:
    """Say what is trained, and on how many processes if there are more than this one."""
    print(f"recipe: {base.name} ({why})")
    if world_size > 1:
        print(f"processes: {world_size}")
    for field, (before, after) in changes.items():
        print(f"  {field}: {before} -> {after}")


def fitting_recipe(data: Dataset, device: str | None, *, quiet: bool) -> tuple[Recipe, str, Forecast]:
    """Return the recipe that a CPU trains unless somebody names one, why, and how long it will take.

    The first of two is taken if it is quick enough here, otherwise the second.
    """
    from cifar_fast.data.dataset import SYNTHETIC
    from cifar_fast.experiments.forecast import about

    if data.name == SYNTHETIC:
        whole, quick, most = recipes.classroom(), recipes.smoke(), LONG_SYNTHETIC_SECONDS
        why, where = "a small recipe for the embedded data set", " on the embedded data set"
    else:
        whole, quick, most = recipes.laptop(), recipes.classroom(), LONG_SECONDS
        why, where = "the recipe for a CPU", ""
    expected = time_steps(whole, data, device, quiet=quiet)
    if expected.seconds <= most:
        return whole, why, expected
    why = f"{whole.name} would take {about(expected.seconds)}{where} here"
    return quick, why, time_steps(quick, data, device, quiet=quiet)


def time_steps(recipe: Recipe, data: Dataset, device: str | None, *, quiet: bool = False) -> Forecast:
    """Measure how long a recipe will train here; announce the measurement first, since it takes seconds."""
    from cifar_fast.experiments.forecast import forecast

    if not quiet:
        print(f"timing a few steps of {recipe.name} ...", flush=True)
    return forecast(recipe, data, device=device)


def print_alternative(recipe: Recipe, data: Dataset, seconds: float, *, chosen: bool) -> None:
    """Say what would be quicker than `recipe`; or more accurate, where it was `chosen` for its time."""
    from cifar_fast.data.dataset import SYNTHETIC

    if recipe.name in ("classroom", "smoke"):
        if chosen and data.name == SYNTHETIC:
            print(f"for CIFAR-10: {program()} data --download")
        elif chosen:
            aim = "for 94 %" if data.name == "CIFAR-10" else "more accurate"
            print(f"{aim}: {program()} train --recipe laptop")
    elif seconds > 60:
        print(f"quicker: {program()} train --recipe classroom (a smaller network), or a GPU")


def program() -> str:
    """Return how this program was called, quoted for a shell: its own name where that is on the path."""
    called = Path(sys.argv[0])
    if called.stem != "cifar-fast":
        return f"{shlex.quote(sys.executable)} -m cifar_fast"
    found = shutil.which("cifar-fast")
    return "cifar-fast" if found and Path(found).samefile(called) else shlex.quote(str(called))


def finished_runs(folder: Path) -> str:
    """Say how many runs of a benchmark are in its folder."""
    from cifar_fast.experiments.benchmark import load_benchmark

    try:
        n = len(load_benchmark(folder).runs)
    except UserError:
        return "no run was finished"
    return f"{n} finished run{'s are' if n != 1 else ' is'} kept in {folder}"


def is_main_rank() -> bool:
    """Say whether this process is the one that prints and writes: any except the ranks above 0 under torchrun."""
    return os.environ.get("RANK", "0") == "0"


def silence_other_ranks() -> None:
    """Leave printing to rank 0 under torchrun, where every rank runs this command; errors are still printed."""
    if not is_main_rank():
        sys.stdout = open(os.devnull, "w")


def open_data(path: str | None, mirrors: Sequence[str], image_size: int = 32) -> Dataset:
    """Load the data to train on: what `load_named` knows, or what can be found, with a banner where it is synthetic."""
    from cifar_fast.data.load import load_named, load_or_synthetic

    if path is None:
        return load_or_synthetic(mirrors=mirrors, image_size=image_size)
    data = load_named(path, mirrors, image_size)
    if data.name == "CIFAR-100":
        print("note: the recipes were tuned on CIFAR-10; none has been tried on CIFAR-100", file=sys.stderr)
    return data


def differences(data: Dataset, trained_on: Mapping[str, Any]) -> list[str]:
    """Say how a data set differs from the one that a run was trained on, as `Dataset.describe` returned it."""
    notes = []
    if data.fingerprint != trained_on["fingerprint"]:
        notes.append(
            f"these are not the data of the run: {data.name} has the fingerprint {data.fingerprint}, the run's "
            f"{trained_on['name']} has {trained_on['fingerprint']}"
        )
    if list(data.classes) != trained_on["classes"]:
        notes.append(f"the network's classes have other names: {', '.join(trained_on['classes'])}")
    return notes


def is_network(path: Path) -> bool:
    """Whether a path names a run, finished or not, or a network that ships with the package; it may be neither."""
    from cifar_fast.training.pretrained import names

    return (path / "recipe.json").exists() or (not path.exists() and str(path) in names())


def trained_network(path: Path) -> RunResult:
    """Return the run in a folder, or the run of a network of that name that ships with the package.

    Raises `RunError` if there is neither, or what is there is incomplete.
    """
    from cifar_fast.training.pretrained import names, pretrained
    from cifar_fast.training.result import load_run

    return pretrained(str(path)).run if not path.exists() and str(path) in names() else load_run(path)


def named_pictures(paths: Sequence[Path]) -> list[Path]:
    """Return the picture files that a person named, each once, with folders searched."""
    from cifar_fast.data.pictures import find_pictures

    return list(dict.fromkeys(find_pictures(paths)))


def predict_named(result: RunResult, paths: Sequence[Path], tta: str | None = None) -> tuple[Tensor, dict[Path, str]]:
    """Predict pictures with a progress bar, as `predict_pictures` does; raise `UserError` if none can be read."""
    from tqdm.auto import tqdm

    from cifar_fast.training.predict import predict_pictures

    with tqdm(total=len(paths), unit="picture", disable=not sys.stderr.isatty(), leave=False) as bar:
        logits, unreadable = predict_pictures(result, paths, tta=tta, on_batch=bar.update)
    if len(unreadable) == len(paths):
        raise UserError("\n".join(unreadable.values()))
    return logits, unreadable


def report_unreadable(unreadable: Mapping[Path, str]) -> int:
    """Name the pictures that could not be read, and return the exit status: 1 if there is one."""
    for reason in unreadable.values():
        print(f"error: {reason}", file=sys.stderr)
    return 1 if unreadable else 0


def save_learning_curve(result: RunResult, folder: Path) -> None:
    """Draw the run into its folder."""
    from cifar_fast.teaching.result_plots import learning_curve

    save_figure(lambda: learning_curve(result), folder / CURVE)


def save_example(data: Dataset, folder: Path) -> None:
    """Save the first test image as a picture into the run's folder, so that there is one to predict."""
    from PIL import Image

    with suppress(OSError):  # the summary then names no picture
        Image.fromarray(data.test_images[0].permute(1, 2, 0).numpy()).save(folder / EXAMPLE)


def save_figure(draw: Callable[[], Figure], path: Path) -> None:
    """Draw a figure into a file; one that cannot be written costs the runs nothing but the figure."""
    try:
        draw().savefig(path, dpi=150)
    except OSError as error:
        print(f"note: no {path.name}: {error}", file=sys.stderr)


def result_table(result: RunResult, folder: Path) -> str:
    """Return the result of a run as text."""
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
        ("n", f"1 run, seed{'' if isinstance(result.seed, int) else 's'} {result.seed}"),
        ("run folder", str(folder)),
    ]
    return table(rows)


def summary(result: RunResult, folder: Path) -> str:
    """Return a few lines: the result of a run, where its files are, and what to try next."""
    from cifar_fast.data.dataset import SYNTHETIC

    data, curve = result.dataset, folder / CURVE
    lines = [
        f"The network classifies {percent(result.accuracy)} of the {data['n_test']:,} test images of the data set "
        f"{data['name']} correctly.",
        f"Training took {in_words(result.train_seconds)} (train_seconds), and everything since the command "
        f"{in_words(result.total_seconds)} (total_seconds).",
    ]
    if data["name"] == SYNTHETIC:
        lines.insert(1, "A program has drawn these images: this accuracy says nothing about CIFAR-10.")
    if curve.exists():
        lines.append(f"picture:  {curve}")
    picture = folder / EXAMPLE
    return "\n".join(
        [
            *lines,
            f"weights:  {folder / 'weights.safetensors'}",
            "Try next:",
            f"  {program()} predict {shlex.quote(str(folder))} "
            + (shlex.quote(str(picture)) if picture.exists() else "IMAGE"),
            f"  {program()} lab",
        ]
    )


def in_words(seconds: float) -> str:
    """Return a duration in seconds, or in minutes and seconds: 7.2 s, 45 s, 2 min 31 s."""
    if seconds < 10:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"


def class_table(found: Evaluation, classes: Sequence[str]) -> str:
    """Return, for each class, its accuracy and the three classes that the model most often mistakes it for."""
    rows = [("class", "images", "accuracy", "confused with")]
    for label, counts in enumerate(found.confusion.tolist()):
        others = sorted(
            (other for other in range(len(classes)) if other != label and counts[other]),
            key=lambda other: -counts[other],
        )
        mistakes = ", ".join(f"{classes[other]} {counts[other]}" for other in others[:3])
        share = percent(counts[label] / sum(counts)) if sum(counts) else "-"
        rows.append((classes[label], f"{sum(counts):,}", share, mistakes))
    return table(rows)


def show_row(name: str, value: object) -> None:
    """Print a line of `doctor` now, because the next may take a second."""
    print(f"{name:27}  {value}", flush=True)


def version(package: str) -> str:
    """Return the version of an installed package."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"
