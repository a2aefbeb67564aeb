"""Trains one recipe many times: each finished run is a line of `results.jsonl`, and every other file follows from it.

A benchmark folder holds `results.jsonl`; `run_log.txt` and `summary.json`, rewritten after each run; and from the
first run `timing_log.tsv`, `weights.safetensors` and `result.json`, so that `load_run` can read that run. If logits are
kept, those of run n are in `logits/`, in the file that `logits_file(n)` names. If the training set was a subset,
`train_indices.npy` says which one.
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
from html import escape
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from safetensors import SafetensorError
from tqdm.auto import tqdm

from cifar_fast import __version__
from cifar_fast.data.dataset import Dataset
from cifar_fast.distributed.launch import Trainer, check_fit, choose_world_size, require_travel
from cifar_fast.errors import RecipeError, RunError, UserError
from cifar_fast.experiments.statistics import excludes, summarise
from cifar_fast.experiments.tables import comparison_rows, mean_and_half_width, run_log
from cifar_fast.files import write_text
from cifar_fast.hardware.device import environment, select_device
from cifar_fast.recipe import Recipe, changed_fields
from cifar_fast.shown import data_set, html_table, percent
from cifar_fast.training.progress import in_a_notebook
from cifar_fast.training.result import INDICES, RunResult, save_logits, write_json
from cifar_fast.training.tricks import NO_TRICKS, Tricks

RESULTS = "results.jsonl"
FIRST_RUN = ("timing_log.tsv", "weights.safetensors", "result.json")
"""Files of the first run that are kept, in the order in which they are moved into place."""
LOGITS = "logits"
"""The folder of all runs' logits."""
SCRATCH = ".first-run-"
LEFTOVERS = (f"{SCRATCH}*", "run_log.txt.*.part", "summary.json.*.part", f"{LOGITS}/*.part")
"""What a killed call may leave in a folder."""
HARDWARE = ("device", "gpu", "cpu", "world_size", "backend", "torch")
"""Fields of a run's environment that all runs of a folder share."""
FIELDS = (
    "run", "seed", "target", "version", "recipe", "dataset", "environment", "epochs", "accuracy", "loss",
    "train_seconds", "evaluate_seconds", "total_seconds",
)  # fmt: skip
"""What every line of a results file must have."""
LINE_START = b'{"run": '


@dataclass(frozen=True, repr=False)
class Benchmark:
    """Finished runs of one recipe on one data set and one kind of hardware.

    It prints as a few lines, or in a notebook as a table beside published runs.
    """

    recipe: Recipe
    runs: list[dict[str, Any]]
    """Lines of `results.jsonl`: `RunResult.to_dict()` with `run` (from 0), `seed`, `target` and package `version`."""
    target: float
    """Accuracy that counts as reached, 0 ... 1."""

    def summary(self) -> dict[str, Any]:
        """Return n, the share of runs at the target with its interval, and the spread of accuracy and clocks."""
        return summarise(self.runs, self.target)

    def __repr__(self) -> str:
        if not self.runs:
            return f"{self.recipe.name}: no finished run"
        found = self.summary()
        accuracy, seconds = found["accuracy"], found["train_seconds"]
        reached = f"{found['at_target']} of {found['n']} ({percent(found['share_at_target'])})"
        spread = mean_and_half_width([100 * run["accuracy"] for run in self.runs], "%")
        return "\n".join(
            [
                f"{found['recipe']}: {reached} reached {percent(found['target'])}",
                f"accuracy: mean {spread}, {percent(accuracy['min'])} to {percent(accuracy['max'])}",
                f"train_seconds: median {seconds['median']:.2f} s, {seconds['min']:.2f} to {seconds['max']:.2f} s",
                f"n = {found['n']}; data set: {data_set(found['dataset'])}",
                f"hardware: {found['hardware']}; torch {found['versions']['torch']}",
            ]
        )

    def _repr_html_(self) -> str | None:
        if not self.runs:
            return None
        warning, rows, notes = comparison_rows(self.summary())
        return f"<p><b>{escape(warning)}</b></p>\n" * bool(warning) + html_table(rows, notes)


def benchmark(
    recipe: Recipe,
    data: Dataset,
    *,
    tricks: Tricks = NO_TRICKS,
    runs: int = 50,
    world_size: int | None = None,
    device: str | None = None,
    backend: str | None = None,
    out: Path | str,
    target: float = 0.94,
    until_confident: bool = False,
    first_seed: int = 0,
    save_logits: bool = False,
    progress: bool = True,
    timeout: float = 10.0,
    on_run: Callable[[dict[str, Any]], None] | None = None,
) -> Benchmark:
    """Train `recipe` on `data` several times and save each run in the folder `out` as it ends.

    An interrupted benchmark is resumed by the same call: runs that are in the folder already count. Processes, data and
    compiled code serve all runs, and a warm-up comes before the first clock, so `total_seconds` counts from the start
    of each run.

    Args:
        recipe: what is trained.
        data: the training and test images.
        tricks: functions of your own in place of the recipe's.
        runs: the number of runs; run n (from 0) has the seed `first_seed` + n.
        world_size: as for `launch`, like `device`, `backend` and `timeout`.
        device: `cpu`, `cuda`, ... or None for the best there is.
        backend: what the processes talk over.
        out: the benchmark folder.
        target: the accuracy that counts as reached, 0 ... 1.
        until_confident: stop as soon as the 95 % interval of the mean accuracy excludes `target`; at most `runs` runs.
        first_seed: the seed of run 0.
        save_logits: keep the test logits of each run that is trained now in the folder, for `variance`.
        progress: whether to show progress, and to print a line for each run unless there is an `on_run`.
        timeout: seconds within which one process that died or hangs ends all of them.
        on_run: called with the line of each finished run.

    Raises:
        UserError: an argument is out of range, or `Trainer` cannot start; `RecipeError` for a recipe that does not fit.
        RunError: `out` holds runs of another recipe, data set, hardware or first seed, or of tricks with another source
            or constant. Or it belongs to a benchmark that is still running, or cannot be written. Finished runs stay in
            it, here and when a run fails.
    """
    _check_arguments(runs, first_seed, target)
    world_size = choose_world_size(world_size, device, recipe)
    check_fit(recipe, world_size, data)
    require_travel(tricks, world_size)
    made_by = tricks.describe()
    with ExitStack() as stack:
        trainer = stack.enter_context(
            Trainer(data, world_size=world_size, device=device, backend=backend, timeout=timeout)
        )
        machine = environment(select_device(device)) | {"world_size": world_size}
        expected = {
            "recipe": recipe.to_dict(),
            "dataset": data.describe(),
            "environment": machine,
            "tricks": made_by,
        }
        folder = BenchmarkFolder(Path(out), target)
        lines = on_main(trainer, lambda: stack.enter_context(folder).read(expected, first_seed))

        def finished() -> bool:
            accuracies = [line["accuracy"] for line in lines]
            return len(lines) >= runs or (until_confident and excludes(accuracies, target))

        if lines and trainer.is_main:
            next_step = "nothing is left to do" if finished() else f"resuming with run {len(lines)}"
            note(f"{out} holds {len(lines)} of {runs} runs: {next_step}")
        if not finished():
            trainer.warm_up(recipe, tricks)
        while not finished():
            line = train_once(
                trainer,
                folder,
                recipe,
                tricks,
                len(lines),
                first_seed=first_seed,
                keep_logits=save_logits,
                progress=progress,
            )
            lines.append(line)
            if on_run:
                on_run(line)
            elif progress and trainer.is_main and not in_a_notebook():  # where the bar leaves a line
                tqdm.write(run_line(line, runs))
        # Also when no run was missing: the target may be a new one, or the last call was killed just before this.
        on_main(trainer, folder.rewrite_summaries)
    return Benchmark(recipe, lines, target)


def _check_arguments(runs: int, first_seed: int, target: float) -> None:
    if runs < 1:
        raise UserError(f"runs={runs} must be at least 1")
    if first_seed < 0:
        raise UserError(f"first_seed={first_seed} must be at least 0")
    if not 0 < target <= 1:
        advice = f"; for {target:g} % give {target / 100:g}" if 1 < target <= 100 else ""
        raise UserError(f"target={target:g} must be a share above 0 and at most 1{advice}")


def train_once(
    trainer: Trainer,
    folder: BenchmarkFolder,
    recipe: Recipe,
    tricks: Tricks,
    number: int,
    *,
    first_seed: int,
    keep_logits: bool,
    progress: bool,
) -> dict[str, Any]:
    """Train run `number`, save it, and return its line on every rank."""
    run_folder = on_main(trainer, folder.scratch) / "run" if number == 0 else None
    result = trainer.train(
        recipe,
        tricks=tricks,
        seed=first_seed + number,
        out=run_folder,
        save_logits=keep_logits,
        progress=progress,
    )
    return on_main(trainer, lambda: folder.add(number, result, run_folder))


def logits_file(run: int) -> str:
    """Return where a benchmark folder keeps the logits of a run, counted from 0."""
    return f"{LOGITS}/run-{run:03}.safetensors"


def load_benchmark(folder: Path | str, target: float | None = None) -> Benchmark:
    """Read the finished runs in a benchmark folder, even while it grows.

    `target` (0 ... 1) is by default that of the last run. Raises `RunError` when there is no finished run, or when a
    line cannot be read or belongs to another benchmark.
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


def on_main(trainer: Trainer, do: Callable[[], Any]) -> Any:
    """Return on every rank what `do()` returns on rank 0, the only one that calls it; raise its `UserError` on all."""
    value, mistake = None, None
    if trainer.is_main:
        try:
            value = do()
        except UserError as error:
            mistake = error
    value, mistake = trainer.agree((value, mistake))
    if mistake is not None:
        raise mistake
    return value


class BenchmarkFolder:
    """The folder of one benchmark; while it is open, no other process can write to it.

    It survives `kill -9` at any moment: the files of the first run are moved into place before its line is written, a
    line that was cut off is not valid JSON and does not count, and the other files are replaced whole.
    """

    def __init__(self, path: Path, target: float) -> None:
        """Name the folder; nothing on disk is touched before it is opened."""
        self.path = path
        self.target = target
        self.lines: list[dict[str, Any]] = []

    def __enter__(self) -> BenchmarkFolder:
        """Make the folder and lock it; the system releases the lock however this process ends."""
        lock = self.path / ".lock"
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._lock = FileLock(lock)
            self._lock.acquire(timeout=0)
        except Timeout as error:
            raise RunError(
                f"another benchmark is running in {self.path} ({lock} is locked); wait for it, or choose another --out"
            ) from error
        except (OSError, NotImplementedError) as error:
            raise _cannot_write(self.path, error) from error
        self._remove_leftovers()
        return self

    def __exit__(self, *_: object) -> None:
        """Unlock the folder."""
        self._remove_leftovers()
        self._lock.release()

    def _remove_leftovers(self) -> None:
        # A process of a killed call may still be writing to its scratch folder, so a failure here is not an error.
        for left in [path for pattern in LEFTOVERS for path in self.path.glob(pattern)]:
            if left.is_dir():
                shutil.rmtree(left, ignore_errors=True)
            else:
                left.unlink(missing_ok=True)

    def read(self, expected: Mapping[str, Any], first_seed: int) -> list[dict[str, Any]]:
        """Return the finished runs and cut off an unfinished line; `RunError` unless all are of the expected kind."""
        path = self.path / RESULTS
        if (self.path / "recipe.json").exists():
            raise RunError(
                f"{self.path} is the folder of a single run, which would be overwritten; choose another --out"
            )
        self.lines, size, rest = _read_lines(path)
        for line in self.lines:
            _require_same_kind(self.path, line, expected)
            if line["seed"] != first_seed + line["run"]:
                raise _mixed(self.path, "the first seed", line["seed"] - line["run"], first_seed)
        if rest:
            if not rest.startswith(LINE_START[: len(rest)]):
                raise RunError(
                    f"no benchmark wrote the end of {path}: {rest[:40]!r}; remove it or choose another --out"
                )
            try:
                os.truncate(path, size)
            except OSError as error:
                raise _cannot_write(self.path, error) from error
            note(f"dropped the half-written last line of {path} ({len(rest)} bytes): that run will be repeated")
        return list(self.lines)

    def scratch(self) -> Path:
        """Return a new temporary folder inside this one; closing this one removes it."""
        try:
            # A new name each time: processes of a killed call may go on writing for a second or two.
            return Path(tempfile.mkdtemp(prefix=SCRATCH, dir=self.path))
        except OSError as error:
            raise _cannot_write(self.path, error) from error

    def add(self, number: int, result: RunResult, run_folder: Path | None) -> dict[str, Any]:
        """Save a finished run, with the files in its run folder if it is the first, and return its line."""
        about = {"run": number, "seed": result.seed, "target": self.target, "version": __version__}
        line = about | result.to_dict()
        if self.lines:
            _require_same_kind(self.path, self.lines[0], line)
        try:
            if run_folder:
                for name in FIRST_RUN:
                    os.replace(run_folder / name, self.path / name)
                if (run_folder / INDICES).exists():
                    os.replace(run_folder / INDICES, self.path / INDICES)
            if result.logits is not None:
                (self.path / LOGITS).mkdir(exist_ok=True)
                save_logits(result, self.path / logits_file(number))
            _append_line(self.path / RESULTS, json.dumps(line))
        except (OSError, SafetensorError) as error:
            raise _cannot_write(self.path, error) from error
        self.lines.append(line)
        self.rewrite_summaries()
        return line

    def rewrite_summaries(self) -> None:
        """Write `run_log.txt` and `summary.json` from the lines, each whole or not at all."""
        try:
            write_text(self.path / "run_log.txt", run_log(self.lines, self.target))
            write_json(self.path / "summary.json", summarise(self.lines, self.target))
        except OSError as error:
            raise _cannot_write(self.path, error) from error


def _read_lines(path: Path) -> tuple[list[dict[str, Any]], int, bytes]:
    """Return the whole lines of a results file, how many bytes they take, and the bytes after them."""
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        return [], 0, b""
    except OSError as error:
        raise RunError(f"{path} cannot be read: {error.strerror}") from error
    size = content.rfind(b"\n") + 1
    with suppress(ValueError):
        json.loads(content[size:])
        size = len(content)  # a whole line whose newline an editor has removed
    lines: list[dict[str, Any]] = []
    for number, text in enumerate(content[:size].splitlines(), start=1):
        try:
            line = json.loads(text)
            missing = [field for field in FIELDS if field not in line]
        except (ValueError, TypeError) as error:
            raise RunError(f"line {number} of {path} cannot be read: {error}; repair or remove the line") from error
        if missing:
            raise RunError(
                f"line {number} of {path} is not a run of a benchmark: it lacks {missing[0]}; choose another --out"
            )
        if line["run"] != len(lines):
            raise RunError(
                f"line {number} of {path} is run {line['run']}, not run {len(lines)}: a line is missing or repeated"
            )
        lines.append(line)
    return lines, size, content[size:]


def _append_line(path: Path, text: str) -> None:
    """Append a line in a single write and flush it to disk; on failure leave the file as it was."""
    binary = getattr(os, "O_BINARY", 0)  # without it Windows would write two bytes for the newline
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
    """Raise `RunError` when two lines differ in recipe, tricks, data set or hardware; hardware that one line lacks does
    not count."""
    before, now = _recipe(there), _recipe(here)
    for name, (old, new) in changed_fields(before, now).items():
        raise _mixed(folder, f"the recipe's {name}", old, new)
    if before.name != now.name:
        raise _mixed(folder, "the recipe's name", before.name, now.name)
    _require_same_tricks(folder, there.get("tricks", {}), here.get("tricks", {}))
    if there["dataset"]["fingerprint"] != here["dataset"]["fingerprint"]:
        raise _mixed(folder, "the data set", _with_fingerprint(there["dataset"]), _with_fingerprint(here["dataset"]))
    for name in HARDWARE:
        known = name in there["environment"] and name in here["environment"]
        if known and there["environment"][name] != here["environment"][name]:
            raise _mixed(folder, name, there["environment"][name], here["environment"][name])


def _require_same_tricks(folder: Path, there: Mapping[str, Any], here: Mapping[str, Any]) -> None:
    before, now = there.get("parts", {}), here.get("parts", {})
    for part in sorted(before.keys() | now.keys()):
        old, new = (_of_part(parts.get(part)) for parts in (before, now))
        if old != new:
            raise _mixed(folder, f"the code of the tricks' {part}", old, new)


def _of_part(code: Mapping[str, str] | None) -> str:
    return f"{code['function']} (fingerprint {code['fingerprint']})" if code else "the recipe's own"


def _with_fingerprint(dataset: Mapping[str, Any]) -> str:
    return f"{dataset['name']} (fingerprint {dataset['fingerprint']})"


def _recipe(line: Mapping[str, Any]) -> Recipe:
    try:
        return Recipe.from_dict(line["recipe"])
    except RecipeError as error:
        raise RunError(f"another version of the package wrote these results: {error}; choose another --out") from error


def _mixed(folder: Path, what: str, there: object, here: object) -> RunError:
    return RunError(
        f"{folder} holds runs of another benchmark: {what} is {there} there and {here} now; "
        "choose another --out, or start it as before"
    )


def _cannot_write(folder: Path, error: OSError | NotImplementedError | SafetensorError) -> RunError:
    reason = getattr(error, "strerror", None) or error
    return RunError(f"the benchmark folder {folder} cannot be written: {reason}; finished runs in it are kept")


def note(text: str) -> None:
    """Print a note to stderr, where it does not mix with results."""
    print(f"note: {text}", file=sys.stderr, flush=True)
