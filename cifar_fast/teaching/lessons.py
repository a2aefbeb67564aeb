"""Where a lesson's trick stands on the ladder, and what it gained there: the parts that all lessons share."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from cifar_fast import recipes, shown
from cifar_fast.errors import RunError
from cifar_fast.experiments import rungs
from cifar_fast.experiments.rungs import Gain, Point
from cifar_fast.experiments.saved import saved_runs
from cifar_fast.teaching.result_plots import Picture

SAVED = "classroom_ladder"
"""The folder of saved results with the ladder's runs."""
HERE, DONE, AHEAD = "#D55E00", "#0072B2", "#767676"


def ladder_runs() -> list[dict[str, Any]]:
    """Return the saved runs of the ladder; an empty list if there are none."""
    try:
        return saved_runs(SAVED)
    except RunError:
        return []


def gain(rung: str) -> Gain:
    """Return what the trick `rung` gained over the rung below it in the saved runs; it prints as a paragraph.

    Raises `RecipeError` if no rung of the ladder adds a trick of that name.
    """
    return rungs.gain(rung, ladder_runs())


def strip(rung: str, runs: Sequence[Mapping[str, Any]] | None = None) -> Picture:
    """Draw the ladder from its foot to its top, with the accuracy that each rung reached, and `rung` picked out.

    A trick beside the ladder is drawn dashed, after the rung that it is added to.

    Args:
        rung: name of a trick of the ladder.
        runs: lines of the ladder's `results.jsonl`; None for the saved ones.

    Raises:
        RecipeError: no rung adds a trick of that name.
    """
    recipes.rung_pair(rung)  # raises for a name that is no trick of the ladder
    beside = rung in recipes.beside_classroom_ladder()
    found = rungs.curves(ladder_runs() if runs is None else runs, rung)
    epochs = _common_epochs(found, rung)
    names = [name for name in found if epochs is None or name in recipes.classroom_arms(epochs)]
    here = names.index(rung)
    points = [next((p for p in found[name] if p.epochs == epochs), None) for name in names]
    means = [None if point is None else 100 * point.mean for point in points]
    drawn = [mean for mean in means if mean is not None]
    low, high = (min(drawn), max(drawn)) if drawn else (0.0, 1.0)
    span = max(high - low, 1.0)
    figure = Picture(figsize=(8, 2.5), layout="constrained")
    axis = figure.subplots()
    axis.axvspan(here - 0.5, here + 0.5, color=HERE, alpha=0.12, linewidth=0)
    for place, mean in enumerate(means):
        colour = HERE if place == here else DONE if place < here else AHEAD
        height = low if mean is None else mean
        dashes = (0, (1, 0.5)) if beside and place == here else "solid"  # tried there, and not kept
        axis.plot([place - 0.42, place + 0.42], 2 * [height], color=colour, linewidth=4, linestyle=dashes)
        text = "?" if mean is None else f"{mean:.1f}"
        weight = "bold" if place == here else "normal"
        axis.annotate(
            text, (place, height), (0, 4), textcoords="offset points", ha="center", color=colour, weight=weight
        )
    axis.set_xticks(range(len(names)), [rungs.label(name) for name in names], rotation=35, ha="right")
    for place, label in enumerate(axis.get_xticklabels()):
        label.set_rotation_mode("anchor")
        label.set(color=HERE if place == here else "black", weight="bold" if place == here else "normal")
    axis.set(xlim=(-0.6, len(names) - 0.4), ylim=(low - 0.1 * span, high + 0.3 * span))
    axis.set_yticks([])
    axis.spines[["left", "top", "right"]].set_visible(False)
    title, told = _told(points, drawn, epochs)
    axis.set_title(title, fontsize="medium", loc="left")
    reached = "" if means[here] is None else f", where it reaches {means[here]:.1f} %"
    figure.alt = (
        f"You are here: {rungs.label(names[here])}, "
        + (
            f"beside the ladder, added to {names[here - 1]}"
            if beside
            else f"rung {here} of {len(names) - 1} of the ladder"
        )
        + f"{reached}{told}"
    )
    return figure


def _common_epochs(found: Mapping[str, list[Point]], rung: str) -> float | None:
    """Return the number of epochs that most rungs were trained for; of several, the smallest that has all rungs.

    The shorter the training, the further the rungs lie apart. If `rung` was trained at all, only its own numbers count.
    """
    own = {point.epochs for point in found[rung]}
    counts = Counter(point.epochs for curve in found.values() for point in curve if not own or point.epochs in own)
    if not counts:
        return None
    return max(counts, key=lambda epochs: (counts[epochs], len(recipes.classroom_ladder(epochs)), -epochs))


def _told(points: Sequence[Point | None], drawn: Sequence[float], epochs: float | None) -> tuple[str, str]:
    """Return the strip's title, and what it adds to the alternative text."""
    if epochs is None or not drawn:
        return "the ladder, not measured yet", ""
    measured = [point for point in points if point is not None]
    seeds = sorted({len(point.accuracy) for point in measured})
    n = f"n = {seeds[0]}" if len(seeds) == 1 else f"n = {seeds[0]} to {seeds[-1]}"
    flop = sorted({round(point.flop / rungs.TERA, 1) for point in measured})
    work = f"{flop[0]:.1f}" if len(flop) == 1 else f"{flop[0]:.1f} to {flop[-1]:.1f}"
    length = shown.epochs(epochs)
    title = f"test accuracy in % after {length} ({work} TFLOP), {n}"
    return title, f"; the rungs reach {min(drawn):.1f} to {max(drawn):.1f} % after {length}"
