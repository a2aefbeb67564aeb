"""Every command does what it says, and what a user gets wrong is one line and exit status 2."""

from __future__ import annotations

import csv
import errno
import importlib
import json
import os
import pkgutil
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tomllib
from dataclasses import fields, replace
from pathlib import Path
from types import ModuleType

import pytest
import torch
from PIL import Image

import cifar_fast
from cifar_fast import cli, recipes
from cifar_fast.data import download, load, synthetic
from cifar_fast.data.dataset import Dataset
from cifar_fast.distributed import launch as launching
from cifar_fast.errors import DataNotFoundError, UserError
from cifar_fast.experiments import forecast as forecasts
from cifar_fast.experiments.forecast import Forecast, about
from cifar_fast.hardware import numerics
from cifar_fast.recipe import Recipe
from cifar_fast.teaching import notebooks
from cifar_fast.training import predict

ROOT = Path(__file__).resolve().parents[1]
CLASSES = ("blue", "green", "red")
QUICK = "--widths 8 8 8 --n-shards 1 --global-batch-size 30 --precision float32 --convolution direct".split()


@pytest.fixture(scope="module")
def run_folder(pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A network that knows the three colours."""
    out = tmp_path_factory.mktemp("runs") / "colours"
    arguments = ["train", "--recipe", "smoke", "--data", str(pictures), "--device", "cpu", "--out", str(out), "--quiet"]
    assert cli.main([*arguments, *QUICK, "--epochs", "8", "--peak-lr", "134"]) == 0
    return out


def start(*arguments: str | Path, **options) -> subprocess.Popen:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "cifar_fast", *map(str, arguments)]
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment, **options
    )


def status_of(*arguments: str | Path) -> int:
    """What the process would exit with: mistakes that the parser finds leave by SystemExit."""
    try:
        return cli.main([str(argument) for argument in arguments])
    except SystemExit as left:
        assert isinstance(left.code, int)
        return left.code


# --- the process ---


def test_help_names_every_command_without_loading_torch():
    process = start("--help")
    out, err = process.communicate()
    assert process.returncode == 0 and not err
    for command in cli.COMMANDS:
        assert re.search(rf"^  {command}  +[A-Z]", out, re.MULTILINE)
    assert len(out.splitlines()) < 25 and max(map(len, out.splitlines())) <= 120
    code = "import sys, cifar_fast.cli; sys.exit(bool({'torch', 'matplotlib', 'numpy', 'PIL'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


def test_mistakes_exit_with_2_and_no_traceback():
    processes = [start("evaluate", "nowhere"), start("train", "--recipe", "smoke", "--warp", "9"), start()]
    for process in processes:
        _, err = process.communicate()
        assert process.returncode == 2, err
        assert "Traceback" not in err and err.strip()


def test_ctrl_c_ends_cleanly_and_keeps_the_log(pictures, tmp_path):
    out = tmp_path / "run"
    # A shell that starts the tests in the background may have left SIGINT ignored, and children inherit that.
    process = start(
        "train", "--recipe", "smoke", "--data", pictures, "--device", "cpu", "--out", out, *QUICK, "--epochs", "100000",
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL), cwd=tmp_path,
    )  # fmt: skip
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("epoch   2"):
            break
    process.send_signal(signal.SIGINT)
    _, err = process.communicate()
    assert process.returncode == 130, err
    assert "Traceback" not in err
    found = re.search(r"interrupted: (\d+) finished epochs are logged in (.*)", err)
    assert found and found[2] == str(out)
    epochs = [json.loads(line)["epoch"] for line in (out / "epochs.jsonl").read_text().splitlines()]
    assert epochs[:2] == [1, 2] and epochs == list(range(1, len(epochs) + 1))
    assert len(epochs) - int(found[1]) in (0, 1)  # the signal may come between the log and the count
    assert len((out / "timing_log.tsv").read_text().splitlines()) in (len(epochs), len(epochs) + 1)
    assert not (out / "result.json").exists()


def test_a_reader_that_goes_away_is_no_error():
    process = start("doctor")
    assert process.stdout is not None and process.stderr is not None
    process.stdout.close()
    assert process.stderr.read() == ""
    assert process.wait() == 141


# --- train ---


def test_train_leaves_a_whole_run_folder(run_folder):
    names = {path.name for path in run_folder.iterdir()}
    assert names == {
        "recipe.json", "environment.json", "epochs.jsonl", "timing_log.tsv", "result.json", "weights.safetensors",
        "learning_curve.png", "example.png",
    }  # fmt: skip
    result = cifar_fast.load_run(run_folder)
    assert result.dataset["name"] == "colours" and result.dataset["classes"] == list(CLASSES)
    assert result.recipe.widths == (8, 8, 8) and result.recipe.name == "smoke-changed"
    assert result.accuracy > 0.8
    with Image.open(run_folder / "learning_curve.png") as picture:
        assert picture.width > 800


def test_train_prints_the_epochs_and_a_table(pictures, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    arguments = ["train", "--recipe", "smoke", "--data", pictures, "--device", "cpu", "--seed", "7"]
    assert status_of(*arguments, *QUICK, "--epochs", "1", "--order-seed", "8", "--logits") == 0
    out, err = capsys.readouterr()
    assert "recipe: smoke (asked for)" in out and "epochs: 2.0 -> 1.0" in out
    assert "data set: colours" in out and "epoch   1" in out
    assert re.search(r"^time: about \d+ s \(.*, measured\)$", out, re.MULTILINE)
    assert re.search(r"^smoke-changed on colours: 0%, epoch 1 of 1, 0:\d\d left, accuracy follows", err)
    assert "\r" not in err
    rows = dict(re.findall(r"^(\S+(?: \S+)*)  +(.*)$", out, re.MULTILINE))
    assert rows["data set"].startswith("colours") and "TTA: flip" in rows["accuracy"]
    assert rows["n"] == "1 run, seeds start 7, order 8, augmentation 7" and torch.__version__ in rows["versions"]
    for clock in ("train_seconds", "evaluate_seconds", "total_seconds", "first step", "hardware"):
        assert rows[clock]
    assert re.fullmatch(r"runs/smoke-changed-seed7-\d{8}-\d{6}", rows["run folder"])
    result = cifar_fast.load_run(tmp_path / rows["run folder"])
    assert result.seed == cifar_fast.Seeds(start=7, order=8, augmentation=7)
    assert result.logits is not None and result.logits.shape == (30, 3)
    assert (tmp_path / rows["run folder"] / "result.json").exists()
    # The summary at the end: its files exist, and its commands work as they stand.
    end = out[out.index("The network classifies ") :]
    assert f"{rows['accuracy'].split(' (')[0]} of the 30 test images of the data set colours correctly" in end
    assert "(train_seconds)" in end and "(total_seconds)" in end
    for file in re.findall(r"^(?:picture|weights):  (.*)$", end, re.MULTILINE):
        assert Path(file).is_file()
    predict, lab = re.findall(r"^  (.*)$", end, re.MULTILINE)
    called = [*shlex.split(cli.program())]
    assert shlex.split(lab) == [*called, "lab"]
    assert shlex.split(predict)[: len(called)] == called and status_of(*shlex.split(predict)[len(called) :]) == 0
    assert "example.png" in capsys.readouterr().out


def test_synthetic_data_is_never_silent(tiny_data, tmp_path, monkeypatch, capsys):
    for module in (load, synthetic):
        monkeypatch.setattr(module, "synthetic", lambda: tiny_data)
    arguments = ["train", "--recipe", "smoke", "--device", "cpu", "--quiet", *QUICK, "--epochs", "1"]
    assert status_of(*arguments, "--data", "synthetic", "--out", tmp_path / "asked") == 0
    assert re.search(r"data set +synthetic", capsys.readouterr().out)
    monkeypatch.setattr(load, "load_cifar10", nothing_found)
    assert status_of(*arguments, "--out", tmp_path / "found") == 0
    printed = capsys.readouterr()
    assert "data set: synthetic" in printed.err
    assert re.search(r"data set +synthetic", printed.out)
    assert status_of("evaluate", tmp_path / "found") == 0
    assert re.search(r"data set +synthetic", capsys.readouterr().out)


def nothing_found(*_: object, **__: object) -> Dataset:
    raise DataNotFoundError("no host answers")


@pytest.mark.parametrize("word", ["train", "benchmark"])
def test_every_recipe_field_is_an_option_with_the_recipes_default(word):
    kind = {"train": cli.Train, "benchmark": cli.Benchmark}[word]
    for name in ("page_2019", "apple_8gpu", "laptop"):
        command = cli.parse([word, "--recipe", name])
        assert isinstance(command, kind) and command.fields == recipes.named(name)
    changed = replace(recipes.page_2019(), preload=False, resolutions=(16, 24))
    for dash in ("-", "_"):
        arguments = [word, "--recipe=smoke"]
        for field in fields(Recipe):
            value = getattr(changed, field.name)
            arguments.append("--" + field.name.replace("_", dash))
            arguments += [str(one) for one in (value if isinstance(value, tuple) else [value])]
        command = cli.parse(arguments)
        assert isinstance(command, kind) and command.fields == changed


def test_help_of_train_is_the_fields_docstrings(capsys):
    assert status_of("train", "--recipe", "page_2019", "--help") == 0
    out = re.sub(r"[\s│]+", " ", capsys.readouterr().out)
    for field in fields(Recipe):
        assert f"--{field.name.replace('_', '-')} " in out
    assert "Alpha of CELU: how far below zero it reaches." in out
    assert "Passes over the training set; a fraction stops within an epoch. (default: 10.0)" in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--recipe", "fastest"], "no recipe 'fastest'.*laptop.*page_2019"),
        (["--epochs", "-1"], "epochs=-1.0 must be"),
        (["--epochs", "many"], "--epochs.*many"),
        (["--network", "vgg"], "vgg"),
        (["--warp", "9"], "Unrecognized.*--warp"),
        (["--ghost-batch-size", "7"], "ghost_batch_size=7 does not divide"),
        (["--seed", "-1", "--precision", "float32", "--convolution", "direct"], "seed=-1"),
        (["--start-seed", "-2"], "start seed -2 must be at least 0"),
        (["--device", "tpu"], "'tpu'"),
        (["--data", "/nowhere/at/all"], "no folder /nowhere/at/all"),
        (["--global-batch-size", "4000"], "4000 images cannot be drawn"),
        (["--global-batch-size", "40", "--out", __file__], "exists already"),
        (["--global-batch-size", "40", "--out", f"{__file__}/run"], "cannot be written"),
    ],
)
def test_mistakes_of_train(pictures, tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    defaults = ["--recipe", "smoke", "--data", str(pictures), "--device", "cpu", "--global-batch-size", "40"]
    pairs = [defaults[i : i + 2] for i in range(0, len(defaults), 2) if defaults[i] != arguments[0]]
    kept = ["--n-shards", "1"] if "fastest" not in arguments else []  # the 120 pictures are too few for eight shards
    kept += [word for pair in pairs for word in pair]
    assert status_of("train", *kept, *arguments) == 2
    err = capsys.readouterr().err
    assert re.search(message, re.sub(r"[\s│]+", " ", err)), err


def test_a_diverging_run_says_where_its_log_is(pictures, tmp_path, capsys):
    out = tmp_path / "run"
    arguments = ["train", "--recipe", "smoke", "--data", pictures, "--device", "cpu", "--out", out, *QUICK]
    assert status_of(*arguments, "--optimizer", "sgd", "--peak-lr", "1e30", "--quiet") == 2
    err = capsys.readouterr().err
    assert "diverged" in err and "peak_lr" in err and f"logged in {out}" in err
    assert (out / "recipe.json").exists() and not (out / "result.json").exists()


@pytest.mark.parametrize(
    ("n_gpus", "device", "expected"),
    [
        (0, None, "laptop"),
        (1, None, "speedrun"),
        (3, None, "speedrun"),
        (4, None, "apple_8gpu"),
        (8, None, "apple_8gpu"),
        (8, "cuda:1", "speedrun"),
        (1, "cpu", "laptop"),
        (1, "cuda", "speedrun"),
    ],
)
def test_the_hardware_picks_the_recipe(monkeypatch, n_gpus, device, expected):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: n_gpus > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: n_gpus)
    picked, why = cli.base_recipe(None, device)
    assert picked.name == expected and why
    if n_gpus > 1 and device is None:
        assert f"of the {n_gpus} here" in why or f"there are {n_gpus}" in why


@pytest.mark.parametrize(
    ("name", "seconds", "expected"),
    [
        ("CIFAR-10", {"laptop": 599}, "laptop"),
        ("CIFAR-10", {"laptop": 601, "classroom": 70}, "classroom"),
        ("synthetic", {"classroom": 89}, "classroom"),
        ("synthetic", {"classroom": 91, "smoke": 30}, "smoke"),
    ],
)
def test_a_cpu_trains_what_it_can_in_time_and_says_so(tiny_data, monkeypatch, capsys, name, seconds, expected):
    asked = []

    def forecast(recipe: Recipe, data: Dataset, *, device: str | None) -> Forecast:
        return Forecast(recipe, seconds[recipe.name], "2 cores, AVX2")

    def launched(recipe: Recipe, *_: object, expected_seconds: float, **options: object) -> None:
        asked.append((recipe.name, expected_seconds))
        raise KeyboardInterrupt

    monkeypatch.setattr(forecasts, "forecast", forecast)
    monkeypatch.setattr(launching, "launch", launched)
    monkeypatch.setattr(load, "load_or_synthetic", lambda *_, **options: replace(tiny_data, name=name))
    assert status_of("train", "--device", "cpu") == 130
    out = capsys.readouterr().out
    assert asked == [(expected, seconds[expected])]
    assert f"recipe: {expected} (" in out and f"time: {about(seconds[expected])} (2 cores, AVX2, measured)" in out
    hints = {"laptop": "train --recipe classroom", "classroom": "train --recipe laptop"}
    hint = "data --download" if name == "synthetic" else hints[expected]
    assert f"{cli.program()} {hint}" in out
    if len(seconds) == 2:
        assert f"would take {about(next(iter(seconds.values())))}" in out


def test_whoever_names_a_recipe_or_a_field_gets_that_recipe():
    for arguments, free in (
        ([], True),
        (["--seed", "3", "--data", "synthetic"], True),
        (["--recipe", "laptop"], False),
        (["--recipe=laptop"], False),
        (["--epochs", "10"], False),  # as `laptop` has it: still somebody's wish
        (["--label_smoothing=0.1"], False),
    ):
        command = cli.parse(["train", "--device", "cpu", *arguments])
        assert isinstance(command, cli.Train) and command.free == free, arguments


def test_the_program_is_named_as_the_shell_finds_it(tmp_path, monkeypatch):
    script = tmp_path / "the bin" / "cifar-fast"
    script.parent.mkdir()
    script.touch(0o755)
    monkeypatch.setattr(sys, "argv", [str(script), "train"])
    monkeypatch.setenv("PATH", str(tmp_path))
    assert shlex.split(cli.program()) == [str(script)]
    monkeypatch.setenv("PATH", str(script.parent))
    assert cli.program() == "cifar-fast"
    monkeypatch.setattr(sys, "argv", [str(ROOT / "cifar_fast" / "__main__.py")])
    assert shlex.split(cli.program()) == [sys.executable, "-m", "cifar_fast"]


# --- benchmark ---


@pytest.fixture(scope="module")
def benchmark_command(pictures: Path) -> list[str]:
    """A benchmark of runs that take a moment each."""
    quick = [*QUICK, "--epochs", "1"]
    return ["benchmark", "--recipe", "smoke", "--data", str(pictures), "--device", "cpu", *quick]


def test_benchmark_goes_on_prints_the_comparison_and_draws_it(benchmark_command, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert status_of(*benchmark_command, "--runs", "2", "--target", "30") == 0
    out = capsys.readouterr().out
    folder = Path("runs/benchmark-smoke-changed-2")
    assert f"folder: {folder}" in out and "epochs: 2.0 -> 1.0" in out
    assert "run   0 (1 of 2)  seed   0" in out and "run   1 (2 of 2)  seed   1" in out
    assert re.search(r"^n +2 runs +50 runs$", out, re.MULTILINE) and re.search(r"^at 30\.00 %", out, re.MULTILINE)
    assert "NOT COMPARABLE: these runs used the data set colours" in out
    assert {path.name for path in folder.iterdir()} - {".lock"} == {
        "results.jsonl", "run_log.txt", "summary.json", "timing_log.tsv", "weights.safetensors", "result.json",
        "accuracy_and_time.png",
    }  # fmt: skip
    assert status_of(*benchmark_command, "--runs", "3", "--quiet", "--out", folder, "--logits") == 0
    printed = capsys.readouterr()
    assert "resuming with run 2" in printed.err and "run   2" not in printed.out
    assert "note: a variance needs the logits of at least two runs, not of 1" in printed.err
    assert status_of(*benchmark_command, "--runs", "4", "--quiet", "--out", folder, "--logits") == 0
    words = capsys.readouterr().out
    assert re.search(r"^runs +2 \(2 more without logits\), each tested on the same 30 images$", words, re.MULTILINE)
    assert len(cifar_fast.load_benchmark(folder).runs) == 4
    with Image.open(folder / "accuracy_and_time.png") as picture:
        assert picture.width > 1000
    assert status_of("evaluate", folder, "--data", benchmark_command[4]) == 0  # the first run, as `train` leaves one
    first = cifar_fast.load_benchmark(folder).runs[0]
    assert f"accuracy      {100 * first['accuracy']:.2f} %" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--target", "0.94"], "0.94 is a share; it is given in per cent: --target 94"),
        (["--target", "101"], "--target 101 must be an accuracy in per cent"),
        (["--runs", "0"], "runs=0 must be at least 1"),
        (["--first-seed", "-1"], "first_seed=-1 must be at least 0"),
        (["--recipe", "fastest"], "no recipe 'fastest'"),
        (["--warp", "9"], "Unrecognized.*--warp"),
        (["--world-size", "2"], "n_shards=1 cannot be divided among world_size=2"),
    ],
)
def test_mistakes_of_benchmark(benchmark_command, tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    kept = benchmark_command[:1] + benchmark_command[3:] if arguments[0] == "--recipe" else benchmark_command
    assert status_of(*kept, *arguments) == 2
    err = capsys.readouterr().err
    assert re.search(message, re.sub(r"[\s│]+", " ", err)), err
    assert not list(tmp_path.iterdir())


def test_ctrl_c_in_a_benchmark_keeps_the_finished_runs(benchmark_command, tmp_path, monkeypatch, capsys):
    from cifar_fast.distributed.launch import Trainer

    train, arguments = Trainer.train, [*benchmark_command, "--runs", "3", "--out", tmp_path / "runs"]
    for at, said in enumerate(("no run was finished", "1 finished run is kept in", "2 finished runs are kept in")):

        def interrupted(trainer, *args, seed, at=at, **options):
            if seed == at:
                raise KeyboardInterrupt
            return train(trainer, *args, seed=seed, **options)

        monkeypatch.setattr(Trainer, "train", interrupted)
        assert status_of(*arguments) == 130
        err = capsys.readouterr().err
        assert f"interrupted: {said}" in err and "the same command resumes" in err
    monkeypatch.setattr(Trainer, "train", train)
    assert status_of(*arguments) == 0
    assert [run["seed"] for run in cifar_fast.load_benchmark(tmp_path / "runs").runs] == [0, 1, 2]


# --- compare ---


@pytest.fixture(scope="module")
def compare_command(pictures: Path) -> list[str]:
    """A comparison of runs that take a moment each."""
    return ["compare", "smoke", "--data", str(pictures), "--device", "cpu", *QUICK, "--epochs", "1", "--max-runs", "5"]


def test_compare_says_what_it_may_take_then_the_verdict_and_resumes(compare_command, tmp_path, monkeypatch, capsys):
    from cifar_fast.distributed.launch import Trainer

    monkeypatch.chdir(tmp_path)
    train, arguments = Trainer.train, [*compare_command, "--b", "label_smoothing=0.5", "flip=none"]

    def interrupted(trainer, *args, seed, **options):
        if seed == 2:
            raise KeyboardInterrupt
        return train(trainer, *args, seed=seed, **options)

    monkeypatch.setattr(Trainer, "train", interrupted)
    assert status_of(*arguments) == 130
    printed = capsys.readouterr()
    name = "smoke-changed, flip=none, label_smoothing=0.5"
    assert f"A: smoke-changed\nB: {name}\n  flip: alternating -> none\n" in printed.out
    assert printed.out.index("PREDICTION: pairs of runs") < printed.out.index("seed   0")
    assert "VERDICT: Too early to say: it takes 5 pairs of runs for an interval, and there are 2." in printed.out
    folder = Path("runs/compare-smoke-changed-smoke-changed_flip=none_label_smoothing=0.5")
    assert f"interrupted: finished runs are kept in {folder}; the same command resumes" in printed.err
    monkeypatch.setattr(Trainer, "train", train)
    assert status_of(*arguments, "--quiet") == 0
    printed = capsys.readouterr()
    found = cifar_fast.load_comparison(folder)
    assert "holds 2 pairs of at most 5: resuming" in printed.err
    assert printed.out == f"\n{found.table()}\nfolder: {folder}\n" and found.pairs == 5
    assert [(run["recipe"]["name"], run["recipe"]["flip"], run["recipe"]["epochs"]) for run in found.arms["b"]] == [
        (name, "none", 1.0)
    ] * 5


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--b", "flip"], "--b flip: write a field and its value, such as --b epochs=8"),
        (["--a", "flop=none"], "unknown recipe field flop"),
        (["--b", "freeze_bn_scale=1"], "freeze_bn_scale=1 must be true or false"),
        ([], "both arms are smoke-changed: change a field"),
        (["--b", "flip=none", "--resolution", "-1"], "resolution=-1 must be a width in percentage points"),
        (["--b", "n_shards=3", "--world-size", "3"], "n_shards=1 cannot be divided among world_size=3"),
    ],
)
def test_mistakes_of_compare(compare_command, tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    assert status_of(*compare_command, *arguments) == 2
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_arms_are_recipes_with_common_and_own_changes():
    words = ["laptop", "classroom", "--epochs", "3", "--b", "resolutions=()", "freeze_bn_scale=true", "flip=random"]
    command = cli.parse(["compare", *words, "--a", "widths=(8, 8, 8)"])
    assert isinstance(command, cli.Compare)
    a, b = command.arms()
    assert (a.name, a.epochs, a.widths) == ("laptop-changed, widths=(8, 8, 8)", 3.0, (8, 8, 8))
    assert (b.epochs, b.resolutions, b.freeze_bn_scale, b.flip) == (3.0, (), True, "random")
    assert b.widths == recipes.classroom().widths and b.name.startswith("classroom-changed, ")


# --- evaluate ---


def test_evaluate_says_what_train_said(run_folder, pictures, capsys):
    assert status_of("evaluate", run_folder, "--data", pictures, "--device", "cpu") == 0
    out = capsys.readouterr().out
    rows = dict(re.findall(r"^(\S+(?: \S+)*)  +(.*)$", out, re.MULTILINE))
    accuracy = cifar_fast.load_run(run_folder).accuracy
    assert rows["accuracy"] == f"{100 * accuracy:.2f} % (TTA: flip)"
    assert rows["data set"].startswith("colours") and "note" not in out
    for name in CLASSES:
        assert re.search(rf"^{name} +10 +\d+\.\d\d %", out, re.MULTILINE)
    assert status_of("evaluate", run_folder, "--data", pictures, "--tta", "none", "--device", "cpu") == 0
    assert "(TTA: none)" in capsys.readouterr().out


def test_evaluate_on_other_data_says_so(run_folder, pictures, tmp_path, capsys):
    other = tmp_path / "others"
    for path in pictures.glob("*/*/[0-4].png"):
        name = "crimson" if path.parent.name == "red" else path.parent.name
        (other / path.parent.parent.name / name).mkdir(parents=True, exist_ok=True)
        shutil.copy(path, other / path.parent.parent.name / name)
    assert status_of("evaluate", run_folder, "--data", other) == 0
    out = capsys.readouterr().out
    assert "note: these are not the data of the run: others has the fingerprint" in out
    assert "other names: blue, green, red" in out


def test_evaluate_needs_as_many_classes(run_folder, tiny_data, monkeypatch, capsys):
    for module in (load, synthetic):
        monkeypatch.setattr(module, "synthetic", lambda: tiny_data)
    assert status_of("evaluate", run_folder, "--data", "synthetic") == 2
    assert "knows 3 classes and synthetic has 10" in capsys.readouterr().err


def test_evaluate_of_no_run(tmp_path, capsys):
    assert status_of("evaluate", tmp_path) == 2
    assert "not a finished run" in capsys.readouterr().err


# --- predict ---


def colour_picture(path: Path, colour: str, size: tuple[int, int]) -> Path:
    Image.new("RGB", size, colour).save(path)
    return path


def test_predict_takes_pictures_of_any_size_and_kind(run_folder, pictures, tmp_path, capsys):
    paths = [colour_picture(tmp_path / "tiny.gif", "grey", (1, 7)), pictures / "test" / "red" / "0.png"]
    for name, suffix in (("red", "png"), ("green", "bmp"), ("blue", "jpg")):
        with Image.open(pictures / "test" / name / "0.png") as picture:
            large = Image.new("RGB", (900, 320))  # the picture ten times as large, in the middle of a wide black one
            large.paste(picture.resize((320, 320), Image.Resampling.NEAREST), (290, 0))
            large.save(tmp_path / f"{name}.{suffix}")
            paths.append(tmp_path / f"{name}.{suffix}")
    assert status_of("predict", run_folder, *paths, "--top", "2") == 0
    header, *lines = capsys.readouterr().out.splitlines()
    assert "data set: colours" in header and len(lines) == 5
    for path, line in zip(paths, lines, strict=True):
        guesses = re.findall(r"  (\w+) ([\d.]+) %", line)
        assert line.startswith(str(path)) and len(guesses) == 2
        assert float(guesses[0][1]) >= float(guesses[1][1])
    for name, line in zip(("red", "red", "green", "blue"), lines[1:], strict=True):
        assert re.search(rf"\.\w+ +{name} ", line)


def test_predict_takes_folders_and_writes_csv_and_json(run_folder, pictures, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(pictures / "test", "mine")
    Path("mine", "red", "bad.png").write_text("not a picture")
    Path("mine", "notes.txt").touch()
    single = colour_picture(Path("grey.bmp"), "grey", (7, 9))
    missing = Path("missing.png")
    arguments = ["predict", run_folder, "mine", single, missing, single]
    assert status_of(*arguments, "--out", "predictions.csv") == 1
    printed = capsys.readouterr()
    assert "31 pictures: " in printed.out and "predictions: predictions.csv" in printed.out
    assert "mine/red/bad.png cannot be read as a picture" in printed.err and "no file missing.png" in printed.err
    with open("predictions.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == ["path", "class", "probability"] and len(rows) == 31
    assert [row["path"] for row in rows[:2]] == ["mine/blue/0.png", "mine/blue/1.png"]
    assert rows[-1]["path"] == "grey.bmp"
    right = [row["class"] == Path(row["path"]).parent.name for row in rows[:-1]]
    assert sum(right) == round(30 * cifar_fast.load_run(run_folder).accuracy)
    assert status_of(*arguments, "--out", "predictions.json", "--all") == 1
    written = json.loads(Path("predictions.json").read_text())
    assert [(row["path"], row["class"]) for row in written] == [(row["path"], row["class"]) for row in rows]
    for row in written:
        assert set(row["probabilities"]) == set(CLASSES) and abs(sum(row["probabilities"].values()) - 1) < 1e-5
        assert row["probability"] == row["probabilities"][row["class"]] == max(row["probabilities"].values())
    assert {path.name for path in Path().iterdir()} == {"mine", "grey.bmp", "predictions.csv", "predictions.json"}


def test_mistakes_of_predict(run_folder, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    good = colour_picture(tmp_path / "good.png", "red", (8, 8))
    text, cut, empty, folder = (tmp_path / name for name in ("text.png", "cut.png", "empty.png", "folder"))
    text.write_text("not a picture")
    cut.write_bytes(colour_picture(tmp_path / "large.png", "red", (300, 300)).read_bytes()[:200])
    empty.touch()
    folder.mkdir()
    assert status_of("predict", run_folder, text, cut, empty) == 2  # nothing that could be done
    printed = capsys.readouterr()
    assert all(path.name in printed.err for path in (text, cut, empty)) and not printed.out
    assert status_of("predict", run_folder, good, cut) == 1  # the rest is done
    printed = capsys.readouterr()
    assert "cut.png" in printed.err and re.search(r"good\.png +red ", printed.out)
    for arguments, message in [
        ([], "no picture is named"),
        ([good, "--top", "4"], "the number of classes"),
        ([folder], "folder holds no picture"),
        ([good, "--all"], "name a file with --out"),
        ([good, "--out", "x.txt"], "must end in .csv or .json"),
        ([good, "--out", "nowhere/x.csv"], "there is no folder nowhere"),
        ([good, "--out", tmp_path / "full.csv"], "cannot be written"),
    ]:
        if "cannot" in message:
            monkeypatch.setattr(predict, "written_whole", full_disk)
        assert status_of("predict", run_folder, *arguments) == 2, arguments
        assert message in capsys.readouterr().err
    assert not list(tmp_path.glob("*.csv*"))


def test_predict_without_a_run_asks_the_network_that_ships(real_data, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for index in range(8):
        Image.fromarray(real_data.test_images[index].permute(1, 2, 0).numpy()).save(f"{index}.png")
    for network in ([], ["laptop"]):
        assert status_of("predict", *network, ".", "--top", "1") == 0
        header, *lines = capsys.readouterr().out.splitlines()
        assert header == "network: laptop, trained on data set: CIFAR-10" and len(lines) == 8
        truth = [real_data.classes[label] for label in real_data.test_labels[:8].tolist()]
        assert sum(line.split()[1] == name for line, name in zip(lines, truth, strict=True)) >= 7
    Path("laptop").mkdir()  # a folder of that name is a folder of pictures
    assert status_of("predict", "laptop") == 2
    assert "laptop holds no picture" in capsys.readouterr().err


def test_predict_and_evaluate_of_a_network_that_is_not_there(tmp_path, capsys):
    picture = colour_picture(tmp_path / "red.png", "red", (8, 8))
    assert status_of("predict", tmp_path / "nowhere", picture, "--top", "1") == 1  # taken for a picture
    assert "no file" in capsys.readouterr().err
    assert status_of("evaluate", "nowhere") == 2
    assert "nowhere is not a finished run" in capsys.readouterr().err


def full_disk(path: Path) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


def test_evaluate_takes_pictures_labelled_by_their_folders(run_folder, pictures, tmp_path, capsys):
    out = tmp_path / "predictions.csv"
    assert status_of("evaluate", run_folder, "--data", pictures, "--out", tmp_path / "set.csv") == 0
    of_set = capsys.readouterr().out
    assert status_of("evaluate", run_folder, pictures / "test", "--out", out, "--all") == 0
    printed = capsys.readouterr().out
    tables = [re.findall(r"^((?:accuracy|loss|red|green|blue)  .*)$", text, re.MULTILINE) for text in (of_set, printed)]
    assert tables[0] == tables[1] and "30 pictures" in printed and f"predictions: {out}" in printed
    with out.open(newline="") as file:
        rows = list(csv.DictReader(file))
    columns = ["path", "class", "probability", "label", "correct", "p_blue", "p_green", "p_red"]
    assert list(rows[0]) == columns and len(rows) == 30
    assert all(row["label"] == Path(row["path"]).parent.name for row in rows)
    assert all((row["correct"] == "True") == (row["class"] == row["label"]) for row in rows)
    with (tmp_path / "set.csv").open(newline="") as file:
        assert sum(row["correct"] == "True" for row in csv.DictReader(file)) == sum(
            row["correct"] == "True" for row in rows
        )
    single = colour_picture(tmp_path / "lost.png", "red", (9, 9))
    for arguments, message in [
        ([single], f"knows no class {tmp_path.name}; a picture's class is the name of its folder, one of blue, green"),
        ([pictures], "has pictures to train on, too"),
        ([single, "--data", pictures], "not both"),
        (["--all"], "name a file with --out"),
    ]:
        assert status_of("evaluate", run_folder, *arguments) == 2
        assert message in capsys.readouterr().err


def test_larger_pictures_are_trained_evaluated_and_predicted_at_their_size(pictures, tmp_path, capsys):
    out = tmp_path / "run"
    arguments = [
        "train",
        "--recipe",
        "smoke",
        "--data",
        pictures,
        "--image-size",
        "48",
        "--device",
        "cpu",
        "--out",
        out,
    ]
    assert status_of(*arguments, *QUICK, "--epochs", "1", "--resolutions", "24", "32", "--quiet") == 0
    assert "of 150 pictures (32x32 pixels) are resized to 48x48" in capsys.readouterr().err
    result = cifar_fast.load_run(out)
    assert result.dataset["image_size"] == 48
    assert status_of("evaluate", out, "--data", pictures) == 0
    printed = capsys.readouterr().out
    assert f"accuracy      {100 * result.accuracy:.2f} %" in printed and "note" not in printed
    assert status_of("predict", out, pictures / "test" / "red", "--top", "1") == 0
    assert len(capsys.readouterr().out.splitlines()) == 11
    assert status_of("train", "--data", "synthetic", "--image-size", "48", "--recipe", "smoke") == 2
    assert "is for folders of your own pictures" in capsys.readouterr().err


def test_cifar100_is_asked_for_by_name(tiny_data, tmp_path, monkeypatch, capsys):
    fine = replace(tiny_data, name="CIFAR-100")
    monkeypatch.setattr(load, "load_cifar100", lambda mirrors: fine)
    out = tmp_path / "run"
    arguments = ["train", "--recipe", "smoke", "--data", "cifar100", "--device", "cpu", "--out", out, "--quiet"]
    assert status_of(*arguments, *QUICK, "--epochs", "1") == 0
    assert "none has been tried on CIFAR-100" in capsys.readouterr().err
    assert status_of("evaluate", out) == 0
    assert re.search(r"^data set +CIFAR-100, 200 test", capsys.readouterr().out, re.MULTILINE)


# --- data, doctor, lab ---


def test_data_reports_what_is_there(pictures, capsys):
    assert status_of("data", "--data", pictures) == 0
    out = capsys.readouterr().out
    assert str(pictures) in out and "120 training and 30 test images of 3 classes" in out
    assert "cache folder" in out


def test_data_without_any_and_with_damaged_data(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("CIFAR_FAST_CACHE", str(tmp_path / "empty"))
    assert status_of("data") == 1
    assert "--download" in capsys.readouterr().out
    (tmp_path / "train" / "one").mkdir(parents=True)
    assert status_of("data", "--data", tmp_path) == 1
    assert "would stop" in capsys.readouterr().out
    assert status_of("data", "--mirror", "http://localhost/x.tar.gz") == 2
    assert "add --download" in capsys.readouterr().err


def test_data_downloads_from_the_mirrors(tmp_path, monkeypatch, capsys):
    asked = []
    for name in ("download_cifar10", "download_cifar100"):
        monkeypatch.setattr(download, name, lambda mirrors, name=name: asked.append((name, mirrors)) or tmp_path)
    monkeypatch.setenv("CIFAR_FAST_CACHE", str(tmp_path / "empty"))
    mirrors = ["--mirror", "http://a/x", "--mirror", "http://b/x"]
    assert status_of("data", "--download", *mirrors) == 1
    assert f"downloaded: {tmp_path}" in capsys.readouterr().out
    assert status_of("data", "--download", "--data", "cifar100", *mirrors) == 1
    assert [name for name, _ in asked] == ["download_cifar10", "download_cifar100"]
    assert all(given == ("http://a/x", "http://b/x") for _, given in asked)
    assert "`train --data cifar100` would download CIFAR-100" in capsys.readouterr().out


def test_doctor_says_what_this_machine_would_get_and_why(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(numerics, "_rates_file", lambda: tmp_path / "rates.json")
    printed = []
    monkeypatch.setattr("builtins.print", lambda *words, flush=False, **_: printed.append((" ".join(words), flush)))
    with monkeypatch.context() as patch:
        patch.setattr(numerics, "convolution_rates", lambda: pytest.fail("measured without being asked"))
        assert status_of("doctor", "--device", "cpu") == 0
        assert all(flush for _, flush in printed)
        rows = table_rows(printed)
        assert rows["precision"] == rows["convolution"] == "not yet measured"
        assert rows["because"].endswith("doctor --measure does so now")
    numerics.convolution_rates.cache_clear()
    monkeypatch.setattr(numerics, "TIMED_IMAGES", 4)
    monkeypatch.setattr(numerics.convolution_rates.__wrapped__, "__defaults__", (4,))
    assert status_of("doctor", "--device", "cpu", "--measure") == 0
    measured = table_rows(printed)
    numerics.convolution_rates.cache_clear()
    assert status_of("doctor", "--device", "cpu") == 0
    rows = table_rows(printed)
    assert rows == measured and not numerics.convolution_rates.cache_info().currsize
    for row in (
        "processor",
        "CPU capability",
        "memory",
        "GPUs",
        "Apple GPU",
        "Intel GPU",
        "torch",
        "jupyterlab",
        "data set",
    ):
        assert rows[row]
    for kernels in ("Winograd", "AMX", "norm and activation"):
        assert re.match("compiled$|none: .", rows[f"{kernels} kernels"])
    assert rows["recipe"].split()[0] == "laptop"
    assert rows["precision"] in ("float32", "float16", "bfloat16") and rows["because"]
    assert rows["convolution"] in ("direct", "winograd", "amx")
    assert rows["cifar_fast"] == cifar_fast.__version__


def table_rows(printed: list[tuple[str, bool]]) -> dict[str, str]:
    """Return the names and values that `doctor` has printed, and forget them."""
    cells = [line.split("  ", 1) for line, _ in printed]
    printed.clear()
    return {name: value.strip() for name, value in cells}


def test_lab_without_notebooks_or_jupyterlab(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(notebooks, "FOLDER", tmp_path / "notebooks")
    assert status_of("lab") == 2
    assert "there are no notebooks in" in capsys.readouterr().err
    (tmp_path / "notebooks").mkdir()
    (tmp_path / "notebooks" / "00_first.ipynb").touch()
    monkeypatch.setitem(sys.modules, "jupyterlab.labapp", None)
    monkeypatch.setitem(sys.modules, "jupyterlab", None)
    assert status_of("lab") == 2
    assert "pip install 'cifar_fast[notebooks]'" in capsys.readouterr().err


def test_lab_opens_the_notebooks(tmp_path, monkeypatch):
    started = []

    class LabApp:
        @staticmethod
        def launch_instance(arguments: list[str]) -> None:
            started.append(arguments)

    module = type(sys)("jupyterlab.labapp")
    monkeypatch.setattr(module, "LabApp", LabApp, raising=False)
    monkeypatch.setitem(sys.modules, "jupyterlab", type(sys)("jupyterlab"))
    monkeypatch.setitem(sys.modules, "jupyterlab.labapp", module)
    monkeypatch.setattr(notebooks, "FOLDER", tmp_path)
    (tmp_path / "00_first.ipynb").touch()
    assert status_of("lab", "--", "--no-browser", "--port=8899") == 0
    assert started == [[str(tmp_path), "--no-browser", "--port=8899"]]


def test_the_notebooks_of_an_installed_package_are_copied_to_where_they_can_be_edited(tmp_path, monkeypatch, capsys):
    installed, here = tmp_path / "installed", tmp_path / "here"
    shutil.copytree(notebooks.FOLDER, installed)
    monkeypatch.setattr(notebooks, "FOLDER", installed)
    monkeypatch.setattr(notebooks, "PACKAGED", installed)
    here.mkdir()
    monkeypatch.chdir(here)
    assert notebooks.to_work_in() == here / "cifar_fast_notebooks"
    copies = [path.relative_to(here / "cifar_fast_notebooks") for path in here.rglob("*.*")]
    assert {path.name for path in copies if path.suffix == ".ipynb"} == {path.name for path in notebooks.find()}
    assert len([path for path in copies if path.match("solutions/*.py")]) == len(notebooks.find())
    (mine := here / "cifar_fast_notebooks" / "00_quickstart.ipynb").write_text("mine")
    notebooks.to_work_in()
    assert mine.read_text() == "mine"
    monkeypatch.setattr(notebooks, "COPY", tmp_path / "file" / "copy")
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot be copied to .*file/copy"):
        notebooks.to_work_in()


# --- the public names ---


def test_a_public_name_means_the_same_whatever_was_imported_before():
    for module in pkgutil.walk_packages(cifar_fast.__path__, "cifar_fast."):
        if "__main__" not in module.name and "results" not in module.name:
            importlib.import_module(module.name)
    for module, names in cifar_fast._NAMES.items():
        for name in names:
            assert getattr(cifar_fast, name) is getattr(importlib.import_module(f"cifar_fast.{module}"), name)
            assert not isinstance(getattr(cifar_fast, name), ModuleType)
    assert {name for names in cifar_fast._NAMES.values() for name in names} <= set(cifar_fast.__all__)


def test_unknown_names_and_the_version():
    with pytest.raises(AttributeError, match="no attribute 'warp'"):
        _ = cifar_fast.warp
    assert set(dir(cifar_fast)) == set(cifar_fast.__all__) | {"widgets"}
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert cifar_fast.__version__ == project["version"]
    assert cifar_fast.replace is replace
