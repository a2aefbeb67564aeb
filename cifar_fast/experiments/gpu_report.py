"""Shows what `benchmarks/gpu.py` has measured: each figure with n, hardware, versions and commit, each gap by name."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

from cifar_fast import recipes
from cifar_fast.errors import RunError
from cifar_fast.experiments.published import RECORDS, comparable
from cifar_fast.experiments.saved import results_folder
from cifar_fast.experiments.statistics import spread, wilson_interval
from cifar_fast.shown import data_set, hardware, percent, table

FILE = "gpu.json"
COMMAND = "python benchmarks/gpu.py --out benchmarks/results/gpu"
MISSING = "not yet measured on a GPU"
KERNELS = 5
"""How many of the slowest kernels are shown."""
_WAYS = (
    ("auto", "auto", True),
    ("auto", "auto", False),
    ("auto", "off", True),
    ("auto", "off", False),
    ("off", "auto", True),
    ("off", "off", True),
    ("off", "off", False),
)
WAYS: dict[str, dict[str, Any]] = {
    f"cuda_graph={graph} compile={compiler} fuse_norm={fuse}": {
        "cuda_graph": graph,
        "compile": compiler,
        "fuse_norm": fuse,
    }
    for graph, compiler, fuse in _WAYS
}
"""How the script's part `ways` trains speedrun; the last way is eager, with torch's own batch norm."""

COLUMNS = ("n", "accuracy", "train_seconds", "warm_up_seconds", "total_seconds", "hardware", "torch", "commit")
LEGEND = (
    "accuracy and clocks: mean, with its 95 % interval in brackets; total_seconds: of a fresh command from its start, "
    "else of a run in processes that were there already"
)


# --- what is saved ---


def saved_parts(folder: Path | str | None = None) -> dict[str, Any]:
    """Return what gpu.json in `folder` holds for each part of the script; nothing where there is no such file.

    Args:
        folder: None for the folder `gpu` of `results_folder()`.

    Raises:
        RunError: the file cannot be read, or benchmarks/gpu.py did not write it.
    """
    path = (Path(folder) if folder else results_folder() / "gpu") / FILE
    try:
        return dict(json.loads(path.read_text())["parts"])
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise RunError(f"{FILE} cannot be read ({type(error).__name__}); measure again: {COMMAND}") from error


class NotShown(Exception):
    """A figure has no place in a table; the message is the reason."""


@dataclass(frozen=True)
class Finding:
    """Something that the script has measured."""

    values: Any
    about: dict[str, Any]
    """`environment` and `commits`; `recipe` and `dataset` too, except for the GPU tests."""

    def origin(self) -> tuple[str, str, str]:
        """Return hardware, torch version and commits."""
        environment = self.about["environment"]
        commits = ", ".join(_short(commit) for commit in self.about["commits"])
        return hardware(environment), environment["torch"], commits

    def origin_line(self) -> str:
        """Return the same in one line, with the data set."""
        machine, torch, commits = self.origin()
        data = f"data set: {data_set(self.about['dataset'])}; " if "dataset" in self.about else ""
        return f"{data}{machine}; torch {torch}; commit {commits}"


def find(parts: Mapping[str, Any], part: str, key: str | None = None, recipe: str | None = None) -> Finding:
    """Return what a part has found, or what it has found under `key`.

    Raises `NotShown` when there is nothing, when it was measured without a GPU, or when a `recipe` is named and it was
    measured with another one or not on all of CIFAR-10.
    """
    entry = parts.get(part)
    if not entry or not entry["found"]:
        raise NotShown(MISSING)
    found = entry["found"]
    about = {"environment": entry["environment"], "commits": [entry["commit"]]} | found.get("about", {})
    values = found.get(key) if key else found
    if key and isinstance(values, Mapping):
        about |= values.get("about", {})
    if not values:
        raise NotShown(MISSING)
    _require_comparable(about, recipe)
    return Finding(values, about)


def _require_comparable(about: Mapping[str, Any], recipe: str | None) -> None:
    if not about["environment"]["gpu"]:
        raise NotShown("measured without a GPU, so not shown")
    if recipe and not comparable(about["dataset"]):
        raise NotShown(f"measured on {about['dataset']['name']}, not on all of CIFAR-10, so not shown")
    if recipe and about["recipe"] != recipe:
        raise NotShown(f"measured with the recipe {about['recipe']}, not with {recipe}, so not shown")


class Wanted(NamedTuple):
    """An entry of a table: its name, the function that makes it from a finding, and where `find` looks for that."""

    name: str
    make: Callable[[Finding], Any]
    part: str
    key: str | None = None
    recipe: str | None = None


def make_all(parts: Mapping[str, Any], wanted: Iterable[Wanted]) -> tuple[dict[str, Any], list[str]]:
    """Return the entries that can be made, by name, and a line for each reason why others cannot."""
    made, missing = {}, defaultdict(list)
    for name, make, part, key, recipe in wanted:
        try:
            made[name] = make(find(parts, part, key, recipe))
        except NotShown as reason:
            missing[str(reason)].append(name)
    return made, [f"{reason}: {_listed(names)}" for reason, names in missing.items()]


def attempts(parts: Mapping[str, Any], names: Iterable[str]) -> list[str]:
    """Return a line for each of these parts whose last attempt did not end well."""
    last = {name: parts[name].get("later_attempt", parts[name]) for name in names if name in parts}
    bad = {name: entry for name, entry in last.items() if entry["state"] != "done"}
    return [f"part {name} on {entry['ended']}: {entry['state']}" for name, entry in bad.items()]


def _short(commit: str) -> str:
    """Return a commit's first nine digits, and `-changed` where the checkout differed from it."""
    revision, _, changed = commit.partition("-")
    return revision[:9] + (f"-{changed}" if changed else "")


# --- the tables ---


def step_tables(folder: Path | str | None = None) -> str:
    """Return as text what CUDA graphs and torch.compile are worth, the GPU's matrix limit, and the slowest kernels.

    All of it is measured with `speedrun` on one GPU, with full-size images only. `folder` and errors: as for
    `saved_parts`.
    """
    parts = saved_parts(folder)
    wanted = [
        Wanted("speedrun with and without graph, compiler and fused norms", _ways, "ways", "ways", "speedrun"),
        Wanted("the limit of float16 and bfloat16 matrix products", _limit, "kernels", "limit", "speedrun"),
        Wanted("the share of it that a step reaches, and the slowest kernels", _step, "kernels", "step", "speedrun"),
    ]
    made, missing = make_all(parts, wanted)
    return "\n\n".join([*made.values(), _notes(parts, ["ways", "kernels"], missing)]).strip()


def sharing_table(folder: Path | str | None = None) -> str:
    """Return as text how often recipes reached 94 % on all GPUs of a machine, their accuracy and their time.

    Intervals are 95 %: Wilson's for the share, Student's for the mean. `folder` and errors: as for `saved_parts`.
    """
    parts = saved_parts(folder)
    wanted = [
        Wanted("apple_8gpu", _share_row, "apple", "apple_8gpu", "apple_8gpu"),
        Wanted("speedrun on several GPUs", _share_row, "speedrun", "speedrun_all_gpus", "speedrun"),
    ]
    head = ("recipe", "n", "at 94 %", "accuracy, median", "train_seconds, mean", "hardware", "torch", "commit")
    made, missing = make_all(parts, wanted)
    return "\n".join([*_table(head, made), _notes(parts, ["apple", "speedrun"], missing)]).strip()


def recipe_table(folder: Path | str | None = None) -> str:
    """Return as text a row for each recipe measured, for PyPI's airbench and for fresh commands, and name the rest.

    Below them stand the published figures of the fastest systems.

    `folder` and errors: as for `saved_parts`.
    """
    parts = saved_parts(folder)
    made, missing = make_all(parts, _recipe_rows())
    lines = [*_table(("what", *COLUMNS), made | _published_rows()), LEGEND, PUBLISHED] if made else []
    return "\n".join([*lines, _notes(parts, RECIPE_PARTS, missing)]).strip()


def readme_block(folder: Path | str | None = None) -> str:
    """Return as Markdown what the README says about GPUs: the rows of `recipe_table`, and the GPU tests.

    `folder` and errors: as for `saved_parts`.
    """
    parts = saved_parts(folder)
    made, missing = make_all(parts, _recipe_rows())
    tests, no_tests = make_all(parts, [Wanted("the tests that need a GPU (`pytest -m gpu`)", _tests, "tests")])
    shown = made | _published_rows()
    lines = [("what", *COLUMNS), ("---",) * (1 + len(COLUMNS)), *((name, *row) for name, row in shown.items())]
    rows = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    paragraphs = [rows, f"Data set: CIFAR-10; {LEGEND}; {PUBLISHED}."] if made else []
    said = [*missing, *tests.values(), *no_tests, *attempts(parts, ["tests", *RECIPE_PARTS])]
    return "\n\n".join([*paragraphs, *(f"{line[0].upper()}{line[1:]}." for line in said)])


# --- their rows ---

PUBLISHED = "published: by others, each by its own clock on its own hardware"
SHOWN_RECORDS = ("airbench94 with Muon", "Hiverge", "Fulcrum")
"""The records that stand beside ours: those on one GPU since Muon."""
RECIPE_PARTS = ("speedrun", "apple", "airbench", "start", "recipes")
OWN_PARTS = {"speedrun": ("speedrun", "speedrun"), "apple_8gpu": ("apple", "apple_8gpu")}
"""Where to find the recipes that the part `recipes` leaves to other parts."""


def _recipe_rows() -> list[Wanted]:
    rows = []
    for name in recipes.names():
        part, key = OWN_PARTS.get(name, ("recipes", name))
        rows.append(Wanted(name, _benchmark_row, part, key, name))
    return [
        *rows,
        Wanted("PyPI's airbench", _airbench_row, "airbench", "runs", "train94"),
        Wanted("a cold start of speedrun", _command_row, "start", "first", "speedrun"),
        Wanted("a warm start of speedrun", _command_row, "start", "second", "speedrun"),
    ]


def _benchmark_row(finding: Finding) -> tuple[str, ...]:
    summary = finding.values["summary"]
    warm_up = f"{finding.values['warm_up_seconds_mean']:.3f} s"
    train, total = _seconds(summary["train_seconds"]), _seconds(summary["total_seconds"])
    return str(summary["n"]), _accuracy(summary["accuracy"]), train, warm_up, total, *finding.origin()


def _published_rows() -> dict[str, tuple[str, ...]]:
    """Return the rows of the records that ours are compared with; each record is a time to 94 %."""
    return {
        f"published: {record.system}": ("-", "94 %", f"{record.seconds:g} s", "-", "-", record.hardware, "-", "-")
        for record in RECORDS
        if record.system in SHOWN_RECORDS
    }


def _share_row(finding: Finding) -> tuple[str, ...]:
    summary = finding.values["summary"]
    k, n = summary["at_target"], summary["n"]
    low, high = wilson_interval(k, n)
    share = f"{k} of {n} ({100 * low:.1f} to {100 * high:.1f} %)"
    return str(n), share, percent(summary["accuracy"]["median"]), _seconds(summary["train_seconds"]), *finding.origin()


def _airbench_row(finding: Finding) -> tuple[str, ...]:
    """Return airbench's row; it has no clock for a whole run."""
    accuracy, train = (spread([run[key] for run in finding.values]) for key in ("accuracy", "train_seconds"))
    warm_up = f"{finding.about['warm_up_seconds']:.3f} s"
    machine, torch, _ = finding.origin()
    version = f"airbench {finding.about['version']}"
    return str(len(finding.values)), _accuracy(accuracy), _seconds(train), warm_up, "-", machine, torch, version


def _command_row(finding: Finding) -> tuple[str, ...]:
    clocks = (f"{finding.values[clock]:.3f} s" for clock in ("train_seconds", "warm_up_seconds", "total_seconds"))
    return "1", percent(finding.values["accuracy"]), *clocks, *finding.origin()


def _ways(finding: Finding) -> str:
    # The second run of each way: in the first, everything is loaded and compiled for the first time.
    runs = {way: finding.values[way][1] for way in WAYS if way in finding.values}
    eager = runs.get(list(WAYS)[-1])
    rows = [("speedrun with", "step mode", "n", "train_seconds", "speed against eager", "warm_up_seconds")]
    for way, run in runs.items():
        speed = f"{eager['train_seconds'] / run['train_seconds']:.2f}" if eager else MISSING
        clocks = f"{run['train_seconds']:.3f} s", speed, f"{run['warm_up_seconds']:.3f} s"
        rows.append((way, run["step_mode"], "1", *clocks))
    missing = [f"{MISSING}: speedrun with {way}" for way in WAYS if way not in runs]
    return "\n".join(
        [table(rows), *missing, f"the second run of each way, with full-size images only; {finding.origin_line()}"]
    )


def _limit(finding: Finding) -> str:
    rates = ", ".join(f"{dtype} {rate:,.0f} TFLOP/s" for dtype, rate in finding.values["tflops"].items())
    side, repeats = finding.values["side"], finding.values["repeats"]
    what = f"limit of matrix products of side {side:,}, best of n = {repeats}: {rates}"
    return f"{what}\n{finding.origin_line()}"


def _step(finding: Finding) -> str:
    step = finding.values
    rows = [("kernel", "share of kernel time", "us per step", "calls per step")]
    for kernel in step["kernels"][:KERNELS]:
        figures = f"{100 * kernel['share']:.1f} %", f"{kernel['us_a_step']:,.1f}", f"{kernel['calls_a_step']:,.1f}"
        rows.append((kernel["name"][:60], *figures))
    head = (
        f"a full-size step of speedrun takes {step['us_a_step']:,.0f} us (n = {step['steps']} steps); the GPU is busy "
        f"for {100 * step['busy_share']:.1f} % of it and reaches {100 * step['share_of_limit']:.1f} % of the matrix "
        "limit"
    )
    return f"{head}\n{table(rows)}\n{finding.origin_line()}"


def _tests(finding: Finding) -> str:
    words = {"failure": "failed", "error": "broken", "skipped": "skipped"}
    bad = {word: finding.values[tag] for tag, word in words.items() if finding.values[tag]}
    said = [
        f"{finding.values['passed']} passed",
        *(f"{len(bad[word])} {word} ({', '.join(bad[word])})" for word in bad),
    ]
    return f"`pytest -m gpu`: {', '.join(said)}; {finding.origin_line()}"


# --- text ---


def _table(head: tuple[str, ...], rows: Mapping[str, tuple[str, ...]]) -> list[str]:
    return [table([head, *((name, *row) for name, row in rows.items())]), "", "data set: CIFAR-10"] if rows else []


def _notes(parts: Mapping[str, Any], names: Iterable[str], missing: Sequence[str]) -> str:
    """Return what is missing, which attempts did not end well, and how to measure."""
    how = [f"{COMMAND} measures what is missing"] if missing else []
    return "\n".join([*missing, *(f"note: {line}" for line in attempts(parts, names)), *how])


def _listed(names: Iterable[str]) -> str:
    """Return a list of names as text; of neighbouring rungs of the ladder, only the first and the last."""
    rungs = {rung.recipe.name for rung in recipes.ladder()}
    listed = []
    for on_ladder, group in groupby(names, rungs.__contains__):
        words = list(group)
        listed += [f"{words[0]} ... {words[-1]}"] if on_ladder and len(words) > 2 else words
    return ", ".join(listed)


def _seconds(values: Mapping[str, Any]) -> str:
    return _with_interval(values, 1, ".3f", "s")


def _accuracy(values: Mapping[str, Any]) -> str:
    return _with_interval(values, 100, ".2f", "%")


def _with_interval(values: Mapping[str, Any], scale: float, form: str, unit: str) -> str:
    """Return the mean of what `statistics.spread` gave, with its interval where there is one."""
    text = f"{scale * values['mean']:{form}} {unit}"
    if values["mean_95"] is None:
        return text
    low, high = values["mean_95"]
    return f"{text} ({scale * low:{form}} to {scale * high:{form}})"
