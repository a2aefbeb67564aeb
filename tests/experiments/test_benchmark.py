"""Killed anywhere and resumed, a benchmark ends like an undisturbed one, and it never mixes two kinds of runs."""

from __future__ import annotations

import itertools
import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from cells import CELLS, tricks_of
from killed import FORKS, die, in_a_child

import cifar_fast
from cifar_fast.data.dataset import Dataset
from cifar_fast.data.load import load_cifar10
from cifar_fast.distributed import launch as parallel
from cifar_fast.errors import RunError, TrainingError, UserError
from cifar_fast.experiments.benchmark import load_benchmark, logits_file
from cifar_fast.experiments.statistics import excludes, summarise
from cifar_fast.experiments.tables import run_log
from cifar_fast.experiments.variance import variance
from cifar_fast.hardware.device import environment
from cifar_fast.recipe import Recipe
from cifar_fast.recipes import smoke
from cifar_fast.training.loop import train
from cifar_fast.training.result import EpochResult, RunResult, load_logits, load_run, save_run
from cifar_fast.training.tricks import NO_TRICKS, Tricks

benchmarking = import_module("cifar_fast.experiments.benchmark")  # the module: `cifar_fast.benchmark` is the function
benchmark = benchmarking.benchmark

RECIPE = replace(
    smoke(), widths=(8, 8, 8), n_shards=1, global_batch_size=40, epochs=1.0, precision="float32", convolution="direct"
)
MACHINE = environment(torch.device("cpu"))
FILES = {
    ".lock", "results.jsonl", "run_log.txt", "summary.json", "timing_log.tsv", "weights.safetensors", "result.json",
}  # fmt: skip
PICTURE = "accuracy_and_time.png"
ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def data(tiny_data: Dataset) -> Dataset:
    """80 training and 40 test images."""
    cut = {"train_images": 80, "train_labels": 80, "test_images": 40, "test_labels": 40}
    return replace(tiny_data, **{name: getattr(tiny_data, name)[:n] for name, n in cut.items()})


def accuracy_of(seed: int) -> float:
    return 0.93 + (seed * 7919 % 200) / 10_000


class FakeTrainer:
    """Trains in no time: the result of a run depends on its seed alone. Remembers what it was asked for."""

    calls: list[Any] = []
    on_train: Callable[[int], None] = staticmethod(lambda seed: None)
    is_main = True
    environment = MACHINE

    def __init__(self, data: Dataset, *, world_size, device, backend, timeout) -> None:
        self.data, self.world_size = data, world_size
        self.calls.append("start")

    def __enter__(self) -> FakeTrainer:
        return self

    def __exit__(self, *_: object) -> None:
        self.calls.append("close")

    def agree(self, value: Any) -> Any:
        return value

    def warm_up(self, recipe: Recipe, tricks: Tricks) -> None:
        self.calls.append("warm up")

    def train(
        self,
        recipe: Recipe,
        *,
        tricks: Tricks = NO_TRICKS,
        seed: int,
        out: Path | None,
        save_logits: bool = False,
        progress: bool,
    ) -> RunResult:
        self.calls.append(seed)
        self.on_train(seed)
        epoch = EpochResult(
            epoch=1, train_loss=1.0, train_accuracy=0.5, test_loss=0.25, test_accuracy=accuracy_of(seed),
            tta=recipe.tta, train_seconds=1.0 + seed,
        )  # fmt: skip
        numerics = {"precision": "float32", "convolution": "direct"}
        machine = self.environment | numerics | {"world_size": self.world_size, "backend": None}
        model: Any = torch.nn.Linear(1, 1)
        torch.nn.init.constant_(model.weight, seed)
        torch.nn.init.constant_(model.bias, seed)
        clocks = {"train_seconds": 1.0 + seed, "evaluate_seconds": 0.5, "total_seconds": 2.0 + seed}
        result = RunResult(
            recipe=recipe, dataset=self.data.describe(), environment=machine, seed=seed, epochs=[epoch], model=model,
            first_step_seconds=0.25, peak_memory_gb=1.0, tricks=tricks.describe(), **clocks,
        )  # fmt: skip
        if out is not None:
            save_run(result, out)
        return result


@pytest.fixture(autouse=True)
def trainer(monkeypatch: pytest.MonkeyPatch) -> type[FakeTrainer]:
    """The trainer of this test's benchmarks, with an empty memory."""

    class Fresh(FakeTrainer):
        calls: list[Any] = []

    monkeypatch.setattr(benchmarking, "Trainer", Fresh)
    return Fresh


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != ".lock"}


def check_whole(folder: Path, runs: int, target: float = 0.94) -> None:
    """Exactly `runs` whole runs are there, all other files follow from them, and nothing else is left."""
    assert {path.name for path in folder.iterdir()} - {".lock"} == FILES - {".lock"}
    lines = [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()]
    assert [(line["run"], line["seed"], line["accuracy"]) for line in lines] == [
        (i, i, accuracy_of(i)) for i in range(runs)
    ]
    assert (folder / "run_log.txt").read_text() == run_log(lines, target)
    assert json.loads((folder / "summary.json").read_text()) == summarise(lines, target)
    first = json.loads((folder / "result.json").read_text())
    assert lines[0] == first | {"run": 0, "target": target, "version": cifar_fast.__version__}
    assert (folder / "timing_log.tsv").read_text().splitlines() == [
        "epoch\thours\ttop1Accuracy", f"1\t{1 / 3600:.8f}\t{100 * accuracy_of(0):.2f}"
    ]  # fmt: skip


# --- one benchmark, undisturbed ---


def test_a_benchmark_leaves_the_originals_files_and_ours(data, tmp_path, trainer, capsys):
    heard = []
    found = benchmark(RECIPE, data, runs=5, out=tmp_path / "deep" / "runs", progress=False, on_run=heard.append)
    check_whole(tmp_path / "deep" / "runs", 5)
    assert trainer.calls == ["start", "warm up", 0, 1, 2, 3, 4, "close"]
    assert heard == found.runs and found.recipe == RECIPE
    assert found.summary() == summarise(found.runs, 0.94)
    assert capsys.readouterr() == ("", "")
    assert load_benchmark(tmp_path / "deep" / "runs") == found
    assert load_benchmark(tmp_path / "deep" / "runs", target=0.5).summary()["at_target"] == 5


def test_every_line_has_all_that_a_table_needs(data, tmp_path):
    benchmark(RECIPE, data, runs=1, out=tmp_path, target=0.9, first_seed=7, progress=False)
    line = json.loads((tmp_path / "results.jsonl").read_text())
    assert (line["run"], line["seed"], line["target"]) == (0, 7, 0.9)
    assert line["version"] == cifar_fast.__version__
    assert Recipe.from_dict(line["recipe"]) == RECIPE
    assert line["dataset"]["fingerprint"] == data.fingerprint
    assert line["environment"]["torch"] == torch.__version__ and line["epochs"][0]["train_loss"] == 1.0


def test_progress_is_a_line_for_each_run(data, tmp_path, capsys):
    benchmark(RECIPE, data, runs=2, out=tmp_path)
    assert capsys.readouterr().out.splitlines() == [
        "run   0 (1 of 2)  seed   0      1.00 s  test accuracy 93.00 %",
        f"run   1 (2 of 2)  seed   1      2.00 s  test accuracy {100 * accuracy_of(1):.2f} %",
    ]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"runs": 0}, "runs=0 must be at least 1"),
        ({"first_seed": -1}, "first_seed=-1 must be at least 0"),
        ({"target": 94.0}, "target=94 must be a share.* for 94 % give 0.94"),
        ({"target": 0.0}, "target=0 must be a share"),
        ({"world_size": 3}, "n_shards=1 cannot be divided among world_size=3"),
    ],
)
def test_mistakes_are_reported_before_anything_starts(data, tmp_path, trainer, arguments, message):
    with pytest.raises(UserError, match=message):
        benchmark(RECIPE, data, out=tmp_path / "runs", **arguments)
    assert trainer.calls == [] and not (tmp_path / "runs").exists()


# --- until_confident ---


def test_until_confident_stops_when_the_interval_excludes_the_target(data, tmp_path):
    arguments = {"runs": 50, "out": tmp_path, "target": 0.946, "until_confident": True, "progress": False}
    found = benchmark(RECIPE, data, **arguments)
    accuracies = [line["accuracy"] for line in found.runs]
    assert 3 <= len(accuracies) < 50 and excludes(accuracies, 0.946)
    assert not any(excludes(accuracies[:n], 0.946) for n in range(len(accuracies)))
    assert benchmark(RECIPE, data, **arguments) == found


def test_until_confident_takes_at_most_runs(data, tmp_path, monkeypatch):
    monkeypatch.setattr(sys.modules[__name__], "accuracy_of", lambda seed: 0.93 if seed % 2 else 0.95)
    assert len(benchmark(RECIPE, data, runs=6, out=tmp_path, until_confident=True, progress=False).runs) == 6


# --- resuming ---


@pytest.mark.parametrize("calls", [(1, 3), (2, 2, 4)], ids=str)
def test_a_benchmark_in_several_calls_leaves_the_same_files_as_in_one(data, tmp_path, calls):
    expected = benchmark(RECIPE, data, runs=calls[-1], out=tmp_path / "whole", progress=False)
    for runs in calls:
        found = benchmark(RECIPE, data, runs=runs, out=tmp_path / "parts", progress=False)
    assert found == expected and contents(tmp_path / "parts") == contents(tmp_path / "whole")


def test_resuming_says_what_was_found_and_warms_up_only_for_a_run(data, tmp_path, trainer, capsys):
    benchmark(RECIPE, data, runs=2, out=tmp_path, progress=False)
    trainer.calls.clear()
    benchmark(RECIPE, data, runs=3, out=tmp_path, progress=False)
    assert trainer.calls == ["start", "warm up", 2, "close"]
    assert f"{tmp_path} holds 2 of 3 runs: resuming with run 2" in capsys.readouterr().err
    trainer.calls.clear()
    benchmark(RECIPE, data, runs=3, out=tmp_path, progress=False)
    assert trainer.calls == ["start", "close"]
    assert "holds 3 of 3 runs: nothing is left to do" in capsys.readouterr().err


def test_log_and_summary_are_rewritten_even_when_no_run_is_missing(data, tmp_path):
    benchmark(RECIPE, data, runs=2, out=tmp_path, progress=False)
    expected = contents(tmp_path)
    (tmp_path / "run_log.txt").unlink()
    (tmp_path / "summary.json").write_text("{}")
    benchmark(RECIPE, data, runs=2, out=tmp_path, progress=False)
    assert contents(tmp_path) == expected
    benchmark(RECIPE, data, runs=2, out=tmp_path, target=0.93, progress=False)
    assert json.loads((tmp_path / "summary.json").read_text())["target"] == 0.93


@pytest.mark.parametrize("kept", [1, 200, -2])
def test_a_half_written_last_line_is_dropped_with_a_note(data, tmp_path, capsys, kept):
    benchmark(RECIPE, data, runs=3, out=tmp_path, progress=False)
    expected, results = contents(tmp_path), tmp_path / "results.jsonl"
    first, second, third = results.read_bytes().splitlines(keepends=True)
    results.write_bytes(first + second + third[:kept])
    assert len(load_benchmark(tmp_path).runs) == 2
    benchmark(RECIPE, data, runs=3, out=tmp_path, progress=False)
    assert contents(tmp_path) == expected
    err = capsys.readouterr().err
    assert "dropped the half-written last line" in err and "resuming with run 2" in err


def test_a_line_that_lacks_only_its_newline_counts(data, tmp_path, capsys):
    benchmark(RECIPE, data, runs=3, out=tmp_path, progress=False)
    expected, results = contents(tmp_path), tmp_path / "results.jsonl"
    first, second, _ = results.read_bytes().splitlines(keepends=True)
    results.write_bytes(first + second.rstrip(b"\n"))
    benchmark(RECIPE, data, runs=3, out=tmp_path, progress=False)
    assert contents(tmp_path) == expected and "dropped" not in capsys.readouterr().err


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"# my notes, not yet finished", "no benchmark wrote the end of"),
        (b'{"accuracy": 0.94}\n', "line 1 of .* it lacks run"),
        (b"\x00\xff\n", "line 1 of .*cannot be read"),
    ],
)
def test_a_file_that_is_not_ours_is_left_alone(data, tmp_path, content, message):
    (tmp_path / "results.jsonl").write_bytes(content)
    with pytest.raises(RunError, match=message):
        benchmark(RECIPE, data, runs=3, out=tmp_path)
    assert (tmp_path / "results.jsonl").read_bytes() == content


def test_a_missing_or_repeated_line_is_refused(data, tmp_path):
    benchmark(RECIPE, data, runs=3, out=tmp_path, progress=False)
    results = tmp_path / "results.jsonl"
    first, second, third = results.read_bytes().splitlines(keepends=True)
    for lines in (first + third, first + second + second):
        results.write_bytes(lines)
        for read in (lambda: benchmark(RECIPE, data, runs=3, out=tmp_path), lambda: load_benchmark(tmp_path)):
            with pytest.raises(RunError, match="a line is missing or repeated"):
                read()


def test_the_folder_of_a_single_run_is_not_overwritten(data, tmp_path):
    save_run(FakeTrainer(data, world_size=1, device=None, backend=None, timeout=1).train(
        RECIPE, seed=5, out=None, progress=False), tmp_path / "run")  # fmt: skip
    before = contents(tmp_path / "run")
    with pytest.raises(RunError, match="is the folder of a single run"):
        benchmark(RECIPE, data, runs=3, out=tmp_path / "run")
    assert contents(tmp_path / "run") == before


def test_load_benchmark_without_runs(tmp_path):
    for _ in range(2):
        with pytest.raises(RunError, match="holds no finished run"):
            load_benchmark(tmp_path / "runs")
        (tmp_path / "runs").mkdir(exist_ok=True)


# --- nothing is mixed ---


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"recipe": replace(RECIPE, epochs=2.0)}, "the recipe's epochs is 1.0 there and 2.0 now"),
        ({"recipe": replace(RECIPE, name="other")}, "the recipe's name is smoke there and other now"),
        ({"data": None}, r"the data set is synthetic \(fingerprint \w+\) there and synthetic \(fingerprint \w+\) now"),
        ({"first_seed": 3}, "the first seed is 0 there and 3 now"),
        ({"cpu": "Another CPU"}, "cpu is .* there and Another CPU now"),
        ({"gpu": "Some GPU"}, "gpu is None there and Some GPU now"),
        ({"torch": "9.9"}, "torch is .* there and 9.9 now"),
    ],
)
def test_runs_of_another_kind_are_refused_before_one_is_trained(data, tmp_path, trainer, monkeypatch, change, message):
    benchmark(RECIPE, data, runs=2, out=tmp_path, progress=False)
    before = contents(tmp_path)
    trainer.calls.clear()
    now = {"recipe": RECIPE, "data": data, "first_seed": 0}
    if next(iter(change)) in now:
        now |= change
    else:
        monkeypatch.setattr(benchmarking, "environment", lambda device: MACHINE | change)
    if now["data"] is None:
        now["data"] = replace(data, fingerprint="0" * 16)
    with pytest.raises(RunError, match=message):
        benchmark(now["recipe"], now["data"], runs=3, out=tmp_path, first_seed=now["first_seed"])
    assert contents(tmp_path) == before and 2 not in trainer.calls


@FORKS
def test_tricks_of_ones_own_survive_a_kill_and_other_code_is_refused(data, tmp_path, real_trainer):
    """A script with all four is killed after the first run of each; the same cells go on, as if in a notebook."""
    go_on = {name: tmp_path / name for name in CELLS}
    script = tmp_path / "script.py"
    lines = [
        "import json, os, signal, sys",
        "from cifar_fast import Recipe, Tricks, benchmark, replace, synthetic",
        SCRIPT,
    ]
    for name, cell in CELLS.items():
        kill = "os.kill(os.getpid(), signal.SIGKILL)" if name == list(CELLS)[-1] else "raise KeyboardInterrupt"
        lines += [cell, f"once(tricks, {str(go_on[name])!r}, lambda line: exec({kill!r}))"]
    script.write_text("\n".join(lines))
    done = subprocess.run([sys.executable, script, json.dumps(RECIPE.to_dict())], capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
    for name, out in go_on.items():
        tricks = tricks_of(name)
        found = benchmark(RECIPE, data, tricks=tricks, runs=2, out=out, device="cpu", progress=False)
        alone = train(RECIPE, data, tricks=tricks, seed=1, device="cpu", progress=False)
        assert [run["seed"] for run in found.runs] == [0, 1]
        assert found.runs[1]["loss"] == pytest.approx(alone.loss, rel=1e-5)
        assert found.runs[0]["tricks"] == found.runs[1]["tricks"] == tricks.describe()
        assert load_run(out).tricks == tricks.describe()
        part = next(iter(tricks.own))
        edited = replace(tricks, **{part: lambda *_: None})
        with pytest.raises(
            RunError, match=f"the code of the tricks' {part} is .*fingerprint.* there and .*lambda.* now"
        ):
            benchmark(RECIPE, data, tricks=edited, runs=3, out=out, device="cpu")
        with pytest.raises(RunError, match=f"the tricks' {part} is .*\\) there and the recipe's own now"):
            benchmark(RECIPE, data, runs=3, out=out, device="cpu")


SCRIPT = """
whole = synthetic(640, 200, seed=0)
parts = {"train_images": 80, "train_labels": 80, "test_images": 40, "test_labels": 40}
data = replace(whole, **{name: getattr(whole, name)[:n] for name, n in parts.items()})
recipe = Recipe.from_dict(json.loads(sys.argv[1]))

def once(tricks, out, then):
    try:
        benchmark(recipe, data, tricks=tricks, runs=2, out=out, device="cpu", progress=False, on_run=then)
    except KeyboardInterrupt:
        pass
"""


def test_another_number_of_processes_is_refused(data, tmp_path):
    two_shards = replace(RECIPE, n_shards=2)
    benchmark(two_shards, data, runs=1, out=tmp_path, progress=False, world_size=1)
    with pytest.raises(RunError, match="world_size is 1 there and 2 now"):
        benchmark(two_shards, data, runs=2, out=tmp_path, world_size=2)


def test_a_run_that_came_back_from_other_hardware_is_not_saved(data, tmp_path, trainer):
    benchmark(RECIPE, data, runs=1, out=tmp_path, progress=False)
    before = contents(tmp_path)
    trainer.environment = MACHINE | {"cpu": "What rank 0 had"}
    with pytest.raises(RunError, match="cpu is .* there and What rank 0 had now"):
        benchmark(RECIPE, data, runs=2, out=tmp_path)
    assert contents(tmp_path) == before


def test_lines_of_two_kinds_in_one_file_are_refused(data, tmp_path):
    benchmark(RECIPE, data, runs=2, out=tmp_path, progress=False)
    first, second = (tmp_path / "results.jsonl").read_text().splitlines()
    second = json.dumps(json.loads(second) | {"recipe": replace(RECIPE, epochs=9.0).to_dict()})
    (tmp_path / "results.jsonl").write_text(f"{first}\n{second}\n")
    with pytest.raises(RunError, match="epochs is 1.0 there and 9.0 now"):
        load_benchmark(tmp_path)


# --- failures and interruptions ---


def test_two_benchmarks_on_one_folder_are_refused(data, tmp_path, trainer):
    def start_another(seed: int) -> None:
        if seed == 1:
            with pytest.raises(RunError, match="another benchmark is running in"):
                benchmark(RECIPE, data, runs=3, out=tmp_path)

    trainer.on_train = staticmethod(start_another)
    benchmark(RECIPE, data, runs=3, out=tmp_path, progress=False)
    check_whole(tmp_path, 3)


@pytest.mark.parametrize("failure", [KeyboardInterrupt, TrainingError("diverged"), MemoryError])
def test_finished_runs_are_kept_when_one_is_interrupted_or_fails(data, tmp_path, trainer, failure):
    def fail(seed: int) -> None:
        if seed == 2:
            raise failure

    trainer.on_train = staticmethod(fail)
    with pytest.raises(failure if isinstance(failure, type) else type(failure)):
        benchmark(RECIPE, data, runs=4, out=tmp_path, progress=False)
    check_whole(tmp_path, 2)
    trainer.on_train = staticmethod(lambda seed: None)
    benchmark(RECIPE, data, runs=4, out=tmp_path, progress=False)
    check_whole(tmp_path, 4)


def test_a_full_disk_leaves_the_file_as_it_was(data, tmp_path, monkeypatch):
    benchmark(RECIPE, data, runs=1, out=tmp_path, progress=False)
    before, write = contents(tmp_path), os.write
    with monkeypatch.context() as patch:
        patch.setattr(os, "write", lambda descriptor, content: write(descriptor, content[: len(content) // 2]))
        with pytest.raises(RunError, match="cannot be written: No space left on device"):
            benchmark(RECIPE, data, runs=2, out=tmp_path, progress=False)
    assert contents(tmp_path) == before
    benchmark(RECIPE, data, runs=2, out=tmp_path, progress=False)
    check_whole(tmp_path, 2)


def test_a_folder_that_cannot_be_made(data, tmp_path):
    (tmp_path / "file").touch()
    for out in (tmp_path / "file", tmp_path / "file" / "runs"):
        with pytest.raises(RunError, match=f"{out} cannot be written"):
            benchmark(RECIPE, data, out=out)


def test_the_other_ranks_of_torchrun_write_nothing_and_decide_the_same(data, tmp_path, trainer, capsys):
    """Rank 0 runs first; rank 1 then gets what rank 0 agreed to, and must ask for it as often."""
    said: list[Any] = []

    class Rank0(trainer):
        calls: list[Any] = []

        def agree(self, value):
            said.append(pickle.dumps(value))
            return value

    class Rank1(trainer):
        calls: list[Any] = []
        is_main = False

        def agree(self, value):
            assert value == (None, None)
            return pickle.loads(said.pop(0))

        def train(self, recipe, *, tricks, seed, out, save_logits, progress):
            return super().train(recipe, tricks=tricks, seed=seed, out=None, progress=progress)

    arguments = {"runs": 50, "target": 0.946, "until_confident": True}
    benchmark(RECIPE, data, **arguments | {"runs": 1}, out=tmp_path / "runs")
    capsys.readouterr()
    results = []
    for rank, out in ((Rank0, tmp_path / "runs"), (Rank1, tmp_path / "none")):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(benchmarking, "Trainer", rank)
            results.append(benchmark(RECIPE, data, **arguments, out=out))
        printed = capsys.readouterr()
        assert ("resuming with run 1" in printed.err, "run   1" in printed.out) == (rank.is_main, rank.is_main)
    assert results[0] == results[1] and Rank0.calls == Rank1.calls and not said
    assert not (tmp_path / "none").exists()
    with pytest.MonkeyPatch.context() as patch:  # a mistake on rank 0 is raised on every rank
        patch.setattr(benchmarking, "Trainer", Rank0)
        with pytest.raises(RunError) as on_rank0:
            benchmark(replace(RECIPE, epochs=2.0), data, out=tmp_path / "runs")
        patch.setattr(benchmarking, "Trainer", Rank1)
        with pytest.raises(RunError) as on_rank1:
            benchmark(replace(RECIPE, epochs=2.0), data, out=tmp_path / "none")
    assert str(on_rank0.value) == str(on_rank1.value)


# --- killed ---


TOUCHES = [
    (os, "open"), (os, "write"), (os, "fsync"), (os, "replace"), (os, "truncate"), (os, "mkdir"),
    (shutil, "rmtree"), (Path, "write_text"), (Path, "mkdir"), (FakeTrainer, "train"),
]  # fmt: skip


def kill_at_touch(number: int) -> None:
    """From now on this process dies in the middle of its `number`th touch of the disk."""
    count = itertools.count(1)

    def touching(call: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*args: Any, **options: Any) -> Any:
            if next(count) == number:
                if call is real_write:
                    call(args[0], args[1][: len(args[1]) // 2])
                die()
            value = call(*args, **options)
            if next(count) == number:
                die()
            return value

        return counted

    real_write = os.write
    for owner, name in TOUCHES:
        setattr(owner, name, touching(getattr(owner, name)))


@FORKS
def test_killed_at_any_touch_of_the_disk_it_goes_on_to_the_same_end(data, tmp_path, monkeypatch):
    monkeypatch.setattr(benchmarking, "Trainer", FakeTrainer)
    benchmark(RECIPE, data, runs=2, out=tmp_path / "whole", progress=False)
    expected = contents(tmp_path / "whole")
    for number in itertools.count(1):
        out = tmp_path / str(number)

        def run_until_killed(number: int = number, out: Path = out) -> None:
            kill_at_touch(number)
            benchmark(RECIPE, data, runs=2, out=out, progress=False)

        killed = in_a_child(run_until_killed)
        if (out / "results.jsonl").exists() and (out / "results.jsonl").read_bytes().count(b"\n"):
            assert len(load_benchmark(out).runs) in (1, 2)
        benchmark(RECIPE, data, runs=2, out=out, progress=False)
        assert contents(out) == expected, number
        if not killed:
            break
    assert number > 40  # so many moments there were


@FORKS
def test_killed_again_and_again_in_one_folder_it_still_ends_the_same(data, tmp_path, monkeypatch):
    """Each call dies a touch of the disk later than the one before, until one has too little left to do."""
    monkeypatch.setattr(benchmarking, "Trainer", FakeTrainer)
    for number in itertools.count(5, 2):

        def run_until_killed(number: int = number) -> None:
            kill_at_touch(number)
            benchmark(RECIPE, data, runs=3, out=tmp_path, progress=False)

        if not in_a_child(run_until_killed):
            break
    assert number > 20  # it was killed so often
    check_whole(tmp_path, 3)


# --- with the real trainer ---


@pytest.fixture
def real_trainer(monkeypatch: pytest.MonkeyPatch, trainer: type[FakeTrainer]) -> None:
    """Takes the fake out again."""
    monkeypatch.setattr(benchmarking, "Trainer", parallel.Trainer)


def test_runs_are_what_train_gives_for_their_seeds(data, tmp_path, real_trainer):
    data = data.subset(range(80))  # all of them
    arguments = {"out": tmp_path, "first_seed": 3, "device": "cpu", "progress": False}
    benchmark(RECIPE, data, runs=1, **arguments)
    found = benchmark(RECIPE, data, runs=3, save_logits=True, **arguments)
    alone = [
        cifar_fast.train(RECIPE, data, seed=seed, device="cpu", progress=False, save_logits=True) for seed in (3, 4, 5)
    ]
    assert [line["loss"] for line in found.runs] == [result.loss for result in alone]
    assert [line["epochs"][0]["train_loss"] for line in found.runs] == [result.epochs[0].train_loss for result in alone]
    first = cifar_fast.load_run(tmp_path)
    assert first.seed == 3 and first.to_dict().items() <= found.runs[0].items()
    for name, value in alone[0].model.state_dict().items():
        assert torch.equal(first.model.state_dict()[name], value), name
    assert torch.equal(first.train_indices, torch.arange(80))
    assert not (tmp_path / "logits" / "run-000.safetensors").exists()
    logits, labels = load_logits(tmp_path / logits_file(2))
    assert torch.equal(logits, alone[2].logits) and torch.equal(labels, data.test_labels)
    spread = variance(tmp_path)
    assert spread.without_logits == 1
    assert spread.accuracies.tolist() == pytest.approx([line["accuracy"] for line in found.runs[1:]])
    assert torch.equal(spread.image_accuracy, variance(alone[1:]).image_accuracy)


# 120 pictures, two shards, three batches an epoch: nearly all the time goes into starting processes.
COMMAND = ["-m", "cifar_fast", "benchmark", "--recipe", "smoke", "--device", "cpu"]
COMMAND += (
    "--widths 8 8 8 --n-shards 2 --global-batch-size 40 --epochs 1 --precision float32 --convolution direct".split()
)
COMMAND += ["--timeout", "120"]  # on a busy machine a process may have to wait long for its turn


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_two_processes_killed_twice_and_resumed_under_torchrun_leave_whole_runs(pictures, tmp_path):
    """SIGKILL while two ranks train the first run, and right after a run; the ranks must then end by themselves."""
    out, log = tmp_path / "runs", tmp_path / "log"
    arguments = [*COMMAND, "--data", str(pictures), "--out", str(out)]

    def lines() -> int:
        return (out / "results.jsonl").read_bytes().count(b"\n") if (out / "results.jsonl").exists() else 0

    def first_run_is_trained() -> bool:
        return any(out.glob(".first-run-*/run")) or lines() > 0

    ranks: list[psutil.Process] = []
    for moment in (first_run_is_trained, lines):
        with log.open("a") as output:
            command = [sys.executable, *arguments, "--world-size", "2", "--runs", "100000"]
            process = psutil.Popen(command, cwd=ROOT, stdout=output, stderr=output)
        while not moment():
            assert process.poll() is None, log.read_text()
            time.sleep(0.005)
        ranks += process.children(recursive=True)
        process.kill()
        assert process.wait() == -signal.SIGKILL
    done = lines()

    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", *arguments]
    last = subprocess.run([*torchrun, "--runs", str(done + 2)], cwd=ROOT, capture_output=True, text=True)
    assert last.returncode == 0, last.stderr
    assert last.stderr.count(f"resuming with run {done}") == 1 and last.stdout.count("data set: ") == 1
    assert last.stdout.count(f"({done + 1} of {done + 2})") == last.stdout.count(f"({done + 2} of {done + 2})") == 1
    _, alive = psutil.wait_procs(ranks, timeout=60)
    assert not alive

    found = load_benchmark(out)
    assert [(line["run"], line["seed"]) for line in found.runs] == [(run, run) for run in range(done + 2)]
    assert {(line["environment"]["world_size"], line["environment"]["backend"]) for line in found.runs} == {(2, "gloo")}
    assert {path.name for path in out.iterdir()} - {".lock"} == FILES - {".lock"} | {PICTURE}
    assert json.loads((out / "summary.json").read_text()) == found.summary()
    assert (out / "run_log.txt").read_text() == run_log(found.runs, found.target)
    assert "2 processes (gloo)" in (out / "run_log.txt").read_text()
    assert cifar_fast.load_run(out).to_dict().items() <= found.runs[0].items()
    # Each run is what its seed gives in one process that nobody kills, up to the rounding of another order of sums.
    colours = load_cifar10(pictures)
    for line in (found.runs[0], *found.runs[-2:]):
        alone = cifar_fast.train(found.recipe, colours, seed=line["seed"], device="cpu", progress=False)
        assert line["loss"] == pytest.approx(alone.loss, rel=1e-3)
    with pytest.raises(RunError, match="world_size is 2 there and 1 now"):
        benchmark(found.recipe, colours, world_size=1, device="cpu", runs=4, out=out)
