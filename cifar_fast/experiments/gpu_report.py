"""What `benchmarks/gpu.py` has filed in gpu.json, as text: figures with where and how often they were measured, and
what is missing named as missing."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

from cifar_fast import recipes
from cifar_fast.errors import RunError
from cifar_fast.experiments.published import comparable
from cifar_fast.experiments.saved import results_folder
from cifar_fast.experiments.statistics import data_set, hardware, spread, wilson_interval
from cifar_fast.experiments.tables import percent, table

MISSING = "not yet measured on a GPU"
COMMAND = "python benchmarks/gpu.py --out benchmarks/results/gpu"
FILE = "gpu.json"
KERNELS = 5
"""Of the slowest kernels so many are shown."""
WAYS = [f"cuda_graph={graph} compile={compiler}" for graph in ("auto", "off") for compiler in ("auto", "off")]
"""As the part `profile` names them; the last has neither."""
COLUMNS = ("n", "accuracy", "train_seconds", "warm_up_seconds", "total_seconds", "hardware", "torch", "commit")


def filed(folder: Path | str | None = None) -> dict[str, Any] | None:
    """Return gpu.json as it is filed in `folder`, without it in `gpu` of `results_folder()`; None where there is none.

    Raises `RunError` when it cannot be read, or is no report of benchmarks/gpu.py.
    """
    path = (Path(folder) if folder else results_folder() / "gpu") / FILE
    try:
        report = json.loads(path.read_text())
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise RunError(f"{FILE} cannot be read ({reason}); measure again: {COMMAND}") from error
    if not isinstance(report, dict) or not isinstance(report.get("parts"), dict):
        raise RunError(f"{FILE} is no report of benchmarks/gpu.py: it has no parts; measure again: {COMMAND}")
    return report


def step_tables(folder: Path | str | None = None) -> str:
    """Return as text what CUDA graph and torch.compile are worth, the matrix limit, its share reached, the kernels.

    All is of `speedrun` on one GPU; times in seconds and microseconds, rates in TFLOP/s. `folder` is that of `filed`.
    Nothing is raised for a file that is broken or incomplete: the text says so.
    """
    found = _Filed(folder)
    parts = [_ways(found), _limit(found), _step(found)]
    return found.text("\n\n".join(parts))


def sharing_table(folder: Path | str | None = None) -> str:
    """Return as text what was measured of recipes on all GPUs of a machine: share at the target, accuracy, time.

    Intervals are 95 %: Wilson's of the share, Student's of the mean. `folder` and what is broken: as in `step_tables`.
    """
    found = _Filed(folder)
    rows = [("recipe", "n", "at 94 %", "accuracy, median", "train_seconds, mean", "hardware", "torch", "commit")]
    missing = []
    for name, piece in (
        ("apple_8gpu", found.find("apple", recipe="apple_8gpu")),
        ("speedrun on all of several GPUs", found.find("speedrun", "speedrun_all_gpus", recipe="speedrun")),
    ):
        if piece is None:
            missing.append(name)
            continue
        n, at_target = (_number(piece.at("summary", key)) for key in ("n", "at_target"))
        share = MISSING
        if n and at_target is not None and 0 <= at_target <= n:
            low, high = wilson_interval(at_target, int(n))
            share = f"{at_target:.0f} of {n:.0f} ({100 * low:.1f} to {100 * high:.1f} %)"
        median = _number(piece.at("summary", "accuracy", "median"))
        accuracy = MISSING if median is None else percent(median)
        rows.append((name, _count(n), share, accuracy, _seconds(piece.at("summary", "train_seconds")), *piece.where()))
    return found.text(_lines(rows, missing, found.data_set))


def recipe_table(folder: Path | str | None = None) -> str:
    """Return as text a row for each recipe that was measured, airbench and fresh commands too, and name the others.

    Means over n runs, with their 95 % interval. `folder` and what is broken: as in `step_tables`.
    """
    found = _Filed(folder)
    rows, missing = _recipes(found)
    text = _lines([("what", *COLUMNS), *rows], missing, found.data_set)
    return found.text(text + ("\n" + "\n".join(CLOCKS) if rows else ""))


def readme_block(folder: Path | str | None = None) -> str:
    """Return as Markdown what the README says of GPUs: `recipe_table`, the GPU tests, the ways to launch a step.

    `folder` and what is broken: as in `step_tables`.
    """
    found = _Filed(folder)
    rows, missing = _recipes(found)
    lines = []
    if rows:
        cells = [("what", *COLUMNS), ("---",) * (1 + len(COLUMNS)), *rows]
        lines = ["\n".join(f"| {' | '.join(cell.replace('|', '/') for cell in row)} |" for row in cells)]
        lines += [f"Data set: {found.data_set}. {' '.join(f'{line}.' for line in CLOCKS)}"]
    if missing:
        lines.append(f"{_listed(missing, '`')}: {MISSING}.")
    lines += [f"{_tests(found)}.", f"{_in_a_line(found)}."]
    return "\n\n".join([*lines, *(f"Note: {note}." for note in found.notes)])


CLOCKS = (
    "train_seconds, warm_up_seconds and total_seconds are means, in brackets with their 95 % interval",
    "total_seconds: of a fresh command all from the command on, else a whole run whose processes were there already",
)


# --- what is in the file ---


@dataclass(frozen=True)
class _Piece:
    """Something that was found, on a GPU and on CIFAR-10, with the attempt at its part that found it."""

    value: Any
    attempt: Mapping[str, Any]

    def at(self, *keys: str) -> Any:
        return _at(self.value, *keys)

    def where(self) -> tuple[str, str, str]:
        """Return hardware, torch's version and commits: the piece's own, where it has them, or the attempt's."""
        found = _at(self.attempt, "found", "environment")
        environment = found if isinstance(found, Mapping) else _at(self.attempt, "environment")
        try:
            machine = self.at("summary", "hardware") or hardware(environment)
        except (KeyError, TypeError):
            machine = _at(environment, "gpu")
        torch = self.at("summary", "versions", "torch") or _at(environment, "torch")
        own = self.at("commits")
        commits = own if isinstance(own, list) and own else [_at(self.attempt, "commit")]
        # Nine digits name a commit; what follows says whether it was changed.
        short = [re.sub(r"^([0-9a-f]{9})[0-9a-f]+", r"\1", str(commit)) for commit in commits if commit]
        return str(machine or "not recorded"), str(torch or "not recorded"), ", ".join(short) or "not recorded"

    def line(self) -> str:
        machine, torch, commit = self.where()
        return f"{machine}; torch {torch}; commit {commit}"


class _Filed:
    """The file, asked for one piece after the other, and what has to be said about those that it could not give."""

    def __init__(self, folder: Path | str | None) -> None:
        self.notes: list[str] = []
        self.data_set = ""
        self.parts: Mapping[str, Any] = {}
        try:
            report = filed(folder)
        except RunError as error:
            self.notes.append(str(error))
            return
        if report is not None:
            self.parts = report["parts"]

    def find(self, part: str, *keys: str, recipe: str | None = None) -> _Piece | None:
        """Return what the newest attempt that got so far has found under `keys`, None where there is none to be shown.

        `recipe`: what it must have been measured with, on CIFAR-10; without, data and recipe do not matter.
        """
        attempt, newest = self.parts.get(part), True
        while attempt is not None:
            if not isinstance(attempt, Mapping):
                self._note(f"part {part} cannot be read")
                return None
            if newest and attempt.get("state") != "done":
                self._note(f"part {part}: {attempt.get('state') or 'how it ended is not recorded'}")
            if newest and attempt.get("trouble"):  # by its kind only: what it says may name somebody's folders
                self._note(f"part {part}: what it left cannot be read, {str(attempt['trouble']).split(':')[0]}")
            value = _at(attempt, "found", *keys)
            if value not in (None, {}, []):
                against = _against(attempt, value, recipe)
                if not against:
                    if not newest:
                        when = attempt.get("ended") or "unknown date"
                        self._note(f"part {part}: what its newest attempt did not find is of {when}")
                    data = _data_set(attempt, value)
                    if recipe and data:
                        self.data_set = data_set(data)
                    return _Piece(value, attempt)
                self._note(f"part {part}: {against}, so it is not shown")
            attempt, newest = attempt.get("earlier"), False
        return None

    def text(self, text: str) -> str:
        """Return a table's text with the notes below, and how to measure what is missing."""
        how = [f"{COMMAND} measures what is missing"] if MISSING in text else []
        return "\n".join([text, *(f"note: {note}" for note in self.notes), *how])

    def _note(self, note: str) -> None:
        if note not in self.notes:
            self.notes.append(note)


def _against(attempt: Mapping[str, Any], value: Any, recipe: str | None) -> str | None:
    """Return why a finding is none of `recipe` on CIFAR-10 on a GPU."""
    if (dry := attempt.get("dry_run")) != []:
        return f"a dry run ({', '.join(map(str, dry))})" if isinstance(dry, list) else "it may be a dry run"
    own = value if isinstance(value, Mapping) and "gpu" in value else _at(attempt, "found", "environment")
    if not _at(attempt["environment"] if own is None and "environment" in attempt else own, "gpu"):
        return "measured without a GPU"
    if recipe is None:
        return None
    data = _data_set(attempt, value)
    if data is None or not comparable(data):
        return f"measured on {data['name'] if data else 'data that it does not name'}, not on all of CIFAR-10"
    measured = _at(value, "summary", "recipe") or _at(attempt, "found", "recipe", "name")
    if not isinstance(measured, str):
        return "it does not name its recipe"
    return None if measured == recipe else f"measured with the recipe {measured}, not with {recipe}"


def _data_set(attempt: Mapping[str, Any], value: Any) -> Mapping[str, Any] | None:
    data = _at(value, "summary", "dataset") or _at(attempt, "found", "dataset")
    whole = isinstance(_at(data, "name"), str) and _number(_at(data, "n_train")) and _number(_at(data, "n_test"))
    return data if whole and "fingerprint" in data else None


def _at(values: Any, *keys: str) -> Any:
    """Return what lies under keys in nested mappings; None where one of them is missing."""
    for key in keys:
        values = values.get(key) if isinstance(values, Mapping) else None
    return values


def _number(value: Any) -> float | None:
    fits = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    return value if fits else None


# --- text ---


def _text(value: Any, form: str, unit: str = "", scale: float = 1.0) -> str:
    number = _number(value)
    return MISSING if number is None else f"{scale * number:{form}}{unit}"


def _count(n: Any) -> str:
    return _text(n, ".0f") if _number(n) else MISSING


def _with_interval(values: Any, form: str, unit: str, scale: float = 1.0) -> str:
    """Return the mean of what `report.spread` gave, with its interval where there is one."""
    interval = _at(values, "mean_95")
    pair = [_text(end, form, scale=scale) for end in interval] if isinstance(interval, list) else []
    text = _text(_at(values, "mean"), form, unit, scale)
    return f"{text} ({pair[0]} to {pair[1]})" if text != MISSING and len(pair) == 2 else text


def _seconds(values: Any) -> str:
    return _with_interval(values, ".3f", " s")


def _accuracy(values: Any) -> str:
    return _with_interval(values, ".2f", " %", 100)


def _once(value: Any) -> dict[str, Any]:
    return {"mean": value}


def _lines(rows: Sequence[Sequence[str]], missing: Sequence[str], data_set: str) -> str:
    """Return a table, if there is more than its head, with its data set, and the line about what is missing."""
    lines = [table(rows), "", f"data set: {data_set}"] if len(rows) > 1 else []
    return "\n".join([*lines, *([f"{_listed(missing)}: {MISSING}"] if missing else [])])


def _listed(names: Iterable[str], quote: str = "") -> str:
    """Return names in a row; of rungs of the ladder that follow each other, the first and the last."""
    known, rungs = recipes.names(), {rung.recipe.name for rung in recipes.ladder()}
    said = []
    for on_ladder, group in groupby(names, lambda name: name in rungs):
        words = [f"{quote}{name}{quote}" if name in known else name for name in group]
        said += [f"{words[0]} ... {words[-1]}"] if on_ladder and len(words) > 2 else words
    return ", ".join(said)


# --- the tables' parts ---


def _recipes(found: _Filed) -> tuple[list[tuple[str, ...]], list[str]]:
    """Return a row for each recipe and command that was measured, and the names of the others."""
    own = {"speedrun": ("speedrun", "speedrun"), "apple_8gpu": ("apple",)}  # parts with more runs than `recipes` has
    rows, missing = [], []
    for name in recipes.names():
        piece = found.find(*own[name], recipe=name) if name in own else None
        piece = piece or found.find("recipes", "recipes", name, recipe=name)
        if piece is None:
            missing.append(name)
            continue
        of = piece.at("summary")
        clocks = (_at(of, "train_seconds"), _once(piece.at("warm_up_seconds_mean")), _at(of, "total_seconds"))
        rows.append(
            (name, _count(_at(of, "n")), _accuracy(_at(of, "accuracy")), *map(_seconds, clocks), *piece.where())
        )
    others = {"PyPI's airbench": _airbench(found)}
    others |= {f"the {which} fresh command of speedrun": _command(found, which) for which in ("first", "second")}
    rows += [(name, *row) for name, row in others.items() if row]
    return rows, missing + [name for name, row in others.items() if not row]


def _airbench(found: _Filed) -> tuple[str, ...] | None:
    """Return the row of PyPI's airbench without its name; its clock knows no whole run."""
    piece = found.find("airbench", "runs", recipe="train94")
    runs = piece.value if piece and isinstance(piece.value, list) else []
    figures = [(_number(_at(run, "accuracy")), _number(_at(run, "train_seconds"))) for run in runs]
    whole = [(accuracy, seconds) for accuracy, seconds in figures if accuracy is not None and seconds is not None]
    if piece is None or not whole:
        return None
    accuracy, seconds = (spread(values) for values in zip(*whole, strict=True))
    machine, torch, _ = piece.where()
    warm_up = _seconds(_once(_at(piece.attempt, "found", "warm_up_seconds")))
    version = f"airbench {_at(piece.attempt, 'found', 'version') or 'of no recorded version'}"
    return str(len(whole)), _accuracy(accuracy), _seconds(seconds), warm_up, MISSING, machine, torch, version


def _command(found: _Filed, which: str) -> tuple[str, ...] | None:
    """Return the row of a fresh command without its name."""
    piece = found.find("start", which, recipe="speedrun")
    if piece is None:
        return None
    clocks = (_seconds(_once(piece.at(clock))) for clock in ("train_seconds", "warm_up_seconds", "total_seconds"))
    return "1", _accuracy(_once(piece.at("accuracy"))), *clocks, *piece.where()


def _second(piece: _Piece | None, way: str) -> Any:
    """Return the second run of a way: in the first all is loaded and compiled for the first time."""
    runs = piece.at(way) if piece else None
    return runs[1] if isinstance(runs, list) and len(runs) > 1 else None


def _ran(run: Any) -> str:
    """Return what came of a way on that machine: asked for is not always got."""
    compiled = _at(run, "compiled")
    return f"{_at(run, 'launch') or 'not recorded'}, {'compiled' if compiled else 'not compiled'}"


def _ways(found: _Filed) -> str:
    piece = found.find("profile", "ways", recipe="speedrun")
    rows = [("a training of speedrun", "what ran", "n", "train_seconds", "as fast as the last", "warm_up_seconds")]
    missing, neither = [], _number(_at(_second(piece, WAYS[-1]), "train_seconds"))
    for way in WAYS:
        run = _second(piece, way)
        seconds = _number(_at(run, "train_seconds"))
        if not seconds:
            missing.append(way)
            continue
        ratio = f"{neither / seconds:.2f} times" if neither else MISSING
        warm_up = _seconds(_once(_at(run, "warm_up_seconds")))
        rows.append((way, _ran(run), "1", _seconds(_once(seconds)), ratio, warm_up))
    text = _lines(rows, [f"a training of speedrun with {way}" for way in missing], found.data_set)
    if len(missing) == len(WAYS):
        return f"speedrun with and without CUDA graph and torch.compile: {MISSING}"
    return text + (f"\n{piece.line()}; each way's second run" if piece else "")


def _limit(found: _Filed) -> str:
    piece = found.find("profile", "limit", recipe="speedrun")
    if piece is None:
        return f"matrix limit in float16 and bfloat16: {MISSING}"
    rates = {dtype: _text(piece.at("tflops", dtype), ",.0f", " TFLOP/s") for dtype in ("float16", "bfloat16")}
    side, repeats = (_text(piece.at(key), ",.0f") for key in ("side", "repeats"))
    said = ", ".join(f"{dtype} {rate}" for dtype, rate in rates.items())
    return f"matrix limit, products of side {side}, best of n = {repeats}: {said}\n{piece.line()}"


def _step(found: _Filed) -> str:
    piece = found.find("profile", "step", recipe="speedrun")
    if piece is None or not isinstance(piece.value, Mapping):
        return f"share of the matrix limit that a step of speedrun reaches, and its slowest kernels: {MISSING}"
    steps = _count(piece.at("steps"))
    figures = [
        f"{_text(piece.at('us_a_step'), ',.0f', ' us')} a step of speedrun (n = {steps} steps)",
        f"the GPU busy in {_text(piece.at('busy_share'), '.1f', ' %', 100)} of it",
        f"share of the matrix limit reached: {_text(piece.at('share_of_limit'), '.1f', ' %', 100)}",
    ]
    rows = [("kernel", "share of kernel time", "us a step", "calls a step")]
    kernels = piece.at("kernels")
    for kernel in kernels[:KERNELS] if isinstance(kernels, list) else []:
        share, times = _text(_at(kernel, "share"), ".1f", " %", 100), _text(_at(kernel, "us_a_step"), ",.1f")
        rows.append(
            (str(_at(kernel, "name") or "not named")[:60], share, times, _text(_at(kernel, "calls_a_step"), ",.1f"))
        )
    slowest = table(rows) if len(rows) > 1 else f"slowest kernels: {MISSING}"
    return f"{'; '.join(figures)}\n{slowest}\ndata set: {found.data_set}; {piece.line()}"


def _tests(found: _Filed) -> str:
    piece = found.find("tests")
    if piece is None:
        return f"The tests that need a GPU (`pytest -m gpu`): {MISSING}"
    said = [_text(piece.at("passed"), ".0f", " passed")]
    for word, tag in (("failed", "failure"), ("broken", "error"), ("skipped", "skipped")):
        names = piece.at(tag)
        if isinstance(names, list) and names:
            said.append(f"{len(names)} {word} ({', '.join(name for name in names if isinstance(name, str))})")
    return f"`pytest -m gpu`: {', '.join(said)}; {piece.line()}"


def _in_a_line(found: _Filed) -> str:
    """Return the ways to launch a step and the share of the limit, for who does not open the notebook."""
    ways, step = (found.find("profile", key, recipe="speedrun") for key in ("ways", "step"))
    runs = {way: _second(ways, way) for way in WAYS}
    share = _number(step.at("share_of_limit") if step else None)
    what = "What CUDA graph and torch.compile are each worth, and the share of the matrix limit"
    details = "[notebook 03](notebooks/03_half_precision.ipynb)"
    if not any(runs.values()) and share is None:
        return f"{what} ({details}): {MISSING}"
    said = [f"`{way}` {_seconds(_once(_at(run, 'train_seconds')))} ({_ran(run)})" for way, run in runs.items() if run]
    said += [f"`{way}` {MISSING}" for way, run in runs.items() if not run]
    said.append(f"share of the matrix limit {_text(share, '.1f', ' %', 100)}")
    piece = ways or step
    return f"{what} ({details}), `speedrun`, n = 1 each: {'; '.join(said)}; {piece.line() if piece else ''}"
