"""Trains two recipes or tricks in turns, with the same seeds, until it is clear which one is more accurate.

The difference is checked after every pair of runs. An ordinary 95 % interval does not allow that: stopping as soon as
it excludes zero is wrong about 27 times in 100 within 30 pairs. The interval here, `anytime_interval`, is wrong at most
5 times in 100 over all looks together, and never asks how many pairs there will be: the same command with a larger
`max_runs`, or Ctrl-C, leaves it valid. Source: H. Wang and A. Ramdas, "Anytime-valid t-tests and confidence sequences
for Gaussian means with unknown variance", 2024 (arXiv:2310.03722).

Why this method: group-sequential boundaries (S. J. Pocock, 1977; P. C. O'Brien and T. R. Fleming, 1979; K. K. G. Lan
and D. L. DeMets, 1983), adapted to t statistics, use up all of the 5 %, but for a number of pairs chosen beforehand.
Where a difference is at least one standard deviation of a pair, as 0.2 points are on CIFAR-10, they save a pair or two;
at half a standard deviation, about a quarter of the pairs. `benchmarks/compare_error.py` simulates all of them.

The intervals assume that differences are roughly normal. Heavy tails do no harm; strong skew does, but the differences
of two arms that are equally good and equally noisy are symmetric. A difference found early is on average too large,
since luck helped to find it; its interval holds all the same.
"""

from __future__ import annotations

import html
import itertools
import json
import math
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean, median, stdev, variance
from typing import Any

from tqdm.auto import tqdm

from cifar_fast.data.dataset import Dataset
from cifar_fast.distributed.launch import Trainer, check_fit, choose_world_size, require_travel
from cifar_fast.errors import RunError, UserError
from cifar_fast.experiments.benchmark import RESULTS, BenchmarkFolder, load_benchmark, note, on_main, train_once
from cifar_fast.experiments.power import RunsNeeded, expected_deviation, run_seconds
from cifar_fast.experiments.statistics import anytime_interval, anytime_t_bound, mean_interval, sign_test
from cifar_fast.files import write_text
from cifar_fast.hardware.device import environment, select_device
from cifar_fast.recipe import Recipe, changed_fields
from cifar_fast.shown import data_set, hardware, html_table, percent, table
from cifar_fast.training.result import write_json
from cifar_fast.training.tricks import NO_TRICKS, Tricks

SUMMARY, TABLE = "comparison.json", "comparison.txt"
A, B, LONGER = "a", "b", "longer"
"""Folders of the arms inside the comparison's folder, each a benchmark folder."""
FEWEST_PAIRS = next(n for n in itertools.count(1) if math.isfinite(anytime_t_bound(n)))
"""The fewest pairs that have an interval."""
TARGET = 0.94
"""The accuracy that counts as reached in the arms' summaries, as in a benchmark's."""
NAMED_CHANGES = 3
"""How many changed fields the name of an arm shows."""


@dataclass(frozen=True, kw_only=True, repr=False)
class Comparison:
    """Runs of two arms, A and B, paired by seed. Differences are B minus A, in percentage points of test accuracy."""

    names: tuple[str, str]
    """What tables call A and B."""
    arms: dict[str, list[dict[str, Any]]]
    """Lines of `results.jsonl` by arm: `a`, `b`, and `longer` if A was trained for more epochs, too."""
    resolution: float
    """The comparison ends when the interval is narrower than this, in points."""
    max_runs: int
    """The comparison ends after this many runs of each arm."""

    @property
    def pairs(self) -> int:
        """The number of seeds that all arms have been trained with."""
        return min(len(runs) for runs in self.arms.values())

    @property
    def differences(self) -> list[float]:
        """B minus A, seed by seed, in points."""
        return self._differences(B)

    def _differences(self, arm: str) -> list[float]:
        pairs = list(zip(self.arms[A], self.arms[arm], strict=False))[: self.pairs]
        return [100 * (other["accuracy"] - first["accuracy"]) for first, other in pairs]

    @property
    def least_deviation(self) -> float:
        """One test image, in points: accuracies come in steps of this size."""
        return 100 / self.arms[A][0]["dataset"]["n_test"] if self.arms[A] else 0.0

    @property
    def effect(self) -> float | None:
        """The mean difference, in points; None before the first pair."""
        return fmean(self.differences) if self.pairs else None

    @property
    def interval(self) -> tuple[float, float] | None:
        """The 95 % interval of the difference, in points, valid at every look; None while it is unbounded."""
        return anytime_interval(self.differences, least_deviation=self.least_deviation)

    @property
    def better(self) -> str | None:
        """The arm that is more accurate, `a` or `b`; None while the interval includes zero."""
        if (interval := self.interval) is None or interval[0] <= 0 <= interval[1]:
            return None
        return B if interval[0] > 0 else A

    @property
    def resolved(self) -> bool:
        """Whether the interval is narrower than `resolution`."""
        return (interval := self.interval) is not None and interval[1] - interval[0] < self.resolution

    @property
    def finished(self) -> bool:
        """Whether there is a reason to stop."""
        return self.better is not None or self.resolved or self.pairs >= self.max_runs

    @property
    def next_arm(self) -> str:
        """The arm to train next. Every other pair begins with the last arm, so that a drifting clock favours none."""
        order = list(self.arms) if self.pairs % 2 == 0 else list(reversed(self.arms))
        return next(arm for arm in order if len(self.arms[arm]) == self.pairs)

    @property
    def equivalent_epochs(self) -> tuple[float, float, float] | None:
        """How many more epochs of A would change its accuracy as much as B does: an estimate and its 95 % interval.

        It assumes that the longer runs' gain is proportional to their extra epochs, even beyond them. The interval
        (E. C. Fieller, 1954) is valid at every look: it holds each ratio r for which the differences of B, minus r
        times those of the longer runs, do not exclude zero. None without longer runs, and while it is not clear that
        they are more accurate.
        """
        if LONGER not in self.arms or math.isinf(bound := anytime_t_bound(max(1, self.pairs))):
            return None
        ours, longer = self.differences, self._differences(LONGER)
        mean, rate, n = fmean(ours), fmean(longer), self.pairs
        step = self.least_deviation**2
        covariance = sum((x - mean) * (y - rate) for x, y in zip(ours, longer, strict=True)) / (n - 1)
        # |mean - r rate| <= bound x standard error, squared: a quadratic in r.
        scale = bound**2 / n
        square = rate**2 - scale * (variance(longer) + step)
        middle = mean * rate - scale * covariance
        constant = mean**2 - scale * (variance(ours) + step)
        if square <= 0 or rate <= 0:
            return None
        root = math.sqrt(max(0.0, middle**2 - square * constant))
        extra = self.arms[LONGER][0]["recipe"]["epochs"] - self.arms[A][0]["recipe"]["epochs"]
        return extra * mean / rate, extra * (middle - root) / square, extra * (middle + root) / square

    def verdict(self) -> str:
        """Return in a sentence what the runs say so far."""
        a, b = self.names
        if (interval := self.interval) is None:
            return (
                f"Too early to say: it takes {FEWEST_PAIRS} pairs of runs for an interval, and there are {self.pairs}."
            )
        low, high = interval
        between = f"(95 % interval {low:+.2f} to {high:+.2f}, valid at every look)"
        if better := self.better:
            assert self.effect is not None
            how = "more" if better == B else "less"
            return f"{b} is {how} accurate than {a}, by {abs(self.effect):.2f} points {between}."
        if self.resolved:
            return f"Any difference between {a} and {b} is smaller than {self.resolution:g} points {between}."
        return f"{_count(self.pairs, 'pair')} of runs do not show which is more accurate, {a} or {b} {between}."

    def rows(self) -> tuple[list[tuple[str, ...]], list[tuple[str, ...]]]:
        """Return two tables as rows of text: the arms, then their difference."""
        arms = [("", *self._columns())]
        for label, field, scale, unit in (
            ("accuracy", "accuracy", 100, "%"),
            ("train_seconds", "train_seconds", 1, "s"),
        ):
            cells = [_spread([scale * run[field] for run in runs], unit) for runs in self.arms.values()]
            arms.append((label, *cells))
        arms.insert(1, ("runs", *(str(len(runs)) for runs in self.arms.values())))
        rows: list[tuple[str, ...]]
        differences = self.differences
        favour = sum(value > 0 for value in differences)
        ties = sum(value == 0 for value in differences)
        rows = [
            ("B minus A", "points"),
            ("mean difference", "-" if self.effect is None else f"{self.effect:+.2f}"),
            ("95 % interval, valid at every look", _interval(self.interval)),
            ("paired t, 95 % *", _interval(mean_interval(differences))),
            (
                "sign test *",
                f"B ahead in {favour} of {_count(self.pairs, 'pair')}, {ties} equal; p = {sign_test(differences):.2g}",
            ),
        ]
        if LONGER in self.arms:
            if found := self.equivalent_epochs:
                epochs = f"{found[0]:+.1f} ({found[1]:+.1f} to {found[2]:+.1f})"
            else:
                epochs = "unknown: it is not clear yet that longer runs of A are more accurate"
            rows.append(("as a change of A's epochs", epochs))
        return arms, rows

    def _columns(self) -> list[str]:
        columns = [f"A: {self.names[0]}", f"B: {self.names[1]}"]
        if LONGER in self.arms:
            columns.append(
                f"A, {self.arms[LONGER][0]['recipe']['epochs']:g} epochs" if self.arms[LONGER] else "A, longer"
            )
        return columns

    def notes(self) -> list[str]:
        """Return what the table leaves out, a line each."""
        notes = ["* for reference: valid only where the number of pairs was fixed beforehand, not when it grew"]
        if self.arms[A]:
            first = self.arms[A][0]
            machine = first["environment"]
            notes += [
                f"data set: {data_set(first['dataset'])}",
                f"hardware: {hardware(machine)}; torch {machine['torch']}",
            ]
        return notes

    def table(self) -> str:
        """Return the comparison as text: both arms, their difference, the verdict."""
        arms, rows = self.rows()
        return "\n".join([table(arms), "", table(rows), "", f"VERDICT: {self.verdict()}", "", *self.notes()])

    def __repr__(self) -> str:
        return f"{self.verdict()} (n = {_count(self.pairs, 'pair')}; `table` shows all)"

    def _repr_html_(self) -> str:
        arms, rows = self.rows()
        verdict = f"<p><b>{html.escape(self.verdict())}</b></p>"
        return f"{html_table(arms)}\n{verdict}\n{html_table(rows, self.notes())}".replace("+-", "\u00b1")

    def summary(self) -> dict[str, Any]:
        """Return settings and result as plain values, ready for JSON; differences are in points."""
        return {
            "a": self.names[0],
            "b": self.names[1],
            "arms": list(self.arms),
            "resolution": self.resolution,
            "max_runs": self.max_runs,
            "pairs": self.pairs,
            "differences": self.differences,
            "effect": self.effect,
            "interval_95": self.interval,
            "paired_t_95_if_fixed": mean_interval(self.differences),
            "sign_test_p_if_fixed": sign_test(self.differences),
            "equivalent_epochs": self.equivalent_epochs,
            "better": self.better,
            "verdict": self.verdict(),
        }


def _spread(values: Sequence[float], unit: str) -> str:
    if not values:
        return "-"
    interval = mean_interval(values)
    half = f" +- {(interval[1] - interval[0]) / 2:.2f}" if interval else ""
    return f"{fmean(values):.2f}{half} {unit}"


def _interval(interval: tuple[float, float] | None) -> str:
    return f"{interval[0]:+.2f} to {interval[1]:+.2f}" if interval else "none yet"


def _count(n: int, what: str) -> str:
    return f"{n} {what}" + ("s" if n != 1 else "")


# --- training ---


Arm = Recipe | tuple[Recipe, Tricks]
"""What is trained: a recipe, or a recipe with functions of the reader's own."""


def compare(
    a: Arm,
    b: Arm,
    data: Dataset,
    *,
    resolution: float = 0.2,
    max_runs: int = 30,
    extra_epochs: float = 0.0,
    world_size: int | None = None,
    device: str | None = None,
    backend: str | None = None,
    out: Path | str | None = None,
    first_seed: int = 0,
    save_logits: bool = False,
    progress: bool = True,
    timeout: float = 10.0,
    on_plan: Callable[[RunsNeeded], None] | None = None,
    on_run: Callable[[str, Comparison], None] | None = None,
) -> Comparison:
    """Train `a` and `b` in turns until it is clear which one is more accurate.

    Each pair of runs has a seed of its own. The comparison ends when the 95 % interval of the mean difference excludes
    zero, when it is narrower than `resolution`, or after `max_runs` pairs; the interval is valid at every look. Before
    the first run it says how many pairs, and how much time, a difference of a given size would take here.

    Each finished run is saved in `out`, as `benchmark` saves one. The same call resumes an interrupted comparison, even
    with a different `resolution` or a larger `max_runs`.

    Args:
        a: what is trained as A: a recipe, or a pair of a recipe and `Tricks`.
        b: what is trained as B, likewise.
        data: the training and test images.
        resolution: stop at an interval this narrow, in percentage points: any difference left in doubt is then smaller.
        max_runs: the most runs of each arm.
        extra_epochs: also train A for this many more epochs in each turn, to express the difference in epochs; 0: off.
        world_size: as for `launch`, like `device`, `backend` and `timeout`.
        device: `cpu`, `cuda`, ... or None for the best there is.
        backend: what the processes talk over.
        out: the folder of the comparison; None: the runs are not kept.
        first_seed: the seed of the first pair; each pair takes the next one.
        save_logits: keep the test logits of each run in the folder of its arm, for `variance`.
        progress: whether to show progress, and to print what `on_plan` and `on_run` would get if neither is given.
        timeout: seconds within which one process that died or hangs ends all of them.
        on_plan: called before the first run with how many pairs differences of several sizes would take.
        on_run: called after each run with its arm (`a`, `b` or `longer`) and the comparison so far.

    Raises:
        UserError: an argument is out of range, both arms are the same, or `Trainer` cannot start; `RecipeError` for a
            recipe that does not fit, `TricksError` for tricks that do not.
        RunError: `out` holds runs of other arms, data or hardware, belongs to a comparison that is still running, or
            cannot be written. Finished runs stay in it, here and when a run fails.
    """
    _check_arguments(resolution, max_runs, extra_epochs, first_seed)
    arms = {A: _pair(a), B: _pair(b)}
    _require_different(arms[A], arms[B])
    if extra_epochs:
        recipe, tricks = arms[A]
        arms[LONGER] = replace(recipe, epochs=recipe.epochs + extra_epochs), tricks
    world_size = choose_world_size(world_size, device, arms[A][0])
    for recipe, tricks in arms.values():
        check_fit(recipe, world_size, data)
        require_travel(tricks, world_size)
    with ExitStack() as stack:
        trainer = stack.enter_context(
            Trainer(data, world_size=world_size, device=device, backend=backend, timeout=timeout)
        )
        path = Path(out) if out is not None else Path(stack.enter_context(tempfile.TemporaryDirectory()))
        machine = environment(select_device(device)) | {"world_size": world_size}
        folders = {arm: BenchmarkFolder(path / arm, TARGET) for arm in arms}

        def open_folders() -> dict[str, list[dict[str, Any]]]:
            _require_free(path)
            runs = {}
            for arm, folder in folders.items():
                recipe, tricks = arms[arm]
                made_of = {"recipe": recipe.to_dict(), "tricks": tricks.describe()}
                expected = made_of | {"dataset": data.describe(), "environment": machine}
                runs[arm] = stack.enter_context(folder).read(expected, first_seed)
            for left in path.glob("comparison.*.part"):  # of a call that was killed; ours holds the locks now
                left.unlink(missing_ok=True)
            return runs

        runs = on_main(trainer, open_folders)
        found = Comparison(names=arm_names(arms[A], arms[B]), arms=runs, resolution=resolution, max_runs=max_runs)
        if any(runs.values()) and trainer.is_main:
            next_step = "nothing is left to do" if found.finished else "resuming"
            note(f"{path} holds {_count(found.pairs, 'pair')} of at most {max_runs}: {next_step}")
        if not found.finished:
            if on_plan or progress:
                plan = on_main(trainer, lambda: runs_needed(found, arms, data, world_size=world_size, device=device))
                if on_plan:
                    on_plan(plan)
                elif trainer.is_main:
                    tqdm.write(plan.table() + "\n")
            for arm in (A, B):
                trainer.warm_up(*arms[arm])
        on_main(trainer, lambda: _save(found, path))
        while not found.finished:
            arm = found.next_arm
            line = train_once(
                trainer,
                folders[arm],
                *arms[arm],
                len(runs[arm]),
                first_seed=first_seed,
                keep_logits=save_logits,
                progress=progress,
            )
            runs[arm].append(line)
            on_main(trainer, lambda: _save(found, path))
            if on_run:
                on_run(arm, found)
            elif progress and trainer.is_main:
                tqdm.write(run_line(arm, found))
    return found


def _check_arguments(resolution: float, max_runs: int, extra_epochs: float, first_seed: int) -> None:
    if not 0 <= resolution < math.inf:
        raise UserError(f"resolution={resolution:g} must be a width in percentage points, at least 0")
    if max_runs < FEWEST_PAIRS:
        raise UserError(f"max_runs={max_runs} must be at least {FEWEST_PAIRS}: fewer pairs of runs decide nothing")
    if not 0 <= extra_epochs < math.inf:
        raise UserError(f"extra_epochs={extra_epochs:g} must be at least 0")
    if first_seed < 0:
        raise UserError(f"first_seed={first_seed} must be at least 0")


def _require_free(path: Path) -> None:
    """Raise `RunError` when `path` holds something other than a comparison."""
    for name, what in ((RESULTS, "a benchmark"), ("recipe.json", "a single run")):
        if (path / name).exists():
            raise RunError(f"{path} is the folder of {what}; choose another --out")


def _pair(arm: Arm) -> tuple[Recipe, Tricks]:
    recipe, tricks = arm if isinstance(arm, tuple) and len(arm) == 2 else (arm, NO_TRICKS)
    if not isinstance(recipe, Recipe) or not isinstance(tricks, Tricks):
        raise UserError(f"an arm must be a recipe or a pair (recipe, tricks), not {arm!r}")
    return recipe, tricks


def _require_different(a: tuple[Recipe, Tricks], b: tuple[Recipe, Tricks]) -> None:
    if not changed_fields(a[0], b[0]) and a[1].fingerprint() == b[1].fingerprint():
        raise UserError(f"both arms are {a[1].titled(a[0])}: change a field or a trick of one of them")


def arm_names(a: tuple[Recipe, Tricks], b: tuple[Recipe, Tricks]) -> tuple[str, str]:
    """Return what tables call two arms: recipe and tricks by name, and for B the fields that it changes, too."""
    first, second = a[1].titled(a[0]), b[1].titled(b[0])
    if a[0].name == b[0].name:
        second = with_changes(second, a[0], b[0])
    return first, f"{second} (other code)" if first == second else second


def with_changes(name: str, a: Recipe, b: Recipe) -> str:
    """Return `name`, and after it the first fields that `b` changes in `a`, with their new values."""
    changes = [f"{field}={new}" for field, (_, new) in changed_fields(a, b).items()]
    if len(changes) > NAMED_CHANGES:
        changes[NAMED_CHANGES:] = [f"{len(changes) - NAMED_CHANGES} more"]
    return ", ".join([name, *changes])


def runs_needed(
    found: Comparison,
    arms: Mapping[str, tuple[Recipe, Tricks]],
    data: Dataset,
    *,
    world_size: int,
    device: str | None,
) -> RunsNeeded:
    """Return how many pairs differences of several sizes take, and how long, from the runs so far where there are any.

    Without a run it measures a few steps of each arm.
    """
    n_test, pairs = len(data.test_labels), found.pairs
    deviation, source = expected_deviation(n_test)
    if pairs >= FEWEST_PAIRS:
        deviation, source = stdev(found.differences), f"that of the {pairs} pairs so far"
    if pairs:
        each = [median(run["train_seconds"] + run["evaluate_seconds"] for run in found.arms[arm]) for arm in arms]
        timing = "as the runs so far"
    else:
        each = [
            run_seconds(recipe, data, tricks=tricks, world_size=world_size, device=device)
            for recipe, tricks in arms.values()
        ]
        timing = "predicted from a few steps, measured now"
    return RunsNeeded(
        deviation=max(deviation, 100 / n_test),
        source=source,
        resolution=found.resolution,
        max_runs=found.max_runs,
        least_deviation=100 / n_test,
        pair_seconds=sum(each),
        timing=timing,
    )


def run_line(arm: str, found: Comparison) -> str:
    """Return the latest run of `arm` as a line of text, and below it, if it completes a pair, what the pairs say."""
    run = found.arms[arm][-1]
    name = {A: f"A: {found.names[0]}", B: f"B: {found.names[1]}", LONGER: "A, longer"}[arm]
    line = f"seed {run['seed']:3}  {run['train_seconds']:8.2f} s  test accuracy {percent(run['accuracy'])}  {name}"
    if not found.pairs or len(set(map(len, found.arms.values()))) > 1:
        return line
    so_far = f"{_count(found.pairs, 'pair')}: B - A {found.effect:+.2f} points"
    return f"{line}\n  {so_far}, 95 % interval {_interval(found.interval)}"


# --- the folder ---


def load_comparison(folder: Path | str) -> Comparison:
    """Read the finished runs of a comparison, even while it grows.

    Raises `RunError` when there is no comparison in `folder`, or when a line cannot be read.
    """
    path = Path(folder) / SUMMARY
    try:
        settings = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise RunError(f"{path} cannot be read: {error}; name the folder that `compare` wrote") from error
    runs = {}
    for arm in settings["arms"]:
        started = (Path(folder) / arm / RESULTS).exists()
        runs[arm] = load_benchmark(Path(folder) / arm).runs if started else []
    return Comparison(
        names=(settings["a"], settings["b"]),
        arms=runs,
        resolution=settings["resolution"],
        max_runs=settings["max_runs"],
    )


def _save(found: Comparison, path: Path) -> None:
    """Write summary and table, each whole or not at all."""
    try:
        write_json(path / SUMMARY, found.summary())
        write_text(path / TABLE, found.table() + "\n")
    except OSError as error:
        raise RunError(
            f"the folder {path} cannot be written: {error.strerror}; finished runs in it are kept"
        ) from error
