"""The same training many times: a finished run is one line of `results.jsonl`, and all else is drawn from that file.

A benchmark folder holds `results.jsonl`; `run_log.txt` and `summary.json`, drawn anew from it after each run; and of
the first run `timing_log.tsv`, `weights.safetensors` and `result.json`, so that `load_run` reads it there.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Mapping
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from tqdm.auto import tqdm

from cifar_fast import __version__
from cifar_fast.data.dataset import Dataset
from cifar_fast.distributed.launch import Trainer, check_fit, choose_world_size
from cifar_fast.errors import RecipeError, RunError, UserError
from cifar_fast.experiments.statistics import excludes, summarise
from cifar_fast.experiments.tables import percent, run_log
from cifar_fast.files import write_text
from cifar_fast.hardware.device import environment, select_device
from cifar_fast.recipe import Recipe, changed_fields
from cifar_fast.training.result import RunResult, write_json

RESULTS = "results.jsonl"
FIRST_RUN = ("timing_log.tsv", "weights.safetensors", "result.json")
"""Files of the first run that are kept, in the order in which they are moved into place."""
SCRATCH = ".first-run-"
HARDWARE = ("device", "gpu", "cpu", "world_size", "backend", "torch")
"""Fields of a run's environment that all runs of a folder share."""
LINE = ("run", "seed", "target", "version", "accuracy", "loss", "train_seconds", "evaluate_seconds", "total_seconds")
LINE_START = b'{"run": '


@dataclass(frozen=True)
class Benchmark:
    """Finished runs of one recipe on one data set and one kind of hardware."""

    recipe: Recipe
    runs: list[dict[str, Any]]
    """Lines of `results.jsonl`: `RunResult.to_dict()` with `run` (from 0), `seed`, `target` and package `version`."""
    target: float
    """Accuracy that counts as reached, 0 ... 1."""

    def summary(self) -> dict[str, Any]:
        """Return n, the share at the target with its interval, and the spread of accuracy and clocks."""
        return summarise(self.runs, self.target)


def benchmark(
    recipe: Recipe,
    data: Dataset,
    *,
    runs: int = 50,
    world_size: int | None = None,
    device: str | None = None,
    backend: str | None = None,
    out: Path | str,
    target: float = 0.94,
    until_confident: bool = False,
    first_seed: int = 0,
    progress: bool = True,
    timeout: float = 10.0,
    on_run: Callable[[dict[str, Any]], None] | None = None,
) -> Benchmark:
    """Train `recipe` on `data` `runs` times, run n (from 0) with seed `first_seed` + n, and file each run in `out`.

    Processes, data and compiled code are kept over the runs, and a warm-up precedes the first clock; so `total_seconds`
    counts from the start of the run. A folder that holds runs of the same benchmark is gone on with. `until_confident`
    stops as soon as the 95 % interval of the mean accuracy leaves out `target` (0 ... 1); `runs` is then the most there
    will be. `on_run` is called with each finished run's line; without it `progress` prints one. `world_size`, `device`,
    `backend` and `timeout` are those of `parallel.launch`.

    Raises `RunError` when `out` holds runs of another recipe, data set, hardware or first seed, belongs to a benchmark
    that is running, or cannot be written; else what `Trainer` raises, with the finished runs kept in `out`.
    """
    if runs < 1:
        raise UserError(f"runs={runs} must be at least 1")
    if first_seed < 0:
        raise UserError(f"first_seed={first_seed} must be at least 0")
    if not 0 < target <= 1:
        advice = f"; for {target:g} % give {target / 100:g}" if 1 < target <= 100 else ""
        raise UserError(f"target={target:g} must be a share above 0 and at most 1{advice}")

    world_size = choose_world_size(world_size, device, recipe)
    check_fit(recipe, world_size, data)
    with ExitStack() as stack:
        trainer = stack.enter_context(
            Trainer(data, world_size=world_size, device=device, backend=backend, timeout=timeout)
        )
        machine = environment(select_device(device)) | {"world_size": world_size}
        expected = {"recipe": recipe.to_dict(), "dataset": data.describe(), "environment": machine}
        folder = BenchmarkFolder(Path(out), target)

        def open_folder() -> list[dict[str, Any]]:
            stack.enter_context(folder)
            return folder.read(expected, first_seed)

        lines = _on_main(trainer, open_folder)

        def wanted() -> bool:
            confident = until_confident and excludes([line["accuracy"] for line in lines], target)
            return len(lines) < runs and not confident

        if lines and trainer.is_main:
            goes_on = f"going on with run {len(lines)}" if wanted() else "nothing is left to do"
            _note(f"{out} holds {len(lines)} of {runs} runs: {goes_on}")
        if wanted():
            trainer.warm_up(recipe)
        while wanted():
            number = len(lines)
            run_folder = _on_main(trainer, folder.scratch) / "run" if number == 0 else None
            result = trainer.train(recipe, seed=first_seed + number, out=run_folder, progress=progress)
            lines.append(_on_main(trainer, folder.add, number, result, run_folder))
            if on_run:
                on_run(lines[-1])
            elif progress and trainer.is_main:
                tqdm.write(run_line(lines[-1], runs))
        # Drawn again although nothing may be left to do: the target may be another, or the last start was killed here.
        _on_main(trainer, folder.redraw)
    return Benchmark(recipe, lines, target)


def load_benchmark(folder: Path | str, target: float | None = None) -> Benchmark:
    """Read the finished runs in a benchmark folder, also while it grows; `RunError` when there are none to be read.

    `target` (0 ... 1) is that of the last run when it is not given.
    """
    lines, _, _ = _read_lines(Path(folder) / RESULTS)
    if not lines:
        raise RunError(f"{folder} holds no finished run of a benchmark; name the folder that `benchmark` wrote")
    for line in lines[1:]:
        _require_same_kind(Path(folder), lines[0], line)
    return Benchmark(_recipe(lines[0]), lines, lines[-1]["target"] if target is None else target)


def run_line(line: Mapping[str, Any], runs: int) -> str:
    """Return one finished run of `runs` as a line of text."""
    what = f"run {line['run']:3} ({line['run'] + 1} of {runs})  seed {line['seed']:3}"
    return f"{what}  {line['train_seconds']:8.2f} s  test accuracy {percent(line['accuracy'])}"


def _on_main(trainer: Trainer, do: Callable[..., Any], *args: Any) -> Any:
    """Return on every rank what `do(*args)` returns on rank 0, which alone calls it; raise its `UserError` on all."""
    value, mistake = None, None
    if trainer.is_main:
        try:
            value = do(*args)
        except UserError as error:
            mistake = error
    value, mistake = trainer.agree((value, mistake))
    if mistake is not None:
        raise mistake
    return value


class BenchmarkFolder:
    """The folder of one benchmark, which this process alone may write to while it is open.

    It may be killed at any moment: the files of the first run are moved into place before its line is written, a line
    that is cut off is not valid JSON and does not count, and what is drawn from the lines is replaced as a whole.
    """

    def __init__(self, path: Path, target: float) -> None:
        """Name the folder; nothing is touched before it is opened."""
        self.path = path
        self.target = target
        self.lines: list[dict[str, Any]] = []

    def __enter__(self) -> BenchmarkFolder:
        """Make the folder and lock it; the system lets go of the lock however this process ends."""
        lock = self.path / ".lock"
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._lock = FileLock(lock)
            self._lock.acquire(timeout=0)
        except Timeout as error:
            raise RunError(
                f"another benchmark is at work in {self.path} ({lock} is locked); wait for it, or choose another --out"
            ) from error
        except (OSError, NotImplementedError) as error:
            raise _cannot_write(self.path, error) from error
        self._remove_scratch()
        return self

    def __exit__(self, *_: object) -> None:
        """Unlock the folder."""
        self._remove_scratch()
        self._lock.release()

    def _remove_scratch(self) -> None:
        # Left by a start that was killed; a worker of it may be writing there still, so failing is no mistake.
        for left in self.path.glob(f"{SCRATCH}*"):
            shutil.rmtree(left, ignore_errors=True)

    def read(self, expected: Mapping[str, Any], first_seed: int) -> list[dict[str, Any]]:
        """Return the finished runs, all of the kind that is expected, and cut off a line that was not finished."""
        path = self.path / RESULTS
        if (self.path / "recipe.json").exists():
            raise RunError(
                f"{self.path} is the folder of a single run, which would be overwritten; choose another --out"
            )
        self.lines, size, rest = _read_lines(path)
        for line in self.lines:
            _require_same_kind(self.path, line, expected)
            if line["seed"] != first_seed + line["run"]:
                found = line["seed"] - line["run"]
                raise _mixed(self.path, "the first seed", found, first_seed)
        if rest:
            if not rest.startswith(LINE_START[: len(rest)]):
                raise RunError(
                    f"the end of {path} is not of a benchmark: {rest[:40]!r}; remove it or choose another --out"
                )
            try:
                os.truncate(path, size)
            except OSError as error:
                raise _cannot_write(self.path, error) from error
            _note(f"dropped the half-written last line of {path} ({len(rest)} bytes): that run is trained again")
        return list(self.lines)

    def scratch(self) -> Path:
        """Return a new folder, which is removed when this one is closed."""
        try:
            # A name of its own: workers of a start that was killed may still write for a second or two.
            return Path(tempfile.mkdtemp(prefix=SCRATCH, dir=self.path))
        except OSError as error:
            raise _cannot_write(self.path, error) from error

    def add(self, number: int, result: RunResult, run_folder: Path | None) -> dict[str, Any]:
        """File a finished run, with its run folder if it is the first, and return its line."""
        line = {
            "run": number,
            "seed": result.seed,
            "target": self.target,
            "version": __version__,
            **result.to_dict(),
        }
        if self.lines:
            _require_same_kind(self.path, self.lines[0], line)
        try:
            if run_folder:
                for name in FIRST_RUN:
                    os.replace(run_folder / name, self.path / name)
            _append_line(self.path / RESULTS, json.dumps(line))
        except OSError as error:
            raise _cannot_write(self.path, error) from error
        self.lines.append(line)
        self.redraw()
        return line

    def redraw(self) -> None:
        """Write `run_log.txt` and `summary.json` anew, each whole or not at all."""
        try:
            write_text(self.path / "run_log.txt", run_log(self.lines, self.target))
            write_json(self.path / "summary.json", summarise(self.lines, self.target))
        except OSError as error:
            raise _cannot_write(self.path, error) from error


def _read_lines(path: Path) -> tuple[list[dict[str, Any]], int, bytes]:
    """Return the whole lines of a results file, the bytes they take, and what follows them."""
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        return [], 0, b""
    except OSError as error:
        raise RunError(f"{path} cannot be read: {error.strerror}") from error
    size = content.rfind(b"\n") + 1
    with suppress(ValueError):
        json.loads(content[size:])
        size = len(content)  # a whole line, of which an editor took the newline
    lines: list[dict[str, Any]] = []
    for number, text in enumerate(content[:size].splitlines(), start=1):
        try:
            line = json.loads(text)
            missing = [key for key in (*LINE, "recipe", "dataset", "environment", "epochs") if key not in line]
        except (ValueError, TypeError) as error:
            raise RunError(f"line {number} of {path} cannot be read: {error}; mend or remove the line") from error
        if missing:
            raise RunError(
                f"line {number} of {path} is no run of a benchmark: it lacks {missing[0]}; choose another --out"
            )
        if line["run"] != len(lines):
            raise RunError(
                f"line {number} of {path} is run {line['run']}, not run {len(lines)}: lines are missing or twice"
            )
        lines.append(line)
    return lines, size, content[size:]


def _append_line(path: Path, text: str) -> None:
    """Append a line in a single write and bring it to disk; on failure leave the file as it was."""
    binary = getattr(os, "O_BINARY", 0)  # Windows has it, and would else write two bytes for the newline
    descriptor = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT | binary, 0o644)
    try:
        size = os.fstat(descriptor).st_size
        os.lseek(descriptor, max(0, size - 1), os.SEEK_SET)
        ends_a_line = os.read(descriptor, 1) in (b"", b"\n")
        line = (("" if ends_a_line else "\n") + text + "\n").encode()
        try:
            if os.write(descriptor, line) < len(line):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            os.fsync(descriptor)
        except OSError:
            os.ftruncate(descriptor, size)
            raise
    finally:
        os.close(descriptor)


def _require_same_kind(folder: Path, there: Mapping[str, Any], here: Mapping[str, Any]) -> None:
    """Raise `RunError` when two lines differ in recipe, data set or hardware, as far as both know them."""
    before, now = _recipe(there), _recipe(here)
    for name, (old, new) in changed_fields(before, now).items():
        raise _mixed(folder, f"the recipe's {name}", old, new)
    if before.name != now.name:
        raise _mixed(folder, "the recipe's name", before.name, now.name)
    if there["dataset"]["fingerprint"] != here["dataset"]["fingerprint"]:
        old, new = (
            f"{data['name']} (fingerprint {data['fingerprint']})" for data in (there["dataset"], here["dataset"])
        )
        raise _mixed(folder, "the data set", old, new)
    for name in HARDWARE:
        old, new = there["environment"].get(name), here["environment"].get(name)
        if name in here["environment"] and name in there["environment"] and old != new:
            raise _mixed(folder, name, old, new)


def _recipe(line: Mapping[str, Any]) -> Recipe:
    try:
        return Recipe.from_dict(line["recipe"])
    except RecipeError as error:
        raise RunError(f"these results are of another version of the package: {error}; choose another --out") from error


def _mixed(folder: Path, what: str, there: object, here: object) -> RunError:
    return RunError(
        f"{folder} holds runs of another benchmark: {what} is {there} there and {here} now; "
        "choose another --out, or run as before"
    )


def _cannot_write(folder: Path, error: OSError | NotImplementedError) -> RunError:
    reason = getattr(error, "strerror", None) or error
    return RunError(f"the benchmark folder {folder} cannot be written: {reason}; finished runs in it are kept")


def _note(text: str) -> None:
    print(f"note: {text}", file=sys.stderr, flush=True)
