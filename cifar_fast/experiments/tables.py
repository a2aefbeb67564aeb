"""Writes results as text or HTML: aligned tables, the run log, our runs beside published ones."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from statistics import fmean, median
from typing import Any

from cifar_fast.experiments.published import APPLE_2019, Published, comparable
from cifar_fast.experiments.statistics import CLOCKS, mean_interval, speeds, summarise, wilson_interval
from cifar_fast.shown import data_set, percent, table

# --- text ---


def run_log(runs: Sequence[Mapping[str, Any]], target: float) -> str:
    """Return the log of a benchmark: recipe and machine, a line for each run, a closing summary."""
    found = summarise(runs, target)
    tta, data = runs[0]["recipe"]["tta"], found["dataset"]
    lines = [
        f"recipe: {found['recipe']}",
        f"data set: {data_set(data)}, fingerprint {data['fingerprint']}",
        f"hardware: {found['hardware']}; {found['numerics']}",
        f"versions: {_versions(found)}",
        "train: last epoch, on the augmented images, with the recipe's label smoothing",
        f"validation: the test images after the last epoch (TTA: {tta}); wall time: train_seconds, without validation",
        "",
    ]
    rows = [("run", "seed", "train acc %", "train loss", "val acc %", "val loss", "wall time s")]
    for run in runs:
        last = run["epochs"][-1]
        train = (f"{100 * last['train_accuracy']:.2f}", f"{last['train_loss']:.4f}")
        validation = (f"{100 * run['accuracy']:.2f}", f"{run['loss']:.4f}")
        rows.append((str(run["run"]), str(run["seed"]), *train, *validation, f"{run['train_seconds']:.2f}"))
    seconds, accuracy = found["train_seconds"], found["accuracy"]
    lines += [
        table(rows, right=True),
        "",
        f"runs: {found['n']}",
        f"wall time: max {seconds['max']:.2f} s, median {seconds['median']:.2f} s",
        f"validation accuracy: lowest {percent(accuracy['min'])}, median {percent(accuracy['median'])}",
        f"runs at {percent(target)} or more: {_share(found['at_target'], found['n'])}",
    ]
    return "\n".join(lines) + "\n"


def comparison_rows(
    summary: Mapping[str, Any], published: Published = APPLE_2019
) -> tuple[str, list[tuple[str, str, str]], list[str]]:
    """Return a loud warning if the data set differs ("" if not), the rows of a table that puts the runs of `summary`
    beside published ones, and notes on them.
    """
    same_data = comparable(summary["dataset"])
    accuracy, seconds = summary["accuracy"], summary["train_seconds"]
    same_target = math.isclose(summary["target"], published.target)
    there = (
        _share(published.at_target, published.runs)
        if same_target
        else f"{_share(published.at_target, published.runs)} at {percent(published.target)}"
    )
    rows = [
        ("", "here", f"published: {published.name}"),
        ("data set", data_set(summary["dataset"]), "CIFAR-10" + ("" if same_data else ": NOT COMPARABLE")),
        ("hardware", summary["hardware"], published.hardware),
        ("recipe", f"{summary['recipe']} ({summary['numerics']})", "reproduced as apple_8gpu"),
        ("versions", _versions(summary), "not published"),
        ("n", _runs(summary["n"]), _runs(published.runs)),
        (f"at {percent(summary['target'])}", _share(summary["at_target"], summary["n"]), there),
        ("accuracy min", percent(accuracy["min"]), percent(published.min_accuracy)),
        ("accuracy median", percent(accuracy["median"]), percent(published.median_accuracy)),
        ("accuracy mean", _mean(accuracy, 100, "%"), "not published"),
        ("accuracy max", percent(accuracy["max"]), "not published"),
        ("train_seconds min", f"{seconds['min']:.2f} s", "not published"),
        ("train_seconds median", f"{seconds['median']:.2f} s", "not published"),
        (
            "train_seconds mean",
            _mean(seconds, 1, "s"),
            f"{published.mean_seconds:.2f} s (its run log: {published.run_log})",
        ),
        ("train_seconds max", f"{seconds['max']:.2f} s", f"{published.max_seconds:.2f} s"),
    ]
    for clock in CLOCKS[1:]:
        values = summary[clock]
        text = f"{values['median']:.2f} s ({values['min']:.2f} to {values['max']:.2f})"
        rows.append((f"{clock} median", text, "not published"))
    notes = [
        "train_seconds here: from the first byte sent to the device to the last step, whitening included, without "
        "validation;",
        "total_seconds: a whole run; starting processes, imports and the warm-up came before the first run.",
        f"Published clock: {published.clock}.",
        f"Source: {published.source}. Wilson intervals of both columns are ours.",
    ]
    warning = (
        f"NOT COMPARABLE: these runs used the data set {data_set(summary['dataset'])}, which is not all of "
        "CIFAR-10. Neither their accuracies nor their times can be compared with the published ones."
    )
    return "" if same_data else warning, rows, notes


def comparison_table(summary: Mapping[str, Any], published: Published = APPLE_2019) -> str:
    """Return as text the runs of `summary` beside published ones, with a loud warning if the data set differs."""
    warning, rows, notes = comparison_rows(summary, published)
    rule = "!" * 100
    return "\n".join([*([rule, warning, rule] if warning else []), table(rows), *notes])


def _versions(summary: Mapping[str, Any]) -> str:
    versions = summary["versions"]
    return f"cifar_fast {versions['cifar_fast']}, torch {versions['torch']}, Python {versions['python']}"


def _runs(n: int) -> str:
    return f"{n} run" + ("s" if n != 1 else "")


def _share(k: int, n: int) -> str:
    low, high = wilson_interval(k, n)
    return f"{k} of {n} ({100 * k / n:.1f} %, 95 % interval {100 * low:.1f} to {100 * high:.1f})"


def _mean(values: Mapping[str, Any], scale: float, unit: str) -> str:
    text = f"{scale * values['mean']:.2f} {unit}"
    if values["mean_95"] is None:
        return text
    low, high = values["mean_95"]
    return f"{text} (95 % interval {scale * low:.2f} to {scale * high:.2f})"


def rounded(values: Sequence[float], *, like: tuple[float, float] | None = None, signed: bool = False) -> str:
    """Return values as text, with the decimals that their interval supports: `+0.21 to +0.64`, or `86.9`.

    Two digits of the interval's half width are kept, in one decimal at least and two at most.

    Args:
        values: in the unit that is shown, joined by "to".
        like: the interval that decides; None for two decimals.
        signed: whether a positive value gets a plus sign.
    """
    half_width = (like[1] - like[0]) / 2 if like else 0.0
    decimals = min(2, max(1, 1 - math.floor(math.log10(half_width)))) if half_width > 0 else 2
    return " to ".join(f"{value:{'+' * signed}.{decimals}f}" for value in values)


def mean_and_half_width(values: Sequence[float], unit: str) -> str:
    """Return the mean of values, rounded, and half the width of its 95 % interval: `86.9 +- 1.2 %`."""
    interval = mean_interval(values)
    half = f" +- {rounded([(interval[1] - interval[0]) / 2], like=interval)}" if interval else ""
    return f"{rounded([fmean(values)], like=interval)}{half} {unit}"


def turns_table(seconds: Mapping[str, Sequence[float]], n_images: int) -> str:
    """Return a line for each way: images per second, and its speed relative to the first way in the same round.

    `seconds`: what `clock.in_turns` returns. `n_images`: the number of images that each call handled.
    """
    rows = [("way", "images/s", "times as fast as the first, median", "range over the rounds")]
    for name, now in speeds(seconds).items():
        rate = n_images / median(seconds[name])
        rows.append((name, f"{rate:,.1f}", f"{median(now):.2f}", f"{min(now):.2f} to {max(now):.2f}"))
    return table(rows)
