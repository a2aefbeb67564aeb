"""Figures drawn from results; nothing here trains, and nothing touches pyplot's state."""

from __future__ import annotations

import io
import textwrap
from base64 import b64encode
from collections.abc import Iterable, Mapping, Sequence
from statistics import fmean
from typing import TYPE_CHECKING, Any

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullLocator
from PIL import Image

from cifar_fast.errors import UserError
from cifar_fast.experiments import rungs
from cifar_fast.experiments.published import APPLE_2019, Published, comparable
from cifar_fast.experiments.rungs import TERA, Point, StepSeconds, curves, ladder_runs, train_seconds
from cifar_fast.experiments.statistics import mean_interval, summarise, wilson_interval
from cifar_fast.shown import data_set, hardware, percent
from cifar_fast.shown import epochs as in_epochs

if TYPE_CHECKING:
    from cifar_fast.experiments.benchmark import Benchmark
    from cifar_fast.experiments.plan import Prediction
    from cifar_fast.training.result import EpochResult, RunResult

# Blue and vermilion of Okabe and Ito (2008) differ for every kind of colour vision; in grey, marker and dash do.
TEST = {"color": "#0072B2", "marker": "o", "linestyle": "-", "label": "test"}
TRAIN = {"color": "#D55E00", "marker": "s", "linestyle": "--", "label": "training (augmented)"}


class Picture(Figure):
    """A figure on opaque white that a notebook shows without pyplot, with a sentence for those who cannot see it."""

    alt = ""

    def __init__(self, **options: Any) -> None:
        """Take matplotlib's options of a figure."""
        super().__init__(facecolor="white", **options)

    def png(self, caption: str = "") -> bytes:
        """Return the figure as the bytes of a PNG file, small enough to be stored in a notebook by the dozen.

        `caption` is written below it.
        """
        image = self._pixels()
        if caption:
            image = _stacked_images(image, _written(caption, self.get_figwidth())._pixels())
        # Steps of 8 (white excepted) are too small for the eye to tell apart, and halve the file.
        image = image.point([8 * round(value / 8) if value < 252 else 255 for value in range(256)] * 3)
        if image.getcolors(512):  # lines and text; a photograph has thousands
            image = image.quantize(256, dither=Image.Dither.NONE)
        file = io.BytesIO()
        image.save(file, format="png", optimize=True)
        return file.getvalue()

    def _pixels(self) -> Image.Image:
        raw = io.BytesIO()
        self.savefig(raw, format="rgba", dpi=self.dpi)
        return Image.frombytes("RGBA", self.canvas.get_width_height(), raw.getvalue()).convert("RGB")

    def _repr_mimebundle_(self, include: Any = None, exclude: Any = None) -> tuple[dict[str, str], dict[str, Any]]:
        """Return what IPython shows, and the alternative text as nbconvert looks for it."""
        title = self.alt or self.get_suptitle()
        data = {"image/png": b64encode(self.png()).decode(), "text/plain": f"<{title}>" if title else repr(self)}
        return data, {"image/png": {"alt": title}}


CAPTION: dict[str, Any] = {"fontsize": 11, "color": "#444444", "style": "italic", "va": "top", "ha": "left"}
LETTERS = 12.5  # of a caption in an inch


def _written(text: str, width: float) -> Picture:
    """Return lines of text as a picture, `width` inches wide."""
    lines = textwrap.wrap(text, round(LETTERS * width))
    height = 0.21 * len(lines) + 0.1
    picture = Picture(figsize=(width, height))
    picture.text(0.1 / width, 1 - 0.03 / height, "\n".join(lines), linespacing=1.25, **CAPTION)
    return picture


def _stacked_images(above: Image.Image, below: Image.Image) -> Image.Image:
    whole = Image.new("RGB", (above.width, above.height + below.height), "white")
    whole.paste(above, (0, 0))
    whole.paste(below, (0, above.height))
    return whole


def learning_curve(run: RunResult | Sequence[EpochResult], axes: tuple[Axes, Axes] | None = None) -> Figure:
    """Draw accuracy and loss, for training and test images, over the seconds of training.

    Args:
        run: a finished run, or its epochs so far (which have no title).
        axes: where to draw accuracy and loss; by default in a new figure.

    Returns:
        The figure that holds the axes.
    """
    epochs = run if isinstance(run, Sequence) else run.epochs
    if axes is None:
        left, right = Picture(figsize=(9, 3.8), layout="constrained").subplots(1, 2)
    else:
        left, right = axes
    seconds = [epoch.train_seconds for epoch in epochs]
    left.plot(seconds, [100 * epoch.train_accuracy for epoch in epochs], **TRAIN)
    left.plot(seconds, [100 * epoch.test_accuracy for epoch in epochs], **TEST)
    # Smoothed targets keep the training loss above what the same predictions would cost with plain ones.
    smoothed = {"label": "training (augmented, smoothed labels)"}
    right.plot(seconds, [epoch.train_loss for epoch in epochs], **(TRAIN | smoothed if _smooths(run) else TRAIN))
    right.plot(seconds, [epoch.test_loss for epoch in epochs], **TEST)
    for axis, label in ((left, "accuracy in %"), (right, "loss")):
        axis.set(xlabel="train_seconds", ylabel=label)
        axis.set_xlim(left=0)
        axis.grid(alpha=0.3)
        axis.spines[["top", "right"]].set_visible(False)
        axis.legend()
    figure = left.get_figure(root=True)
    assert isinstance(figure, Figure)
    if not isinstance(run, Sequence):
        figure.suptitle(_title(run), fontsize="medium")
    return figure


def _smooths(run: RunResult | Sequence[EpochResult]) -> bool:
    return not isinstance(run, Sequence) and run.recipe.label_smoothing > 0


def _title(run: RunResult) -> str:
    reached = f"{100 * run.accuracy:.2f} % (TTA: {run.recipe.tta})"
    return f"{run.recipe.name}, data set: {data_set(run.dataset)}, {reached}\n{hardware(run.environment)}"


DOT: dict[str, Any] = {"color": "#0072B2", "edgecolor": "white", "linewidth": 0.4, "zorder": 3}
MEAN: dict[str, Any] = {"color": "#0072B2", "marker": "D", "markersize": 5, "linewidth": 1.6, "capsize": 3, "zorder": 3}
TARGET: dict[str, Any] = {"color": "#D55E00", "linestyle": "-", "linewidth": 1.8, "zorder": 2}
PUBLISHED: dict[str, Any] = {"color": "#333333", "linewidth": 1.4, "zorder": 2}


def accuracy_and_time(benchmark: Benchmark, published: Published = APPLE_2019) -> Figure:
    """Draw how accuracy and train_seconds are distributed over the runs, each run a dot, stacked where they meet.

    The target, the mean with its 95 % interval (Student's t), and published figures are marked. Where the runs are not
    on CIFAR-10, the published figures are left out, and the figure says so.
    """
    found = summarise(benchmark.runs, benchmark.target)
    figure = Picture(figsize=(10, 4.6))
    left, right = figure.subplots(1, 2)
    figure.subplots_adjust(left=0.03, right=0.97, top=0.84, bottom=0.37, wspace=0.08)
    low, high = wilson_interval(found["at_target"], found["n"])
    share = f"{found['at_target']} of {found['n']} (95 % interval {100 * low:.0f} to {100 * high:.0f} %)"
    lines = [(100 * found["target"], TARGET, f"target {percent(found['target'])}, reached by {share}")]
    seconds: list[tuple[float, dict[str, Any], str]] = []
    title = f"{found['recipe']}, data set: {data_set(found['dataset'])}, n = {found['n']}\n{found['hardware']}"
    if comparable(found["dataset"]):
        name = f"published ({published.name}, n = {published.runs})"
        dashed, dotted = PUBLISHED | {"linestyle": "--"}, PUBLISHED | {"linestyle": ":"}
        lines.append((100 * published.median_accuracy, dashed, f"{name} median {percent(published.median_accuracy)}"))
        lines.append((100 * published.min_accuracy, dotted, f"{name} minimum {percent(published.min_accuracy)}"))
        seconds.append((published.mean_seconds, dashed, f"{name} mean {published.mean_seconds:.2f} s"))
        seconds.append((published.max_seconds, dotted, f"{name} maximum {published.max_seconds:.2f} s"))
    else:
        title += "\nnot the whole of CIFAR-10: the published figures cannot be compared with these and are not drawn"
    times = [run["train_seconds"] for run in benchmark.runs]
    if max(times) > 4 * published.mean_seconds and seconds:
        right.set_xscale("log")  # on a linear axis the faster of the two would be one blot
        right.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        right.xaxis.set_major_formatter("{x:g}")
        right.xaxis.set_minor_locator(NullLocator())
    _dots(left, [100 * run["accuracy"] for run in benchmark.runs], lines, "%", least_span=0.4)
    _dots(right, times, seconds, "s", least_span=0.02 * max(times))
    left.set_xlabel("test accuracy in %")
    right.set_xlabel("train_seconds" + (", logarithmic" if right.get_xscale() == "log" else ""))
    figure.suptitle(title, fontsize="medium", y=0.97, va="top")
    return figure


BASELINE = 22.0  # points from the bottom of the axes to the line that the dots stand on; the mean is drawn below it


def _dots(
    axis: Axes,
    values: Sequence[float],
    lines: Sequence[tuple[float, dict[str, Any], str]],
    unit: str,
    *,
    least_span: float,
) -> None:
    """Draw values as stacked dots over a baseline, their mean with its interval below, and vertical lines."""
    interval = mean_interval(values)
    shown = [*values, *(place for place, _, _ in lines)]
    if interval and len(values) > 2:  # that of two runs can be so wide that the runs would be one dot
        shown += [end for end in interval if end > 0]
    axis.set_xlim(_limits(min(shown), max(shown), least_span, logarithmic=axis.get_xscale() == "log"))
    handles: list[Any] = [_stacked(axis, values)]
    if interval is not None:
        start, end = interval
        label = f"mean {(start + end) / 2:.2f} {unit}, 95 % interval {start:.2f} to {end:.2f} {unit}"
        handles.append(
            axis.errorbar([(start + end) / 2], [-BASELINE / 2], xerr=[(end - start) / 2], label=label, **MEAN)
        )
    handles += [axis.axvline(place, label=text, **style) for place, style, text in lines]
    axis.axhline(0, color="black", linewidth=0.8)
    axis.set_yticks([])
    axis.grid(axis="x", alpha=0.3)
    axis.spines[["left", "top", "right"]].set_visible(False)
    axis.legend(handles=handles, loc="upper left", bbox_to_anchor=(0, -0.26), fontsize="small", frameon=False)


def _limits(low: float, high: float, least_span: float, *, logarithmic: bool) -> tuple[float, float]:
    """Return the ends of an axis that shows `low` to `high` with a margin, and no less than `least_span` if linear."""
    if logarithmic:
        factor = (high / low) ** 0.07
        return low / factor, high * factor
    margin = max(0.07 * (high - low), (least_span - (high - low)) / 2)
    return low - margin, high + margin


def _stacked(axis: Axes, values: Sequence[float]) -> Any:
    """Draw a dot for each value, stacked where they meet, the largest that fit; the x limits of the axes are set."""
    figure, box = axis.get_figure(root=True), axis.get_position()
    assert isinstance(figure, Figure)
    width, height = (72 * size for size in figure.get_size_inches() * box.size)  # in points, 1/72 inch
    axis.set_ylim(-BASELINE, height - BASELINE)  # the y axis counts points, as the diameters and places do
    to_axes = axis.transData + axis.transAxes.inverted()
    places = [width * to_axes.transform((value, 0))[0] for value in values]
    for diameter in (9.0, 8.0, 7.0, 6.0, 5.0):
        levels = stack(places, diameter)
        room = height - BASELINE - diameter - 2
        if max(levels) * diameter <= room:
            break
    step = min(diameter, room / max(1, *levels))  # less than a diameter: the dots of a stack overlap
    heights = [diameter / 2 + 2 + step * level for level in levels]
    return axis.scatter(values, heights, s=diameter**2, label="one run", **DOT)


def stack(places: Sequence[float], diameter: float) -> list[int]:
    """Return for each dot at `places` the lowest level, from 0, on which it touches none of the others."""
    levels = [0] * len(places)
    last: list[float] = []  # on each level the place of the dot furthest to the right
    for i in sorted(range(len(places)), key=lambda i: places[i]):
        free = (level for level, place in enumerate(last) if places[i] - place >= diameter)
        levels[i] = next(free, len(last))
        last[levels[i] :] = [places[i], *last[levels[i] + 1 :]]
    return levels


# Hatches tell the terms apart where colours cannot.
TERMS = {
    "compute": {"color": "#0072B2", "hatch": ""},
    "all-reduce": {"color": "#D55E00", "hatch": "///"},
    "launch overhead": {"color": "#F0E442", "hatch": "..."},
    "set-up": {"color": "#BBBBBB", "hatch": "xxx"},
}
BOUND = "\u2265"
"""Marks a figure as a lower bound."""


def predicted_scaling(predictions: Sequence[Prediction]) -> Figure:
    """Draw what `plan.predict` expects over the number of workers: the terms in seconds, and as shares of the whole.

    Args:
        predictions: of one recipe, one link and one measurement, at least one.

    Returns:
        The figure, which says that it is a prediction.
    """
    figure = Picture(figsize=(10, 4.4), layout="constrained")
    left, right = figure.subplots(1, 2)
    first, places = predictions[0], range(len(predictions))
    for axis, wholes in ((left, [1.0] * len(predictions)), (right, [now.train_seconds / 100 for now in predictions])):
        bottoms = [0.0] * len(predictions)
        for name, style in TERMS.items():
            heights = [now.terms[name] / whole for now, whole in zip(predictions, wholes, strict=True)]
            axis.bar(places, heights, bottom=bottoms, label=name, edgecolor="white", linewidth=0, width=0.7, **style)
            bottoms = [bottom + height for bottom, height in zip(bottoms, heights, strict=True)]
        axis.set_xticks(places, [str(now.world_size) for now in predictions])
        axis.set_xlabel("workers")
        axis.grid(axis="y", alpha=0.3)
        axis.set_axisbelow(True)
        axis.spines[["top", "right"]].set_visible(False)
    for place, now in zip(places, predictions, strict=True):
        digits = sum(now.train_seconds < limit for limit in (10, 100))
        left.annotate(
            f"{BOUND * now.lower_bound}{now.train_seconds:.{digits}f}",
            (place, now.train_seconds),
            xytext=(0, 3),
            textcoords="offset points",
            ha="center",
            fontsize="small",
        )
    left.plot(
        places,
        [now.evaluate_seconds for now in predictions],
        color="black",
        marker="D",
        markerfacecolor="white",
        linestyle=":",
        label="evaluation (not in train_seconds)",
    )
    left.set_ylabel("predicted train_seconds")
    right.set_ylabel("predicted share of train_seconds in %")
    left.margins(y=0.08)
    right.set_ylim(0, 100)
    handles, labels = left.get_legend_handles_labels()
    left.legend(handles[1:] + handles[:1], labels[1:] + labels[:1], fontsize="small")  # the bars first
    link = f"all-reduce: {first.link.name}, up to {first.link.most_workers} workers"
    if any(now.lower_bound for now in predictions):
        link += f"; {BOUND}: lower bound, no figure for several machines is known"
    figure.suptitle(
        f"PREDICTION, not a measurement: {first.recipe}, {first.n_train:,} training and {first.n_test:,} test images\n"
        f"steps measured on one {first.hardware}\n{link}",
        fontsize="medium",
    )
    return figure


MARKERS = "osD^vPX*hd"
LABEL_GAP = 15.0  # points between two labels of curves


def ladder_curves(
    runs: Iterable[Mapping[str, Any]], step_seconds: StepSeconds | None = None, machine: str = ""
) -> Picture:
    """Draw test accuracy over the arithmetic of training, or over its seconds; a curve for each rung of the ladder.

    A curve further to the left needs less for the same accuracy. Bars are 95 % intervals of the mean (Student's t)
    over seeds.

    Args:
        runs: lines of the ladder's `results.jsonl`; rungs without runs are left out.
        step_seconds: what a step of each rung takes; the runs are then drawn over the seconds of their steps.
        machine: where these seconds were measured.

    Raises:
        UserError: there is no run of a recipe of the ladder, or a step of one was not timed.
    """
    runs = ladder_runs(runs)
    found = {name: curve for name, curve in curves(runs).items() if curve}
    if not found:
        raise UserError("there is no run of the classroom ladder to draw; benchmarks/classroom_ladder.py trains them")
    what, unit = ("the arithmetic of training", "TFLOP") if step_seconds is None else ("the time of training", "s")

    def cost(name: str, point: Point) -> float:
        return train_seconds(name, point.epochs, step_seconds) if step_seconds is not None else point.flop / TERA

    figure = Picture(figsize=(8, 5.6), layout="constrained")
    axis = figure.subplots()
    ends = []
    for place, (name, curve) in enumerate(found.items()):
        # From dark blue to ochre, even in lightness, for every kind of colour vision; markers tell neighbours apart.
        colour = colormaps["cividis"](0.82 * place / max(1, len(found) - 1))
        x = [cost(name, point) for point in curve]
        y = [100 * point.mean for point in curve]
        half = [50 * (point.interval[1] - point.interval[0]) if point.interval else 0.0 for point in curve]
        marker = MARKERS[place % len(MARKERS)]
        style: dict[str, Any] = {"color": colour, "marker": marker, "markersize": 6, "capsize": 3}
        axis.errorbar(x, y, yerr=half, linewidth=2, elinewidth=1.2, **style)
        ends.append((x[-1], y[-1], rungs.label(name), colour))
    axis.set_xscale("log")
    low, high = (limit(cost(name, point) for name, curve in found.items() for point in curve) for limit in (min, max))
    axis.set_xlim(low / 1.15, high * 1.15)
    axis.xaxis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 3, 4, 6, 8)))
    axis.margins(y=0.12)  # room at the top for the names of the best
    axis.xaxis.set_major_formatter("{x:g}")
    axis.xaxis.set_minor_locator(NullLocator())
    where = f" on {machine}" if machine else ""
    axis.set_xlabel(f"{what.removeprefix('the ')} in {unit}{where}, logarithmic", fontsize=13)
    # Equal steps halve the error: the curves become nearly straight, and those at the top do not crowd.
    axis.set_yscale("function", functions=(lambda right: -np.log2(100 - right), lambda height: 100 - 2.0**-height))
    axis.set_yticks([tick for tick in ACCURACIES if axis.get_ylim()[0] < tick < axis.get_ylim()[1]])
    axis.yaxis.set_minor_locator(NullLocator())
    axis.set_ylabel("test accuracy in %, logarithmic in the error", fontsize=13)
    axis.tick_params(labelsize=12)
    axis.grid(alpha=0.3)
    axis.spines[["top", "right"]].set_visible(False)
    points = [point for curve in found.values() for point in curve]
    seeds = sorted({len(point.accuracy) for point in points})
    n = f"n = {seeds[0]}" + (f" to {seeds[-1]}" if len(seeds) > 1 else "")
    names = " / ".join(dict.fromkeys(run["dataset"]["name"] for run in runs))
    axis.set_title(f"One trick after another on a narrow network ({names}, {n})", fontsize=13, loc="left")
    _label_ends(axis, ends)
    (x0, y0, first, _), (x1, y1, last, _) = ends[0], ends[-1]
    figure.alt = (
        f"Test accuracy over {what} for {len(found)} rungs of the ladder, from {y0:.1f} % at {x0:.1f} {unit} ({first}) "
        f"to {y1:.1f} % at {x1:.1f} {unit} ({last})"
    )
    return figure


ACCURACIES = (10, 20, 30, 40, 50, 60, 65, 70, 75, 80, 82, 84, 86, 88, 90, 92, 94, 95, 96, 97, 98, 99)
"""Ticks of an axis that is logarithmic in the error."""
ADDED: dict[str, Any] = {"color": "#0072B2", "marker": "o", "label": "added to those before it: points gained"}
LEFT_OUT: dict[str, Any] = {"color": "#D55E00", "marker": "s", "label": "taken away from all: points lost"}


def added_and_left_out(ladder: Iterable[Mapping[str, Any]], left_out: Iterable[Mapping[str, Any]]) -> Picture:
    """Draw what each trick gains where the ladder adds it, beside what the top of the ladder loses without it.

    Bars are 95 % intervals of the mean (Student's t) over seeds.

    Args:
        ladder: lines of the ladder's `results.jsonl`.
        left_out: lines of the `results.jsonl` that `benchmarks/ablation.py --leave-one-out` saved.

    Raises:
        UserError: as `experiments.rungs.added_and_left_out`.
    """
    left_out = list(left_out)
    worth = rungs.added_and_left_out(ladder, left_out)
    figure = Picture(figsize=(8, 1.9 + 0.6 * len(worth)), layout="constrained")
    axis = figure.subplots()
    axis.axvline(0, color="black", linewidth=0.8)
    for style, shift, field in ((ADDED, -0.16, "gains"), (LEFT_OUT, 0.16, "losses")):
        for place, each in enumerate(worth.values()):
            values = getattr(each, field)
            mean, interval = fmean(values), mean_interval(values)
            half = (interval[1] - interval[0]) / 2 if interval else 0.0
            named = style | {"label": style["label"] if place == 0 else None}
            axis.errorbar([mean], [place + shift], xerr=[half], markersize=7, capsize=3, linestyle="none", **named)
            # The small ones can hardly be read from the axis.
            end = (mean + half, place + shift)
            axis.annotate(f"{mean:+.1f}", end, (8, 0), textcoords="offset points", fontsize=11, va="center")
    axis.set_yticks(range(len(worth)), [rungs.label(name) for name in worth], fontsize=12)
    axis.invert_yaxis()
    axis.set_xlabel("points of test accuracy", fontsize=13)
    axis.tick_params(axis="x", labelsize=12)
    axis.grid(axis="x", alpha=0.3)
    axis.spines[["top", "right", "left"]].set_visible(False)
    axis.tick_params(axis="y", length=0)
    figure.legend(loc="outside lower center", ncols=2, fontsize=12, frameon=False)
    seeds = sorted({len(values) for each in worth.values() for values in (each.gains, each.losses)})
    n = f"n = {seeds[0]}" + (f" to {seeds[-1]}" if len(seeds) > 1 else "")
    names = " / ".join(dict.fromkeys(run["dataset"]["name"] for run in left_out))
    length = in_epochs(next(iter(worth.values())).epochs)
    axis.set_title(f"What a trick is worth, asked in two ways ({names}, {length}, {n})", fontsize=13, loc="left")
    figure.alt = "Points of test accuracy for each trick, gained when added and lost when taken away: " + "; ".join(
        f"{rungs.label(name)} {fmean(each.gains):+.1f} and {fmean(each.losses):+.1f}" for name, each in worth.items()
    )
    return figure


def _label_ends(axis: Axes, ends: Sequence[tuple[float, float, str, Any]]) -> None:
    """Write each curve's name to the right of the axes, as near to its end as the other names allow."""
    figure = axis.get_figure(root=True)
    assert isinstance(figure, Figure)
    figure.draw_without_rendering()
    ordered = sorted(ends, key=lambda end: end[1])
    scale = 72 / figure.dpi
    wanted = [scale * axis.transData.transform((x, y))[1] for x, y, _, _ in ordered]
    for (x, y, name, colour), height in zip(ordered, spaced(wanted, LABEL_GAP), strict=True):
        axis.annotate(
            name,
            (x, y),
            (1.03, axis.transAxes.inverted().transform((0, height / scale))[1]),
            textcoords="axes fraction",
            fontsize=12,
            va="center",
            arrowprops={"arrowstyle": "-", "color": colour, "linewidth": 0.8, "alpha": 0.6, "shrinkA": 0, "shrinkB": 4},
        )


def spaced(places: Sequence[float], gap: float) -> list[float]:
    """Return `places`, in ascending order, moved as little as it takes to have at least `gap` between neighbours.

    Those that would meet form a block around the mean of where they want to be.
    """
    blocks: list[list[float]] = []
    for place in places:
        blocks.append([place])
        while len(blocks) > 1 and _top(blocks[-2], gap) + gap > _bottom(blocks[-1], gap):
            blocks[-2:] = [blocks[-2] + blocks[-1]]
    return [_bottom(block, gap) + gap * i for block in blocks for i in range(len(block))]


def _bottom(block: Sequence[float], gap: float) -> float:
    return sum(block) / len(block) - gap * (len(block) - 1) / 2


def _top(block: Sequence[float], gap: float) -> float:
    return _bottom(block, gap) + gap * (len(block) - 1)
